"""Image processor of SigLIP."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import SSLImageProcessor, crop, view


class SigLIPImageProcessor(SSLImageProcessor):
    """Values in [-1, 1]; the whole image is resized to a square, whatever its sides."""

    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """One view: no flip, since captions know left from right, and no colour, since they name it."""
        return [view(image_size, crop((0.9, 1.0), "bicubic"), [])]

    @classmethod
    def for_image_size(cls, image_size: int, **overrides: Any) -> "SSLImageProcessor":
        """As the authors' evaluation, without a crop at any size."""
        square = {"height": image_size, "width": image_size}
        geometry = {"size": square, "do_center_crop": None, "crop_size": None}
        return super().for_image_size(image_size, **{**geometry, **overrides})
