"""The same view of many images of one small size at once: matrix products and masked steps instead of loops.

Values are whole numbers from 0 to 255 in float32, rounded after every operation as Pillow rounds, so colour
operations equal those of `pixels.py`; crop and resize differ in few values, by one level.
Shape suffixes: B = images, C = 3, H, W = pixels of the image, S = side of the view, K = pixels of one axis.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from hf_ssl.data.pixels import gaussian_taps, reflected_indices
from hf_ssl.data.view_draws import ViewParameters

MAX_BATCHED_SIDE = 96  # larger images are faster one by one
_CHUNK = 256  # images; a chunk of 32 pixels per side stays in the processor's cache


def make_views(images_BHWC: Tensor, parameters: Sequence[ViewParameters]) -> Tensor:
    """Makes one view of every image.

    Args:
        images_BHWC: uint8.
        parameters: one per image, of one size and interpolation.

    Returns:
        uint8 (B, 3, S, S).
    """
    starts = range(0, len(parameters), _CHUNK)
    return torch.cat([_make_chunk(images_BHWC[s : s + _CHUNK], parameters[s : s + _CHUNK]) for s in starts])


def _make_chunk(images_BHWC: Tensor, parameters: Sequence[ViewParameters]) -> Tensor:
    views_BCSS = _crop_and_resize(images_BHWC, parameters)
    # A flip changes no other operation's result, so it is part of the resize; the others keep their order.
    remaining = [[step for step in p.steps if step.operation != "horizontal_flip"] for p in parameters]
    for position in range(max(map(len, remaining), default=0)):
        groups: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
        for index, steps in enumerate(remaining):
            if position < len(steps):
                operation, value = steps[position]
                groups[operation][0].append(index)
                groups[operation][1].append(value)
        for operation, (indices, values) in groups.items():
            rows = torch.tensor(indices)
            changed = _OPERATIONS[operation](views_BCSS[rows], torch.tensor(values)[:, None, None, None])
            views_BCSS.index_copy_(0, rows, changed)
    return views_BCSS.to(torch.uint8)


def _crop_and_resize(images_BHWC: Tensor, parameters: Sequence[ViewParameters]) -> Tensor:
    count, height, width, _ = images_BHWC.shape
    size, interpolation = parameters[0].size, parameters[0].interpolation
    boxes = torch.tensor([p.crop for p in parameters], dtype=torch.float32)
    rows_BSH = resize_matrices(boxes[:, 0], boxes[:, 2], height, size, interpolation)
    is_flipped = torch.tensor(
        [any(step.operation == "horizontal_flip" for step in p.steps) for p in parameters]
    )
    columns_BSW = resize_matrices(boxes[:, 1], boxes[:, 3], width, size, interpolation, is_flipped)
    planes = images_BHWC.permute(0, 3, 1, 2).float().reshape(count, 3 * height, width)
    # Rounded between the axes too, as Pillow and torch do on uint8: bicubic weights overshoot the range.
    narrow = _round(planes @ columns_BSW.transpose(1, 2)).reshape(count, 3, height, size)
    return _round(rows_BSH[:, None] @ narrow)


def _round(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)  # halves go up, as they do in whole-number arithmetic


def resize_matrices(
    start_B: Tensor,
    length_B: Tensor,
    side: int,
    size: int,
    interpolation: str,
    is_flipped_B: Tensor | None = None,
) -> Tensor:
    """Matrices (B, S, K) that cut [start, start + length) out of an axis of K pixels and resize it."""
    scale = (length_B / size)[:, None, None]
    output = torch.arange(size).expand(len(start_B), -1)
    if is_flipped_B is not None:
        output = output + is_flipped_B[:, None] * (size - 1 - 2 * output)
    middle = (output + 0.5)[:, :, None] * scale
    pixel = (torch.arange(side) + 0.5) - start_B[:, None]  # in the crop's own coordinates
    distance = ((pixel[:, None, :] - middle) / scale.clamp_min(1.0)).abs_()
    if interpolation == "bilinear":
        weights = (1 - distance).clamp_min_(0)
    else:  # Keys' cubic with a = -0.5
        near = (1.5 * distance - 2.5) * distance.square() + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights *= ((pixel > 0) & (pixel < length_B[:, None]))[:, None, :]
    return weights / weights.sum(dim=2, keepdim=True)


# Operations: views (B, 3, S, S) and values (B, 1, 1, 1) to new views; Pillow's rules in whole numbers.


def _gray(views: Tensor) -> Tensor:
    red, green, blue = views.unbind(1)
    # Below 2 ** 24, where float32 still holds every whole number.
    weighted = (19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768)
    return weighted.div_(65536).floor_()[:, None]


def _blend(base: Tensor, views: Tensor, factor: Tensor) -> Tensor:
    return (views - base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def _brightness(views: Tensor, factor: Tensor) -> Tensor:
    return (views * factor).clamp_(0, 255).floor_()


def _contrast(views: Tensor, factor: Tensor) -> Tensor:
    mean = _gray(views).double().mean(dim=(1, 2, 3), keepdim=True)
    return _blend((mean + 0.5).floor().float(), views, factor)


def _saturation(views: Tensor, factor: Tensor) -> Tensor:
    return _blend(_gray(views), views, factor)


def _grayscale(views: Tensor, _value: Tensor) -> Tensor:
    return _gray(views).expand_as(views)


def _solarize(views: Tensor, threshold: Tensor) -> Tensor:
    return views + (views >= threshold) * (255 - 2 * views)


def _hue(views: Tensor, turns: Tensor) -> Tensor:
    red, green, blue = (channel.contiguous() for channel in views.unbind(1))
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # (next channel - the one after it) of the largest channel, each largest channel in a range of its own.
    # Chosen by products and read with `index_select`: `where` and indexing take several times as long.
    difference = (red - green).add_(1022)
    difference.addcmul_((green == value).float(), (blue - red).add_(511).sub_(difference))
    difference.addcmul_((red == value).float(), (green - blue).sub_(difference))
    hue_table, saturation_table = _hsv_tables()
    hue = hue_table.index_select(0, (difference + 255).mul_(256).add_(chroma).int().flatten())
    saturation = saturation_table.index_select(0, (value * 256).add_(chroma).int().flatten()).view_as(value)
    shift = (turns.double() * 255).int()[:, :, 0]  # cut off, as Pillow does
    turned = (hue.view_as(value) + shift).bitwise_and_(255).flatten()
    lacks = [weights.index_select(0, turned).view_as(value).mul_(saturation) for weights in _hue_weights()]
    return torch.stack([lack.neg_().add_(1).mul_(value) for lack in lacks], dim=1).add_(0.5).floor_()


@cache
def _hsv_tables() -> tuple[Tensor, Tensor]:
    """Pillow's hue, of 8 bits, by [largest channel, difference, chroma]; saturation by [value, chroma].

    Both are cut off, and frequent colours lie on the cut, so the precision of every step is Pillow's.
    """
    chroma = torch.arange(256, dtype=torch.float32).clamp_min(1)
    difference = torch.arange(-255, 256)[:, None]
    # One of the two smaller channels is the smallest, so it lacks all of the chroma.
    first = torch.where(difference < 0, (chroma + difference) / chroma, 1.0)
    second = torch.where(difference >= 0, (chroma - difference) / chroma, 1.0)
    sixths = [first - second] + [(base + first.double() - second.double()).float() for base in (2.0, 4.0)]
    turns = (torch.stack(sixths).double() / 6 + 1).remainder(1).float()
    value = torch.arange(256, dtype=torch.float32).clamp_min(1)[:, None]
    saturation = ((torch.arange(256, dtype=torch.float32) / value).double() * 255).floor().clamp_max(255)
    return (turns.double() * 255).int().flatten(), (saturation / 255).float().flatten()


@cache
def _hue_weights() -> Tensor:
    """Share of the chroma that each channel (row) lacks at each of the 256 hues: 0 to 1, piecewise linear."""
    sixths = torch.arange(256) * 6.0 / 255
    distances = [(sixths - peak + 3).remainder(6).sub(3).abs() for peak in (0, 2, 4)]
    return torch.stack([(distance - 1).clamp(0, 1) for distance in distances])


def _gaussian_blur(views: Tensor, sigma: Tensor) -> Tensor:
    side = views.shape[-1]
    sigmas = sigma.flatten().tolist()
    radii = [min(math.ceil(3 * s), side - 1) for s in sigmas]
    largest = max(radii)
    taps = [
        [0.0] * (largest - r) + gaussian_taps(s, r) + [0.0] * (largest - r)
        for s, r in zip(sigmas, radii, strict=True)
    ]
    source = reflected_indices(side, largest).expand(len(taps), -1, -1)
    matrices = torch.zeros(len(taps), side, side)
    matrices.scatter_add_(2, source, torch.tensor(taps)[:, None, :].expand_as(source))
    matrices = matrices[:, None]
    return (matrices @ views @ matrices.transpose(2, 3)).round_()


_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "grayscale": _grayscale,
    "gaussian_blur": _gaussian_blur,
    "solarize": _solarize,
}
