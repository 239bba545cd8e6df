"""Image processor of BEiT v2's tokenizer."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import SSLImageProcessor, crop, flip, view


class BEiTTokenizerImageProcessor(SSLImageProcessor):
    """ImageNet normalisation, or that of the encoder distilled; crops and flips, as the authors have it."""

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """One view."""
        return [view(image_size, crop((0.08, 1.0), "bicubic"), [flip()])]
