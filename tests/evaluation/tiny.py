"""A native encoder of one block."""

import torch
from transformers import ViTConfig, ViTModel


def tiny_vit(image_size: int = 16) -> ViTModel:
    """Always the same random weights; patches of 4 pixels."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=image_size,
        patch_size=4,
    )
    return ViTModel(config, add_pooling_layer=False)
