"""Image processor of CLIP."""

from typing import Any

from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from hf_ssl.modeling.shared.image_processing import SSLImageProcessor, crop, view


class SSLCLIPImageProcessor(SSLImageProcessor):
    """The authors' normalisation; a mild crop and nothing else, as open_clip's `image_transform`."""

    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """One view: no flip, since captions know left from right, and no colour, since they name it."""
        return [view(image_size, crop((0.9, 1.0), "bicubic"), [])]
