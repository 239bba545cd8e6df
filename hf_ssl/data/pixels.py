"""What views do to pixels: crop and resize, and the operations with their drawn value. Deterministic.

Compared with torchvision's transforms on PIL images: flip, colour operations, grayscale and solarize are
equal in every value; crop and resize within one level (bicubic: two levels in about one value of 50,000).
The blur is the true Gaussian, truncated at 3 sigma, with reflected borders. SimCLR's own is as wide as a
tenth of the side and has black borders; Pillow's `GaussianBlur` (MoCo, BYOL) is three box filters, up to 14
levels off the true Gaussian at strong edges.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

_MATRIX_BLUR_SIDE = (
    96  # up to here two matrix products are faster than one addition per tap (measured, one core)
)


def crop_and_resize(
    image_HWC: NDArray[np.uint8], box: tuple[int, int, int, int], size: int, interpolation: str
) -> NDArray[np.uint8]:
    """Cuts out a box and resizes it, antialiased, to a square.

    Args:
        image_HWC: uint8 pixels.
        box: top, left, height, width, in pixels and inside the image.
        size: side of the result.
        interpolation: "bilinear" or "bicubic".

    Returns:
        New uint8 array (size, size, 3). Pixels outside the box have no influence.
    """
    top, left, height, width = box
    cut_HWC = image_HWC[top : top + height, left : left + width].copy()
    if height == width == size:
        return cut_HWC
    # The batch axis is added before the permutation: only then is the tensor channels-last in every stride,
    # which torch's fast uint8 path requires.
    cut_1CHW = torch.from_numpy(cut_HWC)[None].permute(0, 3, 1, 2)
    resized_1CHW = F.interpolate(cut_1CHW, size=(size, size), mode=interpolation, antialias=True)
    return np.ascontiguousarray(resized_1CHW[0].permute(1, 2, 0).numpy())


def horizontal_flip(image: Image.Image, _value: float) -> Image.Image:
    """Mirrors left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Multiplies every value by `factor` >= 0."""
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Multiplies every value's distance from the image's mean grey, a whole number, by `factor` >= 0."""
    counts = image.convert("L").histogram()
    mean = int(sum(level * count for level, count in enumerate(counts)) / sum(counts) + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Multiplies every value's distance from its pixel's grey by `factor` >= 0."""
    return ImageEnhance.Color(image).enhance(factor)


def hue(image: Image.Image, turns: float) -> Image.Image:
    """Turns the hue, with the eight bits that Pillow gives it; `turns` from -0.5 to 0.5."""
    image_HSV = np.array(image.convert("HSV"))
    image_HSV[:, :, 0] += np.uint8(int(turns * 255) % 256)  # wraps around, as a hue does
    return Image.fromarray(image_HSV, "HSV").convert("RGB")


def grayscale(image: Image.Image, _value: float) -> Image.Image:
    """Gives all three channels the pixel's grey, (19595 R + 38470 G + 7471 B) / 65536 rounded."""
    return image.convert("L").convert("RGB")


def solarize(image: Image.Image, threshold: float) -> Image.Image:
    """Inverts every value at or above the threshold."""
    pixels = np.asarray(image)
    return Image.fromarray(np.where(pixels >= threshold, 255 - pixels, pixels))


def gaussian_blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blurs with a Gaussian of standard deviation `sigma`, in pixels."""
    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    blurred_CHW = blur(pixels_CHW, sigma).round_().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(blurred_CHW.permute(1, 2, 0).numpy()))


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "horizontal_flip": horizontal_flip,
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
    "grayscale": grayscale,
    "gaussian_blur": gaussian_blur,
    "solarize": solarize,
}


def gaussian_taps(sigma: float, radius: int) -> list[float]:
    """Weights of a Gaussian at the offsets -radius to radius, with the sum 1."""
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def blur(pixels_CHW: Tensor, sigma: float, radius: int | None = None) -> Tensor:
    """Blurs along both axes, borders reflected (the border pixel itself is not repeated).

    Args:
        pixels_CHW: floating point, any range.
        sigma: standard deviation in pixels, > 0.
        radius: taps on each side of the middle; None: 3 sigma, rounded up. At most the shorter side - 1.

    Returns:
        New tensor of the same shape and type.
    """
    height, width = pixels_CHW.shape[-2:]
    radius = min(math.ceil(3 * sigma) if radius is None else radius, height - 1, width - 1)
    taps = gaussian_taps(sigma, radius)
    if max(height, width) <= _MATRIX_BLUR_SIDE:
        rows, columns = (_blur_matrix(side, taps, pixels_CHW.dtype) for side in (height, width))
        return rows @ pixels_CHW @ columns.T
    padded = F.pad(pixels_CHW, (radius, radius, radius, radius), mode="reflect")
    return _weighted_shifts(_weighted_shifts(padded, taps, dim=-1), taps, dim=-2)


def _blur_matrix(side: int, taps: list[float], dtype: torch.dtype) -> Tensor:
    """The matrix whose row i holds the weights of all pixels for output pixel i."""
    source = reflected_indices(side, len(taps) // 2)
    weights = torch.tensor(taps, dtype=dtype).expand(side, -1)
    return torch.zeros(side, side, dtype=dtype).scatter_add_(1, source, weights)


@lru_cache(maxsize=64)
def reflected_indices(side: int, radius: int) -> Tensor:
    """Row i holds the pixels under the taps around pixel i, (side, 2 radius + 1), borders reflected."""
    offsets = torch.arange(-radius, radius + 1)
    indices = (torch.arange(side)[:, None] + offsets).abs()
    return torch.where(indices >= side, 2 * (side - 1) - indices, indices)


def _weighted_shifts(padded: Tensor, taps: list[float], dim: int) -> Tensor:
    length = padded.shape[dim] - len(taps) + 1
    total = padded.narrow(dim, 0, length) * taps[0]
    for start, weight in enumerate(taps[1:], start=1):
        total.add_(padded.narrow(dim, start, length), alpha=weight)
    return total
