"""SimCLR."""

from .configuration_simclr import SimCLRConfig
from .image_processing_simclr import SimCLRImageProcessor
from .modeling_simclr import SimCLRForPreTraining, SimCLRModel

__all__ = ["SimCLRConfig", "SimCLRForPreTraining", "SimCLRImageProcessor", "SimCLRModel"]
