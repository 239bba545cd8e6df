"""iBOT."""

from .configuration_ibot import iBOTConfig
from .image_processing_ibot import iBOTImageProcessor
from .modeling_ibot import iBOTForPreTraining, iBOTModel

__all__ = ["iBOTConfig", "iBOTForPreTraining", "iBOTImageProcessor", "iBOTModel"]
