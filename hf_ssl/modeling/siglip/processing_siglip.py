"""Processor of SigLIP: images and texts."""

from hf_ssl.modeling.shared.text_processing import SSLImageTextProcessor


class SigLIPProcessor(SSLImageTextProcessor):
    """Texts are padded to the full length and have no mask: the tower pools the last token, and sees all."""

    padding = "max_length"
    tokenizer_inputs = ("input_ids",)
