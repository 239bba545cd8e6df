"""Projection and prediction heads: stacks of Linear, BatchNorm and ReLU; and heads that end in prototypes.

The order of `layers` is that of the published code (Linear, norm, ReLU, ..., Linear, norm), so that their
checkpoints map by index.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_ssl.modeling.shared.initialization import set_weight_initialization
from hf_ssl.modeling.shared.losses import full_precision, normalize
from hf_ssl.modeling.shared.names import unknown_name_message
from hf_ssl.modeling.shared.prototypes import PrototypeWeights

LAST_NORMS = ("none", "affine", "scale", "plain")


class MLPHead(nn.Module):
    """Multi-layer perceptron between a feature and the space of a loss.

    Args:
        input_size: width of the feature.
        hidden_size: width of the layers between; unused with one layer.
        output_size: width of the result.
        num_layers: number of Linear layers, >= 1. All but the last are followed by ReLU.
        hidden_norm: BatchNorm with scale and shift before every ReLU.
        last_norm: BatchNorm after the last layer: "none", "affine" (scale and shift), "scale" (no shift),
            "plain" (neither).
        bias: every Linear layer has a bias.

    Raises:
        ValueError: unknown `last_norm`, or `num_layers` below 1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int,
        *,
        hidden_norm: bool,
        last_norm: str,
        bias: bool,
    ) -> None:
        super().__init__()
        if last_norm not in LAST_NORMS:
            raise ValueError(unknown_name_message("last_norm", last_norm, LAST_NORMS))
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        layers: list[nn.Module] = []
        width = input_size
        for _ in range(num_layers - 1):
            layers.append(nn.Linear(width, hidden_size, bias=bias))
            if hidden_norm:
                layers.append(nn.BatchNorm1d(hidden_size))
            layers.append(nn.ReLU())
            width = hidden_size
        layers.append(nn.Linear(width, output_size, bias=bias))
        if last_norm != "none":
            layers.append(_last_norm(output_size, last_norm))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, input_size) to (B, output_size)."""
        projections: Tensor = self.layers(features)
        return projections


def _last_norm(width: int, kind: str) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(width, affine=kind != "plain")
    if kind == "scale":
        norm.register_parameter("bias", None)
    return norm


class Prototypes(nn.Module):
    """K directions that a bottleneck vector is compared with: w_k = g_k v_k / |v_k| (weight normalisation).

    Kept as v and, only where it is trained, g, instead of through torch's parametrisation: the same numbers,
    but it can be copied and started on the meta device.

    Args:
        width: of a bottleneck vector.
        num_prototypes: K.
        train_scale: learn g; otherwise it is 1, so that every logit is a cosine.
    """

    def __init__(self, width: int, num_prototypes: int, *, train_scale: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, width))
        self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1)) if train_scale else None

    def initialize_parameters(self) -> None:
        """v as torch starts a Linear layer, g at 1."""
        init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))
        if self.weight_g is not None:
            init.ones_(self.weight_g)

    def weights(self) -> PrototypeWeights:
        """What the loss takes; in at least float32."""
        scale = None if self.weight_g is None else full_precision(self.weight_g)
        return PrototypeWeights(full_precision(self.weight_v), scale)


class PrototypeHead(nn.Module):
    """MLP with GELU to a unit vector, and the prototypes that it is compared with.

    Caron et al. 2021 (arXiv 2104.14294), appendix C. The logits are left to the loss, which never needs all
    of them at once.

    Args:
        input_size: width of the feature.
        hidden_size: width of the layers between; unused with one layer.
        bottleneck_size: width of the unit vector.
        num_prototypes: K.
        num_layers: number of Linear layers, >= 1.
        hidden_norm: BatchNorm before every GELU.
        train_scale: learn the length of every prototype.

    Raises:
        ValueError: `num_layers` below 1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bottleneck_size: int,
        num_prototypes: int,
        num_layers: int,
        *,
        hidden_norm: bool,
        train_scale: bool,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        layers: list[nn.Module] = []
        width = input_size
        for _ in range(num_layers - 1):
            layers.append(nn.Linear(width, hidden_size))
            if hidden_norm:
                layers.append(nn.BatchNorm1d(hidden_size))
            layers.append(nn.GELU())
            width = hidden_size
        layers.append(nn.Linear(width, bottleneck_size))
        self.layers = nn.Sequential(*layers)
        set_weight_initialization(self.layers, "trunc_normal")
        self.prototypes = Prototypes(bottleneck_size, num_prototypes, train_scale=train_scale)

    def forward(self, features: Tensor) -> Tensor:
        """Unit vectors (B, bottleneck_size) of features (B, input_size), in at least float32."""
        return normalize(self.layers(features))
