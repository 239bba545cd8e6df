"""The backbone of benchmarks in which every run should take a minute."""

from typing import Any


def small_vit(image_size: int) -> dict[str, Any]:
    """Settings of a ViT of four layers on patches of 8 x 8 pixels."""
    return {
        "model_type": "hf_ssl_vit",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "patch_size": 8,
        "image_size": image_size,
    }
