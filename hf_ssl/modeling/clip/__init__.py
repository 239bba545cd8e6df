"""CLIP."""

from .configuration_clip import SSLCLIPConfig
from .image_processing_clip import SSLCLIPImageProcessor
from .modeling_clip import SSLCLIPForPreTraining, SSLCLIPModel
from .processing_clip import SSLCLIPProcessor

__all__ = [
    "SSLCLIPConfig",
    "SSLCLIPForPreTraining",
    "SSLCLIPImageProcessor",
    "SSLCLIPModel",
    "SSLCLIPProcessor",
]
