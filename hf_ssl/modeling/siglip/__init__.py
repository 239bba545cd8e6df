"""SigLIP."""

from .configuration_siglip import SigLIPConfig
from .image_processing_siglip import SigLIPImageProcessor
from .modeling_siglip import SigLIPForPreTraining, SigLIPModel
from .processing_siglip import SigLIPProcessor

__all__ = ["SigLIPConfig", "SigLIPForPreTraining", "SigLIPImageProcessor", "SigLIPModel", "SigLIPProcessor"]
