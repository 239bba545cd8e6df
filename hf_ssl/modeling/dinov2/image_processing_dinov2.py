"""Image processor of DINOv2."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import SSLImageProcessor, multi_crop_views


class DINOv2ImageProcessor(SSLImageProcessor):
    """ImageNet normalisation, as the authors' `augmentations.py`."""

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """Two global and eight local views, blurred as the released weights were trained.

        The authors' code hands 1 - p to a function that wants p: the first global view is never blurred and
        the second nearly always. The paper's (1.0, 0.1, 0.5) are in the recipe `dinov2_paper_blur`.
        """
        return multi_crop_views(
            image_size,
            global_scale=(0.32, 1.0),
            local_scale=(0.05, 0.32),
            num_local_views=8,
            blur_probabilities=(0.0, 0.9, 0.5),
        )
