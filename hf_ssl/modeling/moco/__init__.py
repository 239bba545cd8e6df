"""MoCo."""

from .configuration_moco import MoCoConfig
from .image_processing_moco import MoCoImageProcessor
from .modeling_moco import MoCoForPreTraining, MoCoModel

__all__ = ["MoCoConfig", "MoCoForPreTraining", "MoCoImageProcessor", "MoCoModel"]
