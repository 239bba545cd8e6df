"""Image processor of iBOT."""

from typing import Any

from hf_ssl.modeling.shared.image_processing import SSLImageProcessor, multi_crop_views


class iBOTImageProcessor(SSLImageProcessor):  # noqa: N801  (the paper's spelling)
    """ImageNet normalisation, as the authors' `main_ibot.py`."""

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """Two global and ten local views, as the published runs; the code's own default has no local ones."""
        return multi_crop_views(
            image_size, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25), num_local_views=10
        )
