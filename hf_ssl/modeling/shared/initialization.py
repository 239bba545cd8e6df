"""Weight initialisation by rules that modules carry.

`from_pretrained` builds models on the meta device and asks `_init_weights` for every tensor that the
checkpoint lacks, so each module must be able to say how it starts. A module either has a method
`initialize_parameters`, or an attribute `weight_initialization` naming a rule of this file; without one
Linear and Conv layers start as torch starts them and norms at 1 and 0.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init


def set_weight_initialization(module: nn.Module, rule: str) -> None:
    """Let every Linear and convolution under `module` start by the named rule."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            layer.weight_initialization = rule  # type: ignore[assignment]


@torch.no_grad()
def initialize_module(module: nn.Module) -> None:
    """Initialise the tensors that `module` itself holds; tensors loaded from a checkpoint are left alone."""
    if hasattr(module, "initialize_parameters"):
        module.initialize_parameters()  # type: ignore[operator]
    elif isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        _initialize_linear(module, getattr(module, "weight_initialization", "torch"))
    elif isinstance(module, nn.LayerNorm) or hasattr(module, "running_mean"):
        _initialize_norm(module)


def _initialize_linear(layer: nn.Linear | nn.Conv2d | nn.Conv3d, rule: str) -> None:
    if rule == "torch":
        init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        if layer.bias is not None:
            bound = 1 / math.sqrt(layer.weight[0].numel())
            init.uniform_(layer.bias, -bound, bound)
        return
    if rule in ("xavier_uniform", "xavier_uniform_third"):
        # A patch embedding counts as the matrix (width, pixels of a patch), and the "third" of a joint
        # query-key-value matrix as part of the whole, as in code bases that keep the three in one Linear.
        outputs = layer.weight.shape[0] * (3 if rule.endswith("third") else 1)
        bound = math.sqrt(6 / (outputs + layer.weight[0].numel()))
        init.uniform_(layer.weight, -bound, bound)
    elif rule == "trunc_normal":
        init.trunc_normal_(layer.weight, std=0.02)
    elif rule == "trunc_normal_rescaled":  # in effect a std of 0.0108
        std = 0.02 * getattr(layer, "initialization_scale", 1.0)
        init.trunc_normal_(layer.weight, std=std, a=-std, b=std)
    elif rule == "normal_0.01":
        init.normal_(layer.weight, std=0.01)
    else:
        raise ValueError(f"unknown weight initialisation '{rule}'")
    if layer.bias is not None:
        init.zeros_(layer.bias)


def _initialize_norm(norm: nn.Module) -> None:
    for start, names in (
        (init.ones_, ("weight", "running_var")),
        (init.zeros_, ("bias", "running_mean", "num_batches_tracked")),
    ):
        for name in names:
            tensor = getattr(norm, name, None)
            if isinstance(tensor, Tensor):
                start(tensor)
