"""The draws of `view_draws.py` for many images at once, compiled; needs numba.

The same numbers from the same generators, of each image a Philox stream keyed by the run's seed and the
epoch, its counter by the sample id; and the same arithmetic on them in the same order.
Shape suffixes: B = images, V = views, T = transforms of a view, N = steps of a view.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_ssl.data.compiled_pixels import GAUSSIAN_BLUR, STEP_CODES, compiled
from hf_ssl.data.view_draws import (
    CROP_ATTEMPTS,
    CROP_DRAWS,
    JITTER_OPERATIONS,
    JITTER_ORDERS,
    TRANSFORM_DRAWS,
)
from hf_ssl.data.view_recipe import ViewSpec

FLIP, JITTER = 100, 101  # kinds of transforms that are no single step; the others have their step's code
_ORDERS = np.array(JITTER_ORDERS)
_JITTER_CODES = np.array([STEP_CODES[name] for name in JITTER_OPERATIONS])
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Program(NamedTuple):
    """A recipe as arrays.

    Attributes:
        crops: lowest and highest share of the area, logarithms of lowest and highest ratio, the ratios.
        anchor_of: -1, or the view that this anchor repeats.
        kinds: FLIP, JITTER or the code of a step; 0: no transform.
        probabilities: how often it happens.
        options: amounts of the four operations of a jitter; lowest and highest sigma; threshold.
        draws: uniform numbers of each transform.
        first_draws: where the numbers of a view begin.
        num_draws: numbers of an image.
        num_steps: most steps of a view.
    """

    crops: NDArray[np.float64]
    anchor_of: NDArray[np.int64]
    kinds: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    options: NDArray[np.float64]
    draws: NDArray[np.int64]
    first_draws: NDArray[np.int64]
    num_draws: int
    num_steps: int


class Draws(NamedTuple):
    """What was drawn for all views of many images.

    Attributes:
        boxes: top, left, height, width.
        is_flipped: whether it is mirrored.
        codes: steps as `compiled_pixels.run_steps` takes them.
        values: their values.
    """

    boxes: NDArray[np.int64]
    is_flipped: NDArray[np.bool_]
    codes: NDArray[np.int8]
    values: NDArray[np.float64]


def compile_recipe(specs: Sequence[ViewSpec]) -> Program:
    """The arrays that `draw_views` reads."""
    num_views, num_transforms = len(specs), max([1, *(len(spec.transforms) for spec in specs)])
    program = Program(
        crops=np.zeros((num_views, 6)),
        anchor_of=np.full(num_views, -1),
        kinds=np.zeros((num_views, num_transforms), np.int64),
        probabilities=np.zeros((num_views, num_transforms)),
        options=np.zeros((num_views, num_transforms, 4)),
        draws=np.zeros((num_views, num_transforms), np.int64),
        first_draws=np.zeros(num_views, np.int64),
        num_draws=0,
        num_steps=max([1, *(4 * len(spec.transforms) for spec in specs)]),
    )
    global_views = iter([number for number, spec in enumerate(specs) if spec.kind == "global"])
    num_draws = 0
    for number, spec in enumerate(specs):
        program.first_draws[number] = num_draws
        if spec.crop is None:
            program.anchor_of[number] = next(global_views)
            continue
        ratios = spec.crop.ratio
        program.crops[number] = [*spec.crop.scale, *map(math.log, ratios), *ratios]
        num_draws += CROP_DRAWS
        for place, transform in enumerate(spec.transforms):
            cell = number, place
            program.kinds[cell] = _kind(transform.type)
            program.probabilities[cell] = transform.probability
            program.draws[cell] = TRANSFORM_DRAWS[transform.type]
            options = _options(transform.type, transform.options)
            program.options[cell][: len(options)] = options
            num_draws += TRANSFORM_DRAWS[transform.type]
    return program._replace(num_draws=num_draws)


def _kind(name: str) -> int:
    return {"horizontal_flip": FLIP, "color_jitter": JITTER}.get(name) or STEP_CODES[name]


def _options(name: str, options: dict[str, Any]) -> list[float]:
    if name == "color_jitter":
        return [options[operation] for operation in JITTER_OPERATIONS]
    if name == "gaussian_blur":
        return list(options["sigma"])
    return [options["threshold"]] if name == "solarize" else []


def draw_views(program: Program, sizes_B2: NDArray[np.int64], seeds: Sequence[tuple[int, int, int]]) -> Draws:
    """Draw all views of images.

    Args:
        program: the recipe.
        sizes_B2: height and width of each image.
        seeds: run's seed, epoch and sample id of each image.
    """
    shape = (len(program.crops), len(sizes_B2))
    draws = Draws(
        boxes=np.zeros((*shape, 4), np.int64),
        is_flipped=np.zeros(shape, np.bool_),
        codes=np.zeros((*shape, program.num_steps), np.int8),
        values=np.zeros((*shape, program.num_steps)),
    )
    _draw_views(program, sizes_B2, np.array(seeds, np.uint64), draws)
    return draws


@compiled()
def _high_and_low(a: Any, b: Any) -> Any:
    """Both halves of a product of 64-bit numbers."""
    a_low, a_high, b_low, b_high = a & _MASK, a >> _SHIFT, b & _MASK, b >> _SHIFT
    low = a_low * b_low
    middle = a_high * b_low + (low >> _SHIFT)
    other = a_low * b_high + (middle & _MASK)
    return a_high * b_high + (middle >> _SHIFT) + (other >> _SHIFT), a * b


@compiled()
def fill_uniforms(seed: Any, epoch: Any, sample: Any, uniforms: Any) -> None:
    """Numbers in [0, 1) of numpy's `Philox(key=[seed, epoch], counter=[0, 0, sample, 0])`.

    Philox4x64 with ten rounds (Salmon et al. 2011, section 3.3); numpy raises the counter before a block, and
    makes a number of the upper 53 bits of a word.
    """
    number, block = 0, np.uint64(0)
    while number < uniforms.shape[0]:
        block += np.uint64(1)
        c0, c1, c2, c3 = block, np.uint64(0), sample, np.uint64(0)
        k0, k1 = seed, epoch
        for _ in range(10):
            high0, low0 = _high_and_low(np.uint64(0xD2E7470EE14C6C93), c0)
            high1, low1 = _high_and_low(np.uint64(0xCA5A826395121157), c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0 += np.uint64(0x9E3779B97F4A7C15)
            k1 += np.uint64(0xBB67AE8584CAA73B)
        for word in (c0, c1, c2, c3):
            if number < uniforms.shape[0]:
                uniforms[number] = np.float64(word >> np.uint64(11)) * (1.0 / 9007199254740992.0)
                number += 1


@compiled()
def _draw_box(crop: Any, height: int, width: int, uniforms: Any, box: Any) -> None:
    for attempt in range(CROP_ATTEMPTS):
        area = height * width * (crop[0] + (crop[1] - crop[0]) * uniforms[2 * attempt])
        ratio = math.exp(crop[2] + (crop[3] - crop[2]) * uniforms[2 * attempt + 1])
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            box[0] = int(uniforms[CROP_DRAWS - 2] * (height - box_height + 1))
            box[1] = int(uniforms[CROP_DRAWS - 1] * (width - box_width + 1))
            box[2], box[3] = box_height, box_width
            return
    box_height, box_width = height, width
    if width / height < crop[4]:
        box_height = round(width / crop[4])
    elif width / height > crop[5]:
        box_width = round(height * crop[5])
    box[0], box[1] = (height - box_height) // 2, (width - box_width) // 2
    box[2], box[3] = box_height, box_width


@compiled()
def _draw_jitter(amounts: Any, uniforms: Any, codes: Any, values: Any, count: int) -> int:
    for operation in _ORDERS[int(uniforms[4] * len(_ORDERS))]:
        amount = amounts[operation]
        if amount > 0:
            is_hue = operation == 3
            lowest = -amount if is_hue else max(0.0, 1 - amount)
            highest = amount if is_hue else 1 + amount
            codes[count] = _JITTER_CODES[operation]
            values[count] = lowest + (highest - lowest) * uniforms[operation]
            count += 1
    return count


@compiled()
def _draw_views(program: Any, sizes_B2: Any, seeds_B3: Any, draws: Any) -> None:
    uniforms = np.empty(program.num_draws)
    for b in range(sizes_B2.shape[0]):
        fill_uniforms(seeds_B3[b, 0], seeds_B3[b, 1], seeds_B3[b, 2], uniforms)
        for v in range(program.crops.shape[0]):
            source = program.anchor_of[v]
            if source >= 0:
                draws.boxes[v, b] = draws.boxes[source, b]
                draws.is_flipped[v, b] = draws.is_flipped[source, b]
                continue
            start, count = program.first_draws[v], 0
            _draw_box(
                program.crops[v],
                sizes_B2[b, 0],
                sizes_B2[b, 1],
                uniforms[start : start + CROP_DRAWS],
                draws.boxes[v, b],
            )
            start += CROP_DRAWS
            codes, values = draws.codes[v, b], draws.values[v, b]
            for t in range(program.kinds.shape[1]):
                kind, options = program.kinds[v, t], program.options[v, t]
                if kind != 0 and uniforms[start] < program.probabilities[v, t]:
                    if kind == FLIP:
                        draws.is_flipped[v, b] = not draws.is_flipped[v, b]
                    elif kind == JITTER:
                        count = _draw_jitter(options, uniforms[start + 1 :], codes, values, count)
                    else:
                        codes[count] = kind
                        values[count] = options[0]
                        if kind == GAUSSIAN_BLUR:
                            values[count] += (options[1] - options[0]) * uniforms[start + 1]
                        count += 1
                start += program.draws[v, t]
