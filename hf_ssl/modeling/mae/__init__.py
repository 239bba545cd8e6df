"""MAE."""

from .configuration_mae import MAEConfig
from .image_processing_mae import MAEImageProcessor
from .modeling_mae import MAEForPreTraining, MAEModel

__all__ = ["MAEConfig", "MAEForPreTraining", "MAEImageProcessor", "MAEModel"]
