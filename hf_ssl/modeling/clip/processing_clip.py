"""Processor of CLIP: images and texts."""

from hf_ssl.modeling.shared.text_processing import SSLImageTextProcessor


class SSLCLIPProcessor(SSLImageTextProcessor):
    """Texts are padded to the longest of a batch: a causal tower pooled at the end token sees no padding."""
