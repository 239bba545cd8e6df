"""Image processor of V-JEPA: of the frames of clips, one by one, and of images, which are still clips."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import SSLImageProcessor, clip, crop


class VJEPAImageProcessor(SSLImageProcessor):
    """ImageNet normalisation; crops and flips, no colour, as the authors' `transforms.py`."""

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """One clip."""
        ratio = {"ratio": [0.75, 1.35]}
        return [clip(image_size, crop((0.3, 1.0), "bilinear") | ratio, count=16, step=4)]

    @classmethod
    def for_image_size(cls, image_size: int, **overrides: Any) -> "SSLImageProcessor":
        """As transformers' `VJEPA2VideoProcessor` has it: a crop from 256/224 of the side at every size."""
        geometry = {
            "size": {"shortest_edge": int(image_size * 256 / 224)},
            "do_center_crop": True,
            "crop_size": {"height": image_size, "width": image_size},
        }
        return super().for_image_size(image_size, **{**geometry, **overrides})
