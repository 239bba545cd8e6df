"""CLIP: an image and its text find each other among the batch.

Source: Radford et al. 2021 (arXiv 2103.00020), section 2.3 and Fig. 3; compared with open_clip's `ClipLoss`.
Deliberate differences: the image tower is any backbone of this package, so a ViT has a bias in its patch
projection and no norm before its blocks; the text tower starts as the authors' code has it, but for biases,
which start at 0. transformers' own `CLIPTextModel` starts in another way.
Shape suffixes: B = pairs in this process, E = embedding width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from hf_ssl.modeling.shared.image_text import Projection, Similarity, SSLImageTextForPreTraining
from hf_ssl.modeling.shared.image_text_losses import symmetric_cross_entropy
from hf_ssl.modeling.shared.pretraining import SSLModel

from .configuration_clip import SSLCLIPConfig


class SSLCLIPModel(SSLModel):
    """The image tower, before its projection."""

    config_class = SSLCLIPConfig


class CLIPTextTower(CLIPTextModel):
    """transformers' text tower, causal and pooled at the end token, with the authors' initialisation."""

    def _init_weights(self, module: nn.Module) -> None:
        # Leaf by leaf: what holds no tensors itself is passed over when a checkpoint lacks its children's.
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self._std_of(module))
            init.zeros_(module.bias)
        elif isinstance(module, CLIPTextEmbeddings):
            init.normal_(module.token_embedding.weight, std=0.02)
            init.normal_(module.position_embedding.weight, std=0.01)
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def _std_of(self, linear: nn.Linear) -> float:
        width = self.config.hidden_size
        layers: Any = self.encoder.layers
        if any(linear is end for layer in layers for end in (layer.self_attn.out_proj, layer.mlp.fc2)):
            return float((2 * len(layers) * width) ** -0.5)
        is_expanding = linear.out_features > linear.in_features
        return float((2 * width if is_expanding else width) ** -0.5)


class SSLCLIPForPreTraining(SSLImageTextForPreTraining):
    """Image tower, text tower, their projections and the symmetric cross-entropy."""

    config_class = SSLCLIPConfig
    config: SSLCLIPConfig

    def build_image_head(self, backbone: nn.Module) -> nn.Module:
        """The image projection, or nothing where texts go into the image tower's space."""
        self._embedding_size: int = self.config.projection_size or backbone.hidden_size  # type: ignore
        if self.config.projection_size is None:
            return nn.Identity()
        return Projection(backbone.hidden_size, self._embedding_size)  # type: ignore[arg-type]

    def build_text_tower(self) -> None:
        """A causal transformer."""
        options = {**self.config.text_options, "projection_dim": self._embedding_size}
        self.text_tower = CLIPTextTower(CLIPTextConfig(**options))
        self.text_projection = Projection(self.config.text_hidden_size, self._embedding_size)
        self.similarity = Similarity(self.config.logit_scale_start, None)

    def contrast(self, image_BE: Tensor, text_BE: Tensor) -> Tensor:
        """Symmetric cross-entropy over the pairs of all processes."""
        return symmetric_cross_entropy(image_BE, text_BE, self.similarity.logit_scale)

    def end_step(self, updates: list[dict[str, Tensor]]) -> None:
        """Bound the scale, after the optimizer as the authors do."""
        self.similarity.logit_scale.clamp_(0, self.config.logit_scale_limit)

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Loss where pairs cannot be told apart, and the factor on cosines at the start."""
        return {
            "loss_at_start": math.log(num_images),
            "logit_scale_at_start": math.exp(self.config.logit_scale_start),
        }
