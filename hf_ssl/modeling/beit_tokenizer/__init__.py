"""The tokenizer of BEiT v2."""

from .configuration_beit_tokenizer import BEiTTokenizerConfig
from .image_processing_beit_tokenizer import BEiTTokenizerImageProcessor
from .modeling_beit_tokenizer import BEiTTokenizerForPreTraining, BEiTTokenizerModel

__all__ = [
    "BEiTTokenizerConfig",
    "BEiTTokenizerForPreTraining",
    "BEiTTokenizerImageProcessor",
    "BEiTTokenizerModel",
]
