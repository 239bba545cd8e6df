"""The operations of `pixels.py` as compiled loops over the planes of many views; needs numba.

Equal to them in every value, but for the blur, which differs by one level in about one value of 100,000.
Loops are written so that the compiler makes them work on 16 values at once: planes instead of interleaved
channels, rows as slices of their own, no branch inside.
Shape suffixes: B = images, C = 3, H, W = pixels of an image, S = side of a view, N = steps of a view.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

STEP_CODES = {  # of the operations in `pixels.OPERATIONS`; a flip is done while planes are made
    "brightness": 1,
    "contrast": 2,
    "saturation": 3,
    "hue": 4,
    "grayscale": 5,
    "gaussian_blur": 6,
    "solarize": 7,
}
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, GAUSSIAN_BLUR, SOLARIZE = STEP_CODES.values()
_F = np.float32
_ZERO, _ONE, _HALF, _WHITE = _F(0), _F(1), _F(0.5), _F(255)


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile at the first call, and keep the machine code on disk where that can be written."""

    def decorate(function: Any) -> Any:
        settings = {"nogil": True, "error_model": "numpy", **options}
        try:
            return numba.njit(cache=True, **settings)(function)
        except RuntimeError:  # no folder for it: every process compiles for itself, a few seconds
            return numba.njit(**settings)(function)

    return decorate


@compiled()
def make_planes(image_SSC: NDArray[np.uint8], is_flipped: bool, view_CSS: NDArray[np.uint8]) -> None:
    """Copy interleaved pixels into planes, mirrored or not."""
    side = image_SSC.shape[1]
    for row in range(image_SSC.shape[0]):
        for channel in range(3):
            source, target = image_SSC[row, :, channel], view_CSS[channel, row]
            if is_flipped:
                for x in range(side):
                    target[side - 1 - x] = source[x]
            else:
                for x in range(side):
                    target[x] = source[x]


# Colour: Pillow's rules in float32 and whole numbers


@compiled()
def _blend(values: NDArray[np.uint8], base: int, factor: np.float32) -> None:
    for k in range(values.shape[0]):
        value = _F(base) + factor * _F(np.int32(values[k]) - base)
        values[k] = np.uint8(np.int32(min(max(value, _ZERO), _WHITE)))


@compiled()
def _gray_sum(red: NDArray[np.uint8], green: NDArray[np.uint8], blue: NDArray[np.uint8]) -> np.int64:
    total = np.int64(0)
    for k in range(red.shape[0]):
        total += (
            np.int32(red[k]) * 19595 + np.int32(green[k]) * 38470 + np.int32(blue[k]) * 7471 + 32768
        ) >> 16
    return total


