"""BEiT."""

from .configuration_beit import BEiTConfig
from .image_processing_beit import BEiTImageProcessor
from .modeling_beit import BEiTForPreTraining, BEiTModel

__all__ = ["BEiTConfig", "BEiTForPreTraining", "BEiTImageProcessor", "BEiTModel"]
