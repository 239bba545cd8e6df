"""V-JEPA."""

from .configuration_vjepa import VJEPAConfig
from .image_processing_vjepa import VJEPAImageProcessor
from .modeling_vjepa import VJEPAForPreTraining, VJEPAModel

__all__ = ["VJEPAConfig", "VJEPAForPreTraining", "VJEPAImageProcessor", "VJEPAModel"]
