"""SigLIP: each image with each text is a yes or no of its own.

Source: Zhai et al. 2023 (arXiv 2303.15343), Algorithm 1; compared with open_clip's `SigLipLoss` and the
authors' `vit.py`. The embedding is as wide as the image tower, and both sides have no further projection.
Deliberate difference: an image tower with a class token, or a CNN, is taken with its own pooled output.
Shape suffixes: B = pairs in this process, T = tokens, L = tokens of a text, D = width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import SiglipTextConfig, SiglipTextModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_ssl.modeling.shared.image_text import Similarity, SSLImageTextForPreTraining
from hf_ssl.modeling.shared.image_text_losses import pairwise_sigmoid_loss
from hf_ssl.modeling.shared.pretraining import SSLModel

from .configuration_siglip import SigLIPConfig


class SigLIPModel(SSLModel):
    """The image tower, before its pooling by attention."""

    config_class = SigLIPConfig


class MultiheadPooling(nn.Module):
    """A learned query attends to all patches, then an MLP beside it; names as in `SiglipVisionModel`."""

    def __init__(self, width: int, num_heads: int, hidden_width: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention = PatchReader(width, num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.mlp = PoolingMLP(width, hidden_width)

    def initialize_parameters(self) -> None:
        """The authors' start of the query."""
        init.xavier_uniform_(self.probe)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Pooled tokens (B, D)."""
        probe_B1D = self.probe.expand(len(tokens_BTD), -1, -1)
        pooled_B1D = self.attention(probe_B1D, tokens_BTD, tokens_BTD, need_weights=False)[0]
        return (pooled_B1D + self.mlp(self.layernorm(pooled_B1D)))[:, 0]


class PatchReader(nn.MultiheadAttention):
    """torch's attention with the authors' initialisation."""

    def initialize_parameters(self) -> None:
        """Xavier for queries, keys and values each, not for the joint matrix; biases of 0."""
        bound = math.sqrt(3 / self.embed_dim)
        init.uniform_(self.in_proj_weight, -bound, bound)
        init.zeros_(self.in_proj_bias)
        init.xavier_uniform_(self.out_proj.weight)
        init.zeros_(self.out_proj.bias)


class PoolingMLP(nn.Module):
    """Two-layer MLP."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)
        for layer in (self.fc1, self.fc2):
            layer.weight_initialization = "xavier_uniform"  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Values of the same shape."""
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class SigLIPTextTower(SiglipTextModel):
    """transformers' text tower: no causal mask, pooled at the last token."""

    def _init_weights(self, module: nn.Module) -> None:
        # Leaf by leaf: what holds no tensors itself is passed over when a checkpoint lacks its children's.
        if isinstance(module, nn.Linear) and module is not self.head:
            init.xavier_uniform_(module.weight)
            is_mlp = module.in_features != module.out_features
            init.normal_(module.bias, std=1e-6) if is_mlp else init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class SigLIPForPreTraining(SSLImageTextForPreTraining):
    """Image tower, text tower and the pairwise sigmoid loss."""

    config_class = SigLIPConfig
    config: SigLIPConfig

    def build_image_head(self, backbone: nn.Module) -> nn.Module:
        """Pooling by attention, or nothing."""
        if not self.config.pools_by_attention:
            return nn.Identity()
        vit = self.config.encoder_config
        return MultiheadPooling(
            vit.hidden_size,
            vit.num_attention_heads,
            vit.intermediate_size,  # type: ignore[arg-type]
            vit.layer_norm_eps,
        )

    def head_input(self, outputs: BaseModelOutputWithPooling) -> Tensor:
        """All patches, or the tower's own pooled output."""
        tokens_BTD: Tensor = outputs.last_hidden_state  # type: ignore[assignment]
        return tokens_BTD if self.config.pools_by_attention else super().head_input(outputs)

    def build_text_tower(self) -> None:
        """A transformer that sees the whole text; its own head maps the last token into the image space."""
        width: Any = self.student.backbone.hidden_size
        options = {**self.config.text_options, "projection_size": width, "hidden_act": "gelu_pytorch_tanh"}
        self.text_tower = SigLIPTextTower(SiglipTextConfig(**options))
        self.text_projection = nn.Identity()
        self.similarity = Similarity(self.config.logit_scale_start, self.config.logit_bias_start)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Embed texts (B, L), which are padded to `text_max_length`, as the last token is what is pooled.

        Raises:
            ValueError: texts of another length, or a mask: padding is seen in training, and must be here.
        """
        if attention_mask is not None or input_ids.shape[1] != self.config.text_max_length:
            raise ValueError(
                f"texts must be padded to text_max_length {self.config.text_max_length} and have no "
                f"attention_mask, got {input_ids.shape[1]} tokens; use SigLIPProcessor.tokenize"
            )
        return super().get_text_features(input_ids)

    def contrast(self, image_BE: Tensor, text_BE: Tensor) -> Tensor:
        """Sigmoid loss over all pairs of all processes."""
        return pairwise_sigmoid_loss(
            image_BE,
            text_BE,
            self.similarity.logit_scale,
            self.similarity.logit_bias,  # type: ignore
        )

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Loss where cosines are 0, and the factor on cosines at the start."""
        bias = self.config.logit_bias_start
        positive, negative = math.log1p(math.exp(-bias)), math.log1p(math.exp(bias))
        return {
            "loss_at_start": positive + (num_images - 1) * negative,
            "logit_scale_at_start": math.exp(self.config.logit_scale_start),
        }
