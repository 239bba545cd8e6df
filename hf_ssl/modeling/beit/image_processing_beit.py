"""Image processor of BEiT."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import SSLImageProcessor, color_jitter, crop, flip, view


class BEiTImageProcessor(SSLImageProcessor):
    """ImageNet normalisation; jitter, flips and crops of version 2, as the authors' `datasets.py`.

    Encoder and tokenizer see the same view, so that a token is that of its patch.
    """

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """One view."""
        return [
            view(image_size, crop((0.2, 1.0), "bicubic"), [color_jitter(0.4, 0.4, 0.4, 0.0, 1.0), flip()])
        ]
