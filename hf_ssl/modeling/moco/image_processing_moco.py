"""Image processor of MoCo v1 and v2."""

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


class MoCoImageProcessor(SSLImageProcessor):
    """ImageNet normalisation, as the authors' `main_moco.py`."""

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """v2 views (`--aug-plus`; v1's are in the recipe `moco_v1`); at 32 px no blur, as their notebook."""
        transforms = [color_jitter(0.4, 0.4, 0.4, 0.1, probability=0.8), grayscale()]
        if image_size > 32:
            transforms.append(blur(0.5))
        transforms.append(flip())
        return [view(image_size, crop((0.2, 1.0), "bilinear"), transforms, count=2)]
