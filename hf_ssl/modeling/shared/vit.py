"""Vision Transformer backbone.

Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); options of MAE, MoCo v3, DINOv2 as named in
`SSLViTConfig`. Parameters are named as transformers' `ViTModel` names them in memory, so that an export
is a copy. Deliberate difference: visible tokens can be gathered before the patch projection
(`kept_index_BM`), which computes only what a masked encoder needs. Clips (num_frames > 1) have patches of
several frames and positions in time, as V-JEPA has them.
Shape suffixes in this file: B = images or clips, N = patches, M = visible patches, T = tokens (prefix and
patches), D = width.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_ssl.modeling.shared.configuration import LARGEST_RATE_PER_SAMPLE, SSLViTConfig
from hf_ssl.modeling.shared.initialization import set_weight_initialization
from hf_ssl.modeling.shared.losses import without_autocast
from hf_ssl.modeling.shared.patches import clip_grid, clip_patches, gather_pixel_patches, patch_grid
from hf_ssl.modeling.shared.positions import (
    Rotations,
    make_rotations,
    resize_positions,
    rotate,
    sincos_positions,
    sincos_positions_of_clips,
)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Attention as two matrix products; returns the weights. In bf16 on a CPU it beats the fused kernel."""
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    with without_autocast(weights):  # which would make float32 of them; half precision is summed in it anyway
        weights = weights.softmax(dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SSLViTPatchEmbeddings(nn.Module):
    """Linear projection of non-overlapping patches."""

    def __init__(self, config: SSLViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.tubelet_size = config.tubelet_size if config.is_video else None
        self.num_channels = config.num_channels
        size = (config.patch_size, config.patch_size)
        if self.tubelet_size is None:
            self.projection: nn.Conv2d | nn.Conv3d = nn.Conv2d(
                config.num_channels, config.hidden_size, size, stride=size
            )
        else:
            tube = (self.tubelet_size, *size)
            self.projection = nn.Conv3d(config.num_channels, config.hidden_size, tube, stride=tube)

    def forward(self, pixel_values: Tensor, kept_index_BM: Tensor | None = None) -> Tensor:
        """Embed all patches (B, N, D) or the chosen ones (B, M, D), in the order of the indices."""
        height, width = pixel_values.shape[-2:]
        if pixel_values.shape[-3] != self.num_channels:
            raise ValueError(f"expected {self.num_channels} channels, got {pixel_values.shape[-3]}")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image of {height}x{width} pixels is not a multiple of patch_size {self.patch_size}"
            )
        # Here and not in the model: with a float32 teacher the two branches of a half-precision model differ.
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        if self.tubelet_size is not None:
            pixels = clip_patches(pixel_values, self.tubelet_size, self.patch_size, kept_index_BM)
            return nn.functional.linear(pixels, self.projection.weight.flatten(1), self.projection.bias)
        if kept_index_BM is None:
            return self.projection(pixel_values).flatten(2).transpose(1, 2)
        pixels_BMP = gather_pixel_patches(pixel_values, self.patch_size, kept_index_BM)
        return nn.functional.linear(pixels_BMP, self.projection.weight.flatten(1), self.projection.bias)


class SSLViTEmbeddings(nn.Module):
    """Patch embeddings, positions, and the class, register and mask tokens."""

    def __init__(self, config: SSLViTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embeddings = SSLViTPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_class_token else None
        self.register_tokens = (
            nn.Parameter(torch.empty(1, config.num_register_tokens, width))
            if config.num_register_tokens
            else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_mask_token else None
        num_positions = config.num_patches + int(config.use_class_token)
        self.position_embeddings = (
            nn.Parameter(torch.empty(1, num_positions, width))
            if config.position_embedding_type not in ("none", "rope")
            else None
        )

    @property
    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that never train; `freeze_targets` reads this after every load."""
        frozen = []
        if self.position_embeddings is not None and self.config.position_embedding_type != "learned":
            frozen.append(self.position_embeddings)
        if self.config.freeze_patch_embedding:
            frozen += list(self.patch_embeddings.parameters())
        return frozen

    def initialize_parameters(self) -> None:
        """Start the bare parameters; see `shared/initialization.py`."""
        config = self.config
        start = _cut_normal if config.weight_initialization == "trunc_normal_rescaled" else init.normal_
        if self.cls_token is not None:
            start(self.cls_token, std=config.class_token_std)
        if self.register_tokens is not None:
            start(self.register_tokens, std=config.register_token_std)
        if self.mask_token is not None:
            start(self.mask_token, std=config.mask_token_std)
        if self.position_embeddings is None:
            return
        if config.position_embedding_type == "learned":
            init.trunc_normal_(self.position_embeddings, std=0.02)
        elif config.is_video:
            table = sincos_positions_of_clips(config.hidden_size, config.clip_grid)
            init.copy_(self.position_embeddings, table)
        else:
            first = "row" if config.position_embedding_type == "sincos_row_first" else "column"
            table = sincos_positions(
                config.hidden_size,
                config.grid_size,
                config.grid_size,
                first=first,
                class_token=config.use_class_token,
            )
            init.copy_(self.position_embeddings, table.reshape(self.position_embeddings.shape))

    def forward(
        self, pixel_values: Tensor, kept_index_BM: Tensor | None = None, bool_masked_pos: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, T, D): class token, registers, then patches (all, or those of `kept_index_BM`)."""
        grid = (
            pixel_values.shape[-2] // self.config.patch_size,
            pixel_values.shape[-1] // self.config.patch_size,
        )
        patches_BND = self.patch_embeddings(pixel_values, kept_index_BM)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError(
                    "bool_masked_pos needs a mask token; set use_mask_token=True in the backbone_config"
                )
            patches_BND = torch.where(
                bool_masked_pos.unsqueeze(-1), self.mask_token.to(patches_BND.dtype), patches_BND
            )
        class_token: Tensor | None = self.cls_token
        if self.position_embeddings is not None:
            self._check_clips(pixel_values)
            positions = self.positions(grid)
            patch_positions = positions[:, int(self.config.use_class_token) :]
            if kept_index_BM is not None:
                index = kept_index_BM.unsqueeze(-1).expand(-1, -1, patch_positions.shape[-1])
                patch_positions = patch_positions.expand(len(index), -1, -1).gather(1, index)
            patches_BND = patches_BND + patch_positions
            class_token = None if class_token is None else class_token + positions[:, :1]
        tokens = [patches_BND]
        if self.register_tokens is not None:
            tokens.insert(0, self.register_tokens.expand(len(patches_BND), -1, -1))
        if class_token is not None:
            tokens.insert(0, class_token.to(patches_BND.dtype).expand(len(patches_BND), -1, -1))
        return torch.cat(tokens, dim=1)

    def _check_clips(self, pixel_values: Tensor) -> None:
        config = self.config
        if not config.is_video:
            return
        if config.clip_grid != clip_grid(pixel_values, config.tubelet_size, config.patch_size):
            raise ValueError(
                f"fixed positions of clips are for {config.num_frames} frames of {config.image_size} px; "
                "train with rope for other lengths and sizes"
            )

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table (1, [1 +] N, D) for a patch grid, resized where it is not the training grid."""
        trained = (self.config.grid_size, self.config.grid_size)
        assert self.position_embeddings is not None
        if grid == trained or self.config.is_video:
            return self.position_embeddings
        return resize_positions(
            self.position_embeddings,
            trained,
            grid,
            has_class_token=self.config.use_class_token,
            offset=self.config.interpolate_offset,
            antialias=self.config.interpolate_antialias,
        )


def _cut_normal(tensor: Tensor, std: float) -> Tensor:
    return init.trunc_normal_(tensor, std=std, a=-std, b=std)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be asked for again to train
def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """Row of the table (2h - 1)(2w - 1) + 3 for every query and key, (T, T) int64, T = 1 + h w.

    Query minus key, rows before columns; the last three rows are class token to patch, patch to class token,
    class token to itself (BEiT's `modeling_finetune.py`).
    """
    rows, columns = grid
    place_2N = torch.stack(
        torch.meshgrid(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij")
    ).flatten(1)
    row_NN, column_NN = place_2N[:, :, None] - place_2N[:, None, :]
    num_offsets = (2 * rows - 1) * (2 * columns - 1)
    index = torch.empty(1 + rows * columns, 1 + rows * columns, dtype=torch.int64, device="cpu")
    index[1:, 1:] = (row_NN + rows - 1) * (2 * columns - 1) + column_NN + columns - 1
    index[0] = num_offsets
    index[:, 0] = num_offsets + 1
    index[0, 0] = num_offsets + 2
    return index


class SSLViTRelativePositionBias(nn.Module):
    """A number for every head and every offset between two patches (arXiv 2106.08254, section 2.2)."""

    def __init__(self, config: SSLViTConfig) -> None:
        super().__init__()
        self.side = 2 * config.grid_size - 1
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(self.side**2 + 3, config.num_attention_heads)
        )

    def initialize_parameters(self) -> None:
        """Start without any."""
        init.zeros_(self.relative_position_bias_table)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """What is added to the scores (1, heads, T, T)."""
        table = self.table_for(grid)
        index = relative_position_index(grid).to(table.device)
        return table[index].permute(2, 0, 1)[None]

    def table_for(self, grid: tuple[int, int]) -> Tensor:
        """The table for a grid of (rows, columns), resized from that of training as `BeitModel` does."""
        table: Tensor = self.relative_position_bias_table
        sides = (2 * grid[0] - 1, 2 * grid[1] - 1)
        if sides == (self.side, self.side):
            return table
        offsets = table[:-3].T.unflatten(1, (self.side, self.side))[None]
        resized = nn.functional.interpolate(offsets, size=sides, mode="bilinear")
        return torch.cat([resized[0].flatten(1).T, table[-3:]])


class SSLViTAttention(nn.Module):
    """Multi-head self-attention through transformers' attention interface (eager, SDPA, flash)."""

    is_causal = False

    def __init__(self, config: SSLViTConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias and config.use_key_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, tokens_BTD: Tensor, bias: Tensor | None = None, rotations: Rotations | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attended tokens (B, T, D), and the weights (B, heads, T, T) where the implementation has them.

        `bias` (1, heads, T, T) is added to the scores; queries and keys are turned by `rotations`.
        """
        shape = (*tokens_BTD.shape[:2], -1, self.head_dim)
        query = self.q_proj(tokens_BTD).view(shape).transpose(1, 2)
        key = self.k_proj(tokens_BTD).view(shape).transpose(1, 2)
        if rotations is not None:
            query, key = rotate(query, rotations), rotate(key, rotations)
        value = self.v_proj(tokens_BTD).view(shape).transpose(1, 2)
        attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        bias = None if bias is None else bias.to(query.dtype)
        attended, weights = attention(self, query, key, value, bias, dropout=0.0, scaling=self.scaling)
        return self.o_proj(attended.reshape(tokens_BTD.shape)), weights


class SSLViTMLP(nn.Module):
    """Two-layer MLP."""

    def __init__(self, config: SSLViTConfig) -> None:
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)  # type: ignore[arg-type]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)  # type: ignore[arg-type]

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Tokens of the same shape."""
        return self.fc2(self.activation_fn(self.fc1(tokens_BTD)))


class SSLViTSwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202) with the width rule and names of transformers' `Dinov2SwiGLUFFN`."""

    def __init__(self, config: SSLViTConfig) -> None:
        super().__init__()
        hidden = (int(config.intermediate_size * 2 / 3) + 7) // 8 * 8  # type: ignore[operator]
        self.gate_proj = nn.Linear(config.hidden_size, hidden)
        self.up_proj = nn.Linear(config.hidden_size, hidden)
        self.down_proj = nn.Linear(hidden, config.hidden_size)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Tokens of the same shape."""
        return self.down_proj(nn.functional.silu(self.gate_proj(tokens_BTD)) * self.up_proj(tokens_BTD))


class SSLViTLayerScale(nn.Module):
    """Learned factor per channel (arXiv 2103.17239)."""

    def __init__(self, config: SSLViTConfig) -> None:
        super().__init__()
        self.start = config.layer_scale_value
        self.lambda1 = nn.Parameter(torch.empty(config.hidden_size))

    def initialize_parameters(self) -> None:
        """Start at the configured value."""
        init.constant_(self.lambda1, self.start)  # type: ignore[arg-type]

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Tokens of the same shape."""
        return tokens_BTD * self.lambda1


class SSLViTDropPath(nn.Module):
    """Residual connection with stochastic depth per sample (arXiv 1603.09382; the subset form of DINOv2).

    The kept samples' branch is scaled so that its expectation is that of all samples.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, tokens_BTD: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """tokens + branch(tokens); while training without the branch for some samples."""
        if not self.training or self.rate == 0:
            return tokens_BTD + branch(tokens_BTD)
        num_samples, keep = len(tokens_BTD), 1 - self.rate
        if self.rate <= LARGEST_RATE_PER_SAMPLE:
            kept = tokens_BTD.new_empty(num_samples, 1, 1).bernoulli_(keep)
            return tokens_BTD + branch(tokens_BTD) * (kept / keep)
        num_kept = max(int(num_samples * keep), 1)
        kept_index = torch.randperm(num_samples, device=tokens_BTD.device)[:num_kept]
        change = branch(tokens_BTD[kept_index]).to(tokens_BTD.dtype)
        return tokens_BTD.index_add(0, kept_index, change, alpha=num_samples / num_kept)


class SSLViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: SSLViTConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SSLViTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SSLViTSwiGLU(config) if config.use_swiglu_ffn else SSLViTMLP(config)
        scaled = config.layer_scale_value is not None
        self.layer_scale1 = SSLViTLayerScale(config) if scaled else nn.Identity()
        self.layer_scale2 = SSLViTLayerScale(config) if scaled else nn.Identity()
        self.drop_path = SSLViTDropPath(drop_path_rate)

    def forward(
        self, tokens_BTD: Tensor, bias: Tensor | None = None, rotations: Rotations | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, D) and the attention weights (of the samples kept), if there are any."""
        weights: list[Tensor | None] = []

        def attend(tokens: Tensor) -> Tensor:
            attended, attention = self.attention(self.layernorm_before(tokens), bias, rotations)
            weights.append(attention)
            return self.layer_scale1(attended)

        def transform(tokens: Tensor) -> Tensor:
            return self.layer_scale2(self.mlp(self.layernorm_after(tokens)))

        tokens_BTD = self.drop_path(self.drop_path(tokens_BTD, attend), transform)
        return tokens_BTD, weights[0]


class SSLViTLayers(nn.ModuleList):
    """A stack of blocks, as the encoder and the decoders of masked methods use it."""

    def __init__(self, config: SSLViTConfig) -> None:
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        if config.drop_path_uniform:
            rates = [config.drop_path_rate] * depth
        super().__init__(SSLViTLayer(config, rate) for rate in rates)

    def run(
        self, tokens_BTD: Tensor, bias: Tensor | None = None, rotations: Rotations | None = None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Tokens after every block, the input first, and the attention weights of every block."""
        states, weights = [tokens_BTD], []
        for layer in self:
            tokens_BTD, attention = layer(tokens_BTD, bias, rotations)
            states.append(tokens_BTD)
            weights.append(attention)
        return states, weights


def set_vit_initialization(module: nn.Module, config: SSLViTConfig) -> None:
    """Let the Linears of blocks and embeddings start as `config.weight_initialization` says."""
    joint = config.weight_initialization == "xavier_uniform_joint_qkv"
    rules = {"xavier_uniform_joint_qkv": "xavier_uniform", "trunc_normal_linears": "trunc_normal"}
    rule = config.weight_initialization
    set_weight_initialization(module, rules.get(rule, rule))
    if rule == "trunc_normal_linears":
        for embeddings in module.modules():
            if isinstance(embeddings, SSLViTPatchEmbeddings):
                set_weight_initialization(embeddings, "torch")
    for layers in module.modules():
        if rule == "trunc_normal_rescaled" and isinstance(layers, SSLViTLayers):
            _rescale_branches(layers)
    for attention in module.modules():
        if joint and isinstance(attention, SSLViTAttention):
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                set_weight_initialization(projection, "xavier_uniform_third")


def _rescale_branches(layers: SSLViTLayers) -> None:
    for index, layer in enumerate(layers, 1):
        for name, linear in layer.named_modules():
            if name.endswith(("o_proj", "fc2", "down_proj")):
                linear.initialization_scale = 1 / math.sqrt(2 * index)


class SSLViTBackbone(nn.Module):
    """The whole encoder: embeddings, blocks, final norm."""

    def __init__(self, config: SSLViTConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.embeddings = SSLViTEmbeddings(config)
        has_bias = config.use_shared_relative_position_bias
        self.shared_position_bias = SSLViTRelativePositionBias(config) if has_bias else None
        self.layers = SSLViTLayers(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        set_vit_initialization(self, config)

    def forward(
        self,
        pixel_values: Tensor,
        kept_index: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPooling:
        """Encode images or clips.

        Args:
            pixel_values: (B, C, H, W), normalised; H and W are multiples of the patch. Of a backbone of clips
                (B, T, C, H, W), T a multiple of the tubelet; an image (B, C, H, W) is a still clip.
            kept_index: (B, M) int64, the patches to encode; None encodes all.
            bool_masked_pos: (B, N) bool, True = replaced by the mask token.
            output_hidden_states: also return the tokens before the final norm, one tensor per block.
            output_attentions: also return attention weights; needs the eager implementation.

        Returns:
            `last_hidden_state` (B, T, D) after the final norm; `pooler_output` (B, D): the class token, or
            the mean of the patch tokens where there is none.

        Raises:
            ValueError: size or channels do not fit; attention weights asked of another implementation;
                patches chosen of a ViT with relative positions, which has them for all.
        """
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError('attention weights need model.set_attn_implementation("eager")')
        bias, rotations = None, None
        if self.config.is_video and pixel_values.dim() == 4:
            pixel_values = pixel_values[:, None].expand(-1, self.config.tubelet_size, -1, -1, -1)
        if self.config.position_embedding_type == "rope":
            rotations = self.rotations(pixel_values, kept_index)
        if self.shared_position_bias is not None:
            if kept_index is not None:
                raise ValueError("kept_index and use_shared_relative_position_bias exclude each other")
            bias = self.shared_position_bias(patch_grid(pixel_values, self.config.patch_size))
        tokens_BTD = self.embeddings(pixel_values, kept_index, bool_masked_pos)
        states, weights = self.layers.run(tokens_BTD, bias, rotations)
        tokens_BTD = self.layernorm(states[-1])
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens_BTD,
            pooler_output=tokens_BTD[:, 0] if self.config.use_class_token else self.patch_mean(tokens_BTD),
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,  # type: ignore[arg-type]
        )

    def rotations(self, pixel_values: Tensor, kept_index: Tensor | None) -> Rotations:
        """Turns of the patches of images or clips, all or the chosen ones."""
        grid = (1, *patch_grid(pixel_values, self.config.patch_size))
        if self.config.is_video:
            grid = clip_grid(pixel_values, self.config.tubelet_size, self.config.patch_size)
        if kept_index is None:
            kept_index = torch.arange(math.prod(grid), device=pixel_values.device)[None]
        return make_rotations(kept_index, grid, self.config.hidden_size // self.config.num_attention_heads)

    def learning_rate_multipliers(
        self, layer_decay: float, patch_embedding: float
    ) -> Iterator[tuple[str, float]]:
        """Factor on the learning rate of every parameter: one `layer_decay` for each layer above it.

        The final norm has 1, the last block `layer_decay`, all embeddings the power depth + 1, the patch
        projection also the factor `patch_embedding` (DINOv2's `param_groups.py`).
        """
        depth = len(self.layers)
        for name, _ in self.named_parameters():
            layers_above = 0
            if name.startswith("embeddings."):
                layers_above = depth + 1
            elif name.startswith("layers."):
                layers_above = depth - int(name.split(".")[1])
            factor = patch_embedding if name.startswith("embeddings.patch_embeddings.") else 1.0
            yield name, factor * layer_decay**layers_above

    def patch_mean(self, tokens_BTD: Tensor) -> Tensor:
        """Mean of the patch tokens (B, D)."""
        return tokens_BTD[:, self.config.num_prefix_tokens :].mean(dim=1)