@compiled()
def _blend_with_gray(
    red: NDArray[np.uint8], green: NDArray[np.uint8], blue: NDArray[np.uint8], factor: np.float32
) -> None:
    for k in range(red.shape[0]):
        r, g, b = np.int32(red[k]), np.int32(green[k]), np.int32(blue[k])
        gray = (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16
        base = _F(gray)
        red[k] = np.uint8(np.int32(min(max(base + factor * _F(r - gray), _ZERO), _WHITE)))
        green[k] = np.uint8(np.int32(min(max(base + factor * _F(g - gray), _ZERO), _WHITE)))
        blue[k] = np.uint8(np.int32(min(max(base + factor * _F(b - gray), _ZERO), _WHITE)))


@compiled()
def _turn_hue(red: NDArray[np.uint8], green: NDArray[np.uint8], blue: NDArray[np.uint8], shift: int) -> None:
    for k in range(red.shape[0]):
        r, g, b = _F(red[k]), _F(green[k]), _F(blue[k])
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        divisor = max(chroma, _ONE)
        rc, gc, bc = (value - r) / divisor, (value - g) / divisor, (value - b) / divisor
        # Frequent colours lie on the cut to eight bits, so every step has Pillow's precision.
        from_green = _F(2.0 + np.float64(rc) - np.float64(bc))
        from_blue = _F(4.0 + np.float64(gc) - np.float64(rc))
        sixths = bc - gc if r == value else (from_green if g == value else from_blue)
        turns = np.float64(sixths) / 6.0 + 1.0
        turns = np.float64(_F(turns - math.floor(turns)))
        hue = (np.int32(turns * 255.0) + shift) & 255
        saturation = _F(np.int32(np.float64(chroma / max(value, _ONE)) * 255.0)) / _WHITE
        place = _F(hue) * _F(6) / _WHITE
        # Share of the chroma that a channel lacks: 0 near its own hue, 1 on the other side, linear between.
        lacks_red = min(max(_F(2) - abs(place - _F(3)), _ZERO), _ONE)
        lacks_green = min(max(abs(place - _F(2)) - _ONE, _ZERO), _ONE)
        lacks_blue = min(max(abs(place - _F(4)) - _ONE, _ZERO), _ONE)
        red[k] = np.uint8(np.int32(value * (_ONE - lacks_red * saturation) + _HALF))
        green[k] = np.uint8(np.int32(value * (_ONE - lacks_green * saturation) + _HALF))
        blue[k] = np.uint8(np.int32(value * (_ONE - lacks_blue * saturation) + _HALF))


@compiled()
def _make_gray(red: NDArray[np.uint8], green: NDArray[np.uint8], blue: NDArray[np.uint8]) -> None:
    for k in range(red.shape[0]):
        gray = (
            np.int32(red[k]) * 19595 + np.int32(green[k]) * 38470 + np.int32(blue[k]) * 7471 + 32768
        ) >> 16
        red[k] = green[k] = blue[k] = np.uint8(gray)


@compiled()
def _solarize(values: NDArray[np.uint8], threshold: int) -> None:
    for k in range(values.shape[0]):
        value = np.int32(values[k])
        values[k] = np.uint8(value if value < threshold else 255 - value)


# Blur: two passes of a Gaussian, three taps of each side at a time, so that sums pass memory rarely


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _scale(target: Any, middle: Any, weight: np.float32) -> None:
    for x in range(target.shape[0]):
        target[x] = weight * middle[x]


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _add_taps(
    target: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, near: Any, next_: Any, far: Any
) -> None:
    for x in range(target.shape[0]):
        target[x] += near * (a[x] + b[x]) + next_ * (c[x] + d[x]) + far * (e[x] + f[x])


@compiled()
def _blur(view_CSS: NDArray[np.uint8], sigma: float) -> None:
    side = view_CSS.shape[1]
    radius = min(int(math.ceil(3 * sigma)), side - 1)
    groups = (radius + 2) // 3
    pad = 3 * groups
    total = 0.0
    for tap in range(-radius, radius + 1):
        total += math.exp(-0.5 * (tap / sigma) ** 2)
    weights = np.zeros(pad + 1, np.float32)  # those beyond the radius stay 0
    for tap in range(radius + 1):
        weights[tap] = math.exp(-0.5 * (tap / sigma) ** 2) / total
    row = np.zeros(side + 2 * pad, np.float32)
    rows = np.zeros((side + 2 * pad, side), np.float32)
    result = np.empty(side, np.float32)
    for channel in range(3):
        for y in range(side):
            pixels, middle, target = view_CSS[channel, y], row[pad : pad + side], rows[pad + y]
            for x in range(side):
                middle[x] = pixels[x]
            for tap in range(radius):  # reflected borders; the border pixel is not repeated
                row[pad - 1 - tap] = row[pad + 1 + tap]
                row[pad + side + tap] = row[pad + side - 2 - tap]
            _scale(target, middle, weights[0])
            for group in range(groups):
                k = 3 * group + 1
                _add_taps(
                    target,
                    row[pad - k : pad - k + side],
                    row[pad + k : pad + k + side],
                    row[pad - k - 1 : pad - k - 1 + side],
                    row[pad + k + 1 : pad + k + 1 + side],
                    row[pad - k - 2 : pad - k - 2 + side],
                    row[pad + k + 2 : pad + k + 2 + side],
                    weights[k],
                    weights[k + 1],
                    weights[k + 2],
                )
        for tap in range(radius):
            rows[pad - 1 - tap] = rows[pad + 1 + tap]
            rows[pad + side + tap] = rows[pad + side - 2 - tap]
        for y in range(side):
            middle_y = pad + y
            _scale(result, rows[middle_y], weights[0])
            for group in range(groups):
                k = 3 * group + 1
                _add_taps(
                    result,
                    rows[middle_y - k],
                    rows[middle_y + k],
                    rows[middle_y - k - 1],
                    rows[middle_y + k + 1],
                    rows[middle_y - k - 2],
                    rows[middle_y + k + 2],
                    weights[k],
                    weights[k + 1],
                    weights[k + 2],
                )
            target = view_CSS[channel, y]
            for x in range(side):
                target[x] = np.uint8(np.int32(result[x] + _HALF))


@compiled()
def run_steps(
    views_BCSS: NDArray[np.uint8], codes_BN: NDArray[np.int8], values_BN: NDArray[np.float64]
) -> None:
    """Change views in place by the steps drawn for each.

    Args:
        views_BCSS: uint8, contiguous.
        codes_BN: of `STEP_CODES`, in their order; 0 ends the steps of a view.
        values_BN: the value drawn for each step.
    """
    pixels = views_BCSS.shape[2] * views_BCSS.shape[3]
    for b in range(views_BCSS.shape[0]):
        view = views_BCSS[b]
        values = view.reshape(3 * pixels)
        red, green, blue = values[:pixels], values[pixels : 2 * pixels], values[2 * pixels :]
        for n in range(codes_BN.shape[1]):
            code, value = codes_BN[b, n], values_BN[b, n]
            if code == 0:
                break
            if code == BRIGHTNESS:
                _blend(values, 0, _F(value))
            elif code == CONTRAST:
                mean = int(_gray_sum(red, green, blue) / pixels + 0.5)
                _blend(values, mean, _F(value))
            elif code == SATURATION:
                _blend_with_gray(red, green, blue, _F(value))
            elif code == HUE:
                _turn_hue(red, green, blue, int(value * 255) & 255)  # cut off towards 0, as Pillow does
            elif code == GRAYSCALE:
                _make_gray(red, green, blue)
            elif code == GAUSSIAN_BLUR:
                _blur(view, value)
            elif code == SOLARIZE:
                _solarize(values, math.ceil(value))


# Crop and resize of small images: torch's arithmetic on uint8, so that both ways give the same pixels


@compiled()
def _fill_weights(length: int, size: int, is_bicubic: bool, starts: Any, counts: Any, weights: Any) -> int:
    """Whole-number weights of an antialiased resize of one axis; returns their bits behind the point."""
    scale = length / size
    stretch = max(scale, 1.0)
    support = (2.0 if is_bicubic else 1.0) * stretch
    largest = 0.0
    exact = np.zeros((size, weights.shape[1]))
    for i in range(size):
        center = scale * (i + 0.5)
        start = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), length) - start
        total = 0.0
        for j in range(count):
            distance = abs((j + start - center + 0.5) / stretch)
            if is_bicubic:  # Keys' cubic with a = -0.5
                if distance < 1:
                    weight = (1.5 * distance - 2.5) * distance * distance + 1
                elif distance < 2:
                    weight = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
                else:
                    weight = 0.0
            else:
                weight = max(1 - distance, 0.0)
            exact[i, j] = weight
            total += weight
        for j in range(count):
            exact[i, j] /= total
            largest = max(largest, exact[i, j])
        starts[i], counts[i] = start, count
    bits = 0
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    for i in range(size):
        for j in range(counts[i]):
            scaled = exact[i, j] * (1 << bits)
            weights[i, j] = int(scaled - 0.5) if scaled < 0 else int(scaled + 0.5)
    return bits


