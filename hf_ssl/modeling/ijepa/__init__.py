"""I-JEPA."""

from .configuration_ijepa import IJEPAConfig
from .image_processing_ijepa import IJEPAImageProcessor
from .modeling_ijepa import IJEPAForPreTraining, IJEPAModel

__all__ = ["IJEPAConfig", "IJEPAForPreTraining", "IJEPAImageProcessor", "IJEPAModel"]
