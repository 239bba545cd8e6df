"""Optimizers by name: fused AdamW and SGD of torch, and LARS, which torch does not have.

LARS: You et al. 2017 (arXiv 1708.03888). Published code bases mean three different updates by that name;
their learning rates hold for their own one only.

    w weight, g gradient, d weight decay, r trust coefficient x |w| / |gradient| (1 if either is zero)
    "tf"    (SimCLR)                  v <- momentum v + lr r (g + d w)          w <- w - v
    "moco"  (MoCo v3, BYOL, ...)      v <- momentum v + r (g + d w)             w <- w - lr v
    "larc"  (apex, SwAV, lightly)     as "moco", but r divides by |g| + d |w| + 1e-8, and d is 0 where r is 1
"tf" and "moco" differ whenever the learning rate changes: old steps in v keep the old rate, or get the new.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_ssl.modeling.shared.names import unknown_name_message

LARS_VARIANTS = ("tf", "moco", "larc")
OPTIMIZERS = ("adamw", "sgd", "lars")


class LARS(Optimizer):
    """SGD with momentum whose step per tensor is proportional to the norm of the tensor.

    Args:
        params: parameters or groups. A group with `exclude_from_adaptation` gets r = 1 (norms and biases; its
            `weight_decay` is whatever the group says, usually 0).
        lr: learning rate, >= 0.
        momentum: share of the old step, in [0, 1).
        weight_decay: added to the gradient as weight_decay x weight.
        trust_coefficient: step as a share of the weight's norm, > 0.
        variant: "tf", "moco" or "larc", see the head of this file.
        nesterov: look one momentum step ahead.

    Raises:
        ValueError: unknown `variant`, or a number out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        variant: str = "tf",
        nesterov: bool = False,
    ) -> None:
        if variant not in LARS_VARIANTS:
            raise ValueError(unknown_name_message("LARS variant", variant, LARS_VARIANTS))
        if lr < 0 or weight_decay < 0 or trust_coefficient <= 0:
            raise ValueError(
                "LARS needs lr >= 0, weight_decay >= 0 and trust_coefficient > 0, "
                f"got {lr}, {weight_decay} and {trust_coefficient}"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"optimizer momentum must lie in [0, 1), got {momentum}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "variant": variant,
            "nesterov": nesterov,
            "exclude_from_adaptation": False,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        change = _adapted_gradient(weight, group)
        # "tf" keeps steps in its buffer, the others gradients.
        inner_rate, outer_rate = (group["lr"], 1.0) if group["variant"] == "tf" else (1.0, group["lr"])
        change = change * inner_rate
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(change)
        if group["nesterov"]:
            buffer = change + buffer * group["momentum"]
        weight.sub_(buffer * outer_rate)


def _adapted_gradient(weight: Tensor, group: dict[str, Any]) -> Tensor:
    """r (g + d w) of the variant. Zero norms are handled on the device: looking at them would wait for it."""
    assert weight.grad is not None
    gradient, decay = weight.grad, group["weight_decay"]
    decayed = gradient.add(weight, alpha=decay)
    if group["exclude_from_adaptation"]:
        return decayed
    weight_norm = weight.norm()
    if group["variant"] == "larc":
        gradient_norm = gradient.norm()
        trust = group["trust_coefficient"] * weight_norm / (gradient_norm + decay * weight_norm + 1e-8)
        return torch.where((weight_norm > 0) & (gradient_norm > 0), trust * decayed, gradient)
    gradient_norm = decayed.norm()
    trust = group["trust_coefficient"] * weight_norm / gradient_norm
    return decayed * torch.where((weight_norm > 0) & (gradient_norm > 0), trust, torch.ones_like(trust))


def build_optimizer(
    name: str,
    groups: Iterable[dict[str, Any]],
    learning_rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    momentum: float = 0.9,
    nesterov: bool = False,
    trust_coefficient: float = 1e-3,
    lars_variant: str = "tf",
) -> Optimizer:
    """Optimizer over parameter groups.

    Args:
        name: "adamw", "sgd" or "lars".
        groups: dicts with `params` and, optionally, `weight_decay` (0), `lr_multiplier` (1, a factor on
            `learning_rate`) and `exclude_from_adaptation` (False, LARS only). Parameters that are not trained
            are left out, and groups without any as well. The keys stay in the optimizer's groups.
        learning_rate: rate as applied, of groups with multiplier 1.
        betas: AdamW's decay rates of the two moments.
        epsilon: AdamW's constant in the denominator.
        momentum: of SGD and LARS.
        nesterov: of SGD and LARS.
        trust_coefficient: of LARS.
        lars_variant: "tf", "moco" or "larc".

    Returns:
        AdamW and SGD in torch's fused form (several times faster than the default on CPU).

    Raises:
        ValueError: unknown `name`, or nothing to train.
    """
    if name not in OPTIMIZERS:
        raise ValueError(unknown_name_message("optimizer", name, OPTIMIZERS))
    prepared = [_prepared(group, learning_rate) for group in groups]
    prepared = [group for group in prepared if group["params"]]
    if not prepared:
        raise ValueError(f"{name} has nothing to train: no parameter of any group requires a gradient")
    if name == "adamw":
        return torch.optim.AdamW(prepared, lr=learning_rate, betas=betas, eps=epsilon, fused=True)
    if name == "sgd":
        return torch.optim.SGD(prepared, lr=learning_rate, momentum=momentum, nesterov=nesterov, fused=True)
    return LARS(
        prepared,
        lr=learning_rate,
        momentum=momentum,
        trust_coefficient=trust_coefficient,
        variant=lars_variant,
        nesterov=nesterov,
    )


def _prepared(group: dict[str, Any], learning_rate: float) -> dict[str, Any]:
    trained = [parameter for parameter in group["params"] if parameter.requires_grad]
    defaults = {"weight_decay": 0.0, "lr_multiplier": 1.0, "exclude_from_adaptation": False}
    group = defaults | group | {"params": trained}
    return group | {"lr": learning_rate * group["lr_multiplier"]}


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Bound the norm of every gradient by itself, all norms in one pass; the norm of all, before.

    The factor is that of `torch.nn.utils.clip_grad_norm_` for a single tensor, and DINO's `clip_gradients`.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, list(factors.unbind()))
    return norms.norm()
