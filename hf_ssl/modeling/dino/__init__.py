"""DINO."""

from .configuration_dino import DINOConfig
from .image_processing_dino import DINOImageProcessor
from .modeling_dino import DINOForPreTraining, DINOModel

__all__ = ["DINOConfig", "DINOForPreTraining", "DINOImageProcessor", "DINOModel"]
