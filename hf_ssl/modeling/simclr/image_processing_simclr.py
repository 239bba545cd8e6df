"""Image processor of SimCLR."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import (
    SSLImageProcessor,
    blur,
    color_jitter,
    crop,
    flip,
    grayscale,
    view,
)


class SimCLRImageProcessor(SSLImageProcessor):
    """Values in [0, 1] without further normalisation, as the authors' `data_util.py`."""

    image_mean = [0.0, 0.0, 0.0]
    image_std = [1.0, 1.0, 1.0]

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """Two views drawn alike; half the colour strength and no blur at 32 px (appendix B.9)."""
        small = image_size <= 32
        strength = 0.5 if small else 1.0
        transforms = [
            flip(),
            color_jitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, probability=0.8),
            grayscale(),
        ]
        if not small:
            transforms.append(blur(0.5))
        return [view(image_size, crop((0.08, 1.0), "bicubic"), transforms, count=2)]
