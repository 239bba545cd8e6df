"""Image processor of DINO."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import SSLImageProcessor, multi_crop_views


class DINOImageProcessor(SSLImageProcessor):
    """ImageNet normalisation, as the authors' `main_dino.py`."""

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """Two global views and eight local ones; the paper's long runs use ten, see the recipe `dino`."""
        return multi_crop_views(
            image_size, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), num_local_views=8
        )
