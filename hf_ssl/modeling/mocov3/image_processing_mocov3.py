"""Image processor of MoCo v3."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import (
    SSLImageProcessor,
    blur,
    color_jitter,
    crop,
    flip,
    grayscale,
    solarize,
    view,
)


class MoCoV3ImageProcessor(SSLImageProcessor):
    """ImageNet normalisation, as the authors' `main_moco.py`."""

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """Two different views: always blurred; rarely blurred but solarized. No blur at 32 px."""
        cropped = crop((0.08, 1.0), "bilinear")
        color = [color_jitter(0.4, 0.4, 0.2, 0.1, probability=0.8), grayscale()]
        blurs = ([blur(1.0)], [blur(0.1)]) if image_size > 32 else ([], [])
        return [
            view(image_size, cropped, [*color, *blurs[0], flip()]),
            view(image_size, cropped, [*color, *blurs[1], solarize(0.2), flip()]),
        ]
