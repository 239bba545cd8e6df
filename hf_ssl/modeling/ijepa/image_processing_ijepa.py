"""Image processor of I-JEPA."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import SSLImageProcessor, crop, view


class IJEPAImageProcessor(SSLImageProcessor):
    """ImageNet normalisation; crops alone, neither flipped nor coloured, as the authors' `transforms.py`."""

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """One view."""
        return [view(image_size, crop((0.3, 1.0), "bilinear"), [])]
