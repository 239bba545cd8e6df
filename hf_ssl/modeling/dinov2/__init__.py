"""DINOv2."""

from .configuration_dinov2 import DINOv2Config
from .image_processing_dinov2 import DINOv2ImageProcessor
from .modeling_dinov2 import DINOv2ForPreTraining, DINOv2Model

__all__ = ["DINOv2Config", "DINOv2ForPreTraining", "DINOv2ImageProcessor", "DINOv2Model"]
