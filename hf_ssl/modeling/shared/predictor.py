"""A light transformer on fixed positions that predicts patches, with mask tokens or without.

Shape suffixes: N = patches, E = width of the predictor.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_ssl.modeling.shared.configuration import SSLViTConfig
from hf_ssl.modeling.shared.positions import resize_positions, sincos_positions, sincos_positions_of_clips
from hf_ssl.modeling.shared.vit import SSLViTLayers, set_vit_initialization


class PatchPredictor(nn.Module):
    """The parts of a predictor; a subclass puts them together in `forward`.

    Args:
        encoder: whose tokens are read; image, patch, norm epsilon and initialisation are taken from it.
        hidden_size: width, a multiple of 4 and of `num_attention_heads`.
        num_hidden_layers: blocks.
        num_attention_heads: of every block.
        output_size: values predicted for a patch.
        input_size: width of what is read; None: the encoder's.
        has_mask_token: whether patches are hidden from it.
    """

    def __init__(
        self,
        encoder: SSLViTConfig,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        output_size: int,
        input_size: int | None = None,
        has_mask_token: bool = True,
    ) -> None:
        super().__init__()
        self.config = SSLViTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            image_size=encoder.image_size,
            patch_size=encoder.patch_size,
            num_frames=encoder.num_frames,
            tubelet_size=encoder.tubelet_size,
            use_class_token=False,
            position_embedding_type=_positions_of(encoder),
            layer_norm_eps=encoder.layer_norm_eps,
            weight_initialization=encoder.weight_initialization,
        )
        self.embed = nn.Linear(input_size or encoder.hidden_size, hidden_size)
        if has_mask_token:
            self.mask_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.position_embeddings = (
            nn.Parameter(torch.empty(1, self.config.num_patches, hidden_size))
            if self.config.position_embedding_type != "rope"
            else None
        )
        self.layers = SSLViTLayers(self.config)
        self.layernorm = nn.LayerNorm(hidden_size, eps=encoder.layer_norm_eps)
        self.predict = nn.Linear(hidden_size, output_size)
        set_vit_initialization(self, self.config)

    @property
    def frozen_parameters(self) -> list[nn.Parameter]:
        """The fixed positions."""
        return [] if self.position_embeddings is None else [self.position_embeddings]

    def initialize_parameters(self) -> None:
        """Mask token and positions."""
        if hasattr(self, "mask_token"):
            init.normal_(self.mask_token, std=0.02)
        if self.position_embeddings is None:
            return
        width, side = self.config.hidden_size, self.config.grid_size
        if self.config.is_video:
            table = sincos_positions_of_clips(width, self.config.clip_grid)
        else:
            table = sincos_positions(width, side, side, first="column", class_token=False)
        init.copy_(self.position_embeddings, table.reshape(self.position_embeddings.shape))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions (1, N, E) of a grid of (rows, columns), resized where it is not the training grid."""
        trained = (self.config.grid_size, self.config.grid_size)
        assert self.position_embeddings is not None
        return resize_positions(self.position_embeddings, trained, grid, has_class_token=False)


def _positions_of(encoder: SSLViTConfig) -> str:
    if encoder.position_embedding_type == "rope":
        return "rope"
    return "sincos_row_first" if encoder.is_video else "sincos_column_first"
