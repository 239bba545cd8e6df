"""MoCoV3."""

from .configuration_mocov3 import MoCoV3Config
from .image_processing_mocov3 import MoCoV3ImageProcessor
from .modeling_mocov3 import MoCoV3ForPreTraining, MoCoV3Model

__all__ = ["MoCoV3Config", "MoCoV3ForPreTraining", "MoCoV3ImageProcessor", "MoCoV3Model"]
