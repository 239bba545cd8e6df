"""The visual tokenizer of BEiT v2: an encoder whose patches are put onto a codebook.

Source: Peng et al. 2022 (arXiv 2208.06366), section 3.1; compared with the authors' `modeling_vqkd.py`.
Shape suffixes: B = images, N = patches, D = encoder width, d = width of a code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.codebook import Codebook
from hf_ssl.modeling.shared.initialization import set_weight_initialization
from hf_ssl.modeling.shared.losses import full_precision, normalize, without_autocast

# What stays in float32 whatever the model is loaded in.
CODE_TENSORS = r"\bhead\.(project\..+|codebook\.(vectors|cluster_size))$"


class CodeHead(nn.Module):
    """From patches to codes: two layers, in at least float32, and the codebook."""

    def __init__(self, width: int, num_codes: int, code_size: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_size))
        self.codebook = Codebook(num_codes, code_size)
        set_weight_initialization(self.project, "trunc_normal")

    def forward(self, patches_BND: Tensor) -> Tensor:
        """Unit vectors (B, N, d)."""
        with without_autocast(patches_BND):
            return normalize(self.project(full_precision(patches_BND)))


class VisualTokenizer(nn.Module):
    """An encoder and its codes.

    Args:
        backbone_config: of the encoder.
        num_codes: size of the vocabulary.
        code_size: d.
    """

    def __init__(self, backbone_config: PreTrainedConfig, num_codes: int, code_size: int) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone_config)
        self.head = CodeHead(self.backbone.hidden_size, num_codes, code_size)

    def vectors(self, pixel_values: Tensor) -> Tensor:
        """Unit vectors of all patches (B, N, d) before they are put onto codes."""
        return self.head(patch_features(self.backbone, pixel_values))

    @torch.no_grad()
    def tokens(self, pixel_values: Tensor) -> Tensor:
        """Index of the code of every patch (B, N) int64, of images normalised as in training."""
        vectors_BNd = self.vectors(pixel_values)
        return self.head.codebook.nearest(vectors_BNd.flatten(0, 1)).view(vectors_BNd.shape[:2])


def patch_features(backbone: Any, pixel_values: Tensor) -> Tensor:
    """Features of all places (B, N, D) in row-major order: a ViT's patches, or a CNN's last map."""
    features = backbone(pixel_values).last_hidden_state
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features[:, backbone.config.num_prefix_tokens :]


def resized(pixel_values: Tensor, side: int) -> Tensor:
    """Images (B, C, side, side), for an encoder of another image size."""
    if pixel_values.shape[-1] == side == pixel_values.shape[-2]:
        return pixel_values
    with without_autocast(pixel_values):
        return F.interpolate(pixel_values, (side, side), mode="bicubic", antialias=True)
