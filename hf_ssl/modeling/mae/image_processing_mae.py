"""Image processor of MAE."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import SSLImageProcessor, crop, flip, view


class MAEImageProcessor(SSLImageProcessor):
    """ImageNet normalisation; crops and flips only, as the authors' `main_pretrain.py`."""

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """One view."""
        return [view(image_size, crop((0.2, 1.0), "bicubic"), [flip()])]