@compiled()
def resize_crops(
    images_BHWC: NDArray[np.uint8],
    boxes_B4: NDArray[np.int64],
    is_flipped_B: NDArray[np.bool_],
    is_bicubic: bool,
    views_BCSS: NDArray[np.uint8],
) -> None:
    """Cut a box out of every image, resize it, antialiased, and mirror it or not.

    Args:
        images_BHWC: of one size.
        boxes_B4: top, left, height, width in pixels.
        is_flipped_B: whether to mirror.
        is_bicubic: else bilinear.
        views_BCSS: written.
    """
    count, height, width, _ = images_BHWC.shape
    side = views_BCSS.shape[2]
    taps = 4 + 4 * (max(height, width) // side + 1)
    starts, counts = np.empty(side, np.int32), np.empty(side, np.int32)
    weights = np.zeros((side, taps), np.int32)
    narrow = np.empty((height, 3, side), np.int32)
    sums = np.empty(side, np.int32)
    for b in range(count):
        top, left, box_height, box_width = boxes_B4[b]
        bits = _fill_weights(box_width, side, is_bicubic, starts, counts, weights)
        half = 1 << (bits - 1)
        for y in range(box_height):
            pixels = images_BHWC[b, top + y]
            for i in range(side):
                red = green = blue = half
                first = left + starts[i]
                for j in range(counts[i]):
                    weight = weights[i, j]
                    red += weight * np.int32(pixels[first + j, 0])
                    green += weight * np.int32(pixels[first + j, 1])
                    blue += weight * np.int32(pixels[first + j, 2])
                place = side - 1 - i if is_flipped_B[b] else i
                narrow[y, 0, place] = min(max(red >> bits, 0), 255)
                narrow[y, 1, place] = min(max(green >> bits, 0), 255)
                narrow[y, 2, place] = min(max(blue >> bits, 0), 255)
        bits = _fill_weights(box_height, side, is_bicubic, starts, counts, weights)
        half = 1 << (bits - 1)
        for i in range(side):
            for channel in range(3):
                for x in range(side):
                    sums[x] = half
                for j in range(counts[i]):
                    row, weight = narrow[starts[i] + j, channel], weights[i, j]
                    for x in range(side):
                        sums[x] += weight * row[x]
                target = views_BCSS[b, channel, i]
                for x in range(side):
                    target[x] = np.uint8(min(max(sums[x] >> bits, 0), 255))
