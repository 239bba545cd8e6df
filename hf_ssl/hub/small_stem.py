"""The small-image stem of our ResNets (3x3 convolution, no pooling) rewritten for stock timm.

timm's ResNets start with a 7x7 convolution of stride 2 and pooling of stride 2. The input is enlarged by
repeating pixels, the 3x3 kernel is spread over the 7x7 so that its taps meet three neighbouring original
pixels, and the pooling becomes the convolution of timm's `replace_stem_pool`, which picks single positions:

    stride 1: input 4x, taps 0, 3, 6, picks position 2i + 1: enlarged pixels 4i - 1, 4i + 2, 4i + 5
    stride 2: input 2x, taps 1, 3, 5, picks position 2i:     enlarged pixels 4i - 2, 4i, 4i + 2

which are the original pixels i - 1, i, i + 1 (stride 1) and 2i - 1, 2i, 2i + 1 (stride 2). Outside the image
both read zeros. The norm and the ReLU after that convolution change nothing.
Shape suffix in this file: C = channels of the stem.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

ENLARGEMENT = {0: 1, 1: 4, 2: 2}  # by small_stem_stride
_KERNEL_TAPS = {1: (0, 3, 6), 2: (1, 3, 5)}
_POOL_TAP = {1: 2, 2: 1}
_SMALLEST_VARIANCE = 1e-4  # of a channel that is never active


@torch.no_grad()
def rewrite_small_stem(own: Any, stock: Any, stride: int) -> dict[str, Tensor]:
    """Tensors that let the stock stem compute ours on the enlarged image.

    Args:
        own: our network: `conv1` is the 3x3 convolution, `bn1` its norm.
        stock: timm's network, built with `replace_stem_pool=True`.
        stride: of our 3x3 convolution, 1 or 2.

    Returns:
        `conv1.weight` and the tensors of `maxpool`, as the stock network names them.

    Raises:
        ValueError: the stock stem has other layers than convolution, BatchNorm and ReLU.
    """
    pool, norm = _stem_pool(stock)
    kernel = torch.zeros_like(stock.conv1.weight)
    taps = torch.tensor(_KERNEL_TAPS[stride])
    kernel[:, :, taps[:, None], taps[None, :]] = own.conv1.weight
    pick = _picking_kernel(pool.weight, stride)
    mean_C, variance_C = _moments_after_relu(own.bn1.weight, own.bn1.bias)
    weight_C, variance_C = _identity_norm(mean_C, variance_C, norm.eps)
    return {
        "conv1.weight": kernel,
        "maxpool.0.weight": pick,
        "maxpool.1.weight": weight_C,
        "maxpool.1.bias": mean_C,
        "maxpool.1.running_mean": mean_C,
        "maxpool.1.running_var": variance_C,
        "maxpool.1.num_batches_tracked": torch.zeros((), dtype=torch.long),
    }


def restore_small_stem(state: dict[str, Tensor], stride: int) -> dict[str, Tensor]:
    """Undo `rewrite_small_stem`: our tensors from those of a stock timm network; exact.

    Args:
        state: tensors of the stock network, as `rewrite_small_stem` left them.
        stride: of our 3x3 convolution, 1 or 2.

    Raises:
        ValueError: another stem, or one that was trained after the export: it computes what ours cannot.
    """
    kernel, pick = state["conv1.weight"], state.get("maxpool.0.weight")
    taps = torch.tensor(_KERNEL_TAPS[stride])
    is_ours = pick is not None and kernel.shape[-1] == 7 and torch.equal(pick, _picking_kernel(pick, stride))
    if is_ours:
        small = kernel[:, :, taps[:, None], taps[None, :]].clone()
        spread = torch.zeros_like(kernel)
        spread[:, :, taps[:, None], taps[None, :]] = small
        is_ours = torch.equal(spread, kernel)
    if not is_ours:
        raise ValueError(
            f"its stem was not exported from a small stem of stride {stride}, or was trained since; give the "
            "run it comes from, or small_stem_stride=0 and larger images"
        )
    rest = {name: value for name, value in state.items() if not name.startswith("maxpool.")}
    return {**rest, "conv1.weight": small}


def _picking_kernel(like: Tensor, stride: int) -> Tensor:
    """Convolution kernel that picks single positions, one a channel."""
    pick = torch.zeros_like(like)
    channels = torch.arange(len(pick))
    pick[channels, channels, _POOL_TAP[stride], _POOL_TAP[stride]] = 1
    return pick


def _stem_pool(stock: Any) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    layers = list(stock.maxpool) if isinstance(stock.maxpool, nn.Sequential) else [stock.maxpool]
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
    if len(layers) != 3 or not all(map(isinstance, layers, kinds)) or layers[0].stride != (2, 2):
        kinds_found = ", ".join(type(layer).__name__ for layer in layers)
        raise ValueError(
            f"the small stem lands in timm only with BatchNorm, ReLU and no aa_layer, got {kinds_found}; "
            "leave norm_layer, act_layer and aa_layer out of model_args"
        )
    return layers[0], layers[1]  # type: ignore[return-value]


def _moments_after_relu(weight_C: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of relu(x), x normal with mean `bias_C` and deviation `weight_C` as a norm leaves it.

    With these as its statistics the added norm is an identity in eval mode and nearly one in training mode,
    where an ordinary identity (mean 0, variance 1) would cut away half of the features.
    """
    mean, deviation = bias_C.double(), weight_C.double().abs().clamp_min(1e-6)
    ratio = mean / deviation
    density = torch.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    probability = torch.special.ndtr(ratio)
    rectified = mean * probability + deviation * density
    square = (mean**2 + deviation**2) * probability + mean * deviation * density
    return rectified.float(), (square - rectified**2).clamp_min(_SMALLEST_VARIANCE).float()


def _identity_norm(mean_C: Tensor, variance_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Weight and variance of a norm that, with `mean_C` as mean and bias, returns exactly its input."""
    probe_BCHW = 4 * torch.rand(8, len(mean_C), 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(100):  # one channel in seven is off by a rounding: its variance moves to the next float
        weight_C = torch.sqrt(variance_C + eps)
        normed_BCHW = nn.functional.batch_norm(probe_BCHW, mean_C, variance_C, weight_C, mean_C, eps=eps)
        is_off_C = (normed_BCHW != probe_BCHW).transpose(0, 1).flatten(1).any(dim=1)
        if not is_off_C.any():
            break
        variance_C = torch.where(is_off_C, variance_C.nextafter(torch.tensor(torch.inf)), variance_C)
    return weight_C, variance_C
