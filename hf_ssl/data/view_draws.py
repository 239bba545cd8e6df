"""What is drawn for one view: the crop box and the operations with their values.

Every number comes from uniform numbers in [0, 1) that the caller drew, so that one draw serves all views.
Distributions are those of torchvision's RandomResizedCrop, ColorJitter (four operations in random order),
RandomGrayscale and RandomSolarize.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hf_ssl.data.view_recipe import CropSpec, TransformSpec, ViewSpec

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop
CROP_DRAWS = 2 * CROP_ATTEMPTS + 2  # area and ratio of each attempt, then the corner
JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
JITTER_ORDERS = tuple(itertools.permutations(range(4)))
# Uniform numbers a transform takes, happening or not: whether it happens, then its values.
TRANSFORM_DRAWS = {
    "horizontal_flip": 1,
    "color_jitter": 6,
    "grayscale": 1,
    "gaussian_blur": 2,
    "solarize": 1,
}


# The words of the counter that tell the draws of one sample apart.
VIEW_DRAW, FRAMES_DRAW, CAPTION_DRAW = 0, 1, 2


def generator_of_sample(seed: tuple[int, int, int], draw: int) -> np.random.Generator:
    """Random numbers of a sample, which depend on nothing but the run's seed, epoch and sample id.

    Args:
        seed: these three, each >= 0.
        draw: what for, so that two draws of a sample have nothing to do with each other.
    """
    run_seed, epoch, sample_id = seed
    # Philox keyed directly is cheaper than a hashed seed; the counter's lowest words count the numbers.
    key, counter = (
        np.array(words, dtype=np.uint64) for words in ((run_seed, epoch), (0, 0, sample_id, draw))
    )
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class CropBox(NamedTuple):
    """A box in pixels of the decoded image."""

    top: int
    left: int
    height: int
    width: int


class Step(NamedTuple):
    """One operation (a key of `pixels.OPERATIONS`) that happens to a view, and its drawn value."""

    operation: str
    value: float = 0.0


class ViewParameters(NamedTuple):
    """All that was drawn for one view; a transform that does not happen leaves no step."""

    kind: str
    size: int
    crop: CropBox
    interpolation: str
    steps: tuple[Step, ...]


def num_draws(spec: ViewSpec) -> int:
    """Uniform numbers that `draw_view` takes."""
    if spec.crop is None:
        return 0
    return CROP_DRAWS + sum(TRANSFORM_DRAWS[transform.type] for transform in spec.transforms)


def draw_crop(spec: CropSpec, height: int, width: int, uniforms: Sequence[float]) -> CropBox:
    """Draws a box as torchvision's RandomResizedCrop does: ten attempts, then the largest central box.

    Args:
        spec: ranges of the area's share (uniform) and of width / height (log-uniform).
        height: of the image.
        width: of the image.
        uniforms: 22 numbers in [0, 1): area and ratio of each attempt, and the corner.
    """
    (smallest, largest), (lowest, highest) = spec.scale, spec.ratio
    log_lowest, log_highest = math.log(lowest), math.log(highest)
    for attempt in range(CROP_ATTEMPTS):
        area_draw, ratio_draw = uniforms[2 * attempt : 2 * attempt + 2]
        area = height * width * (smallest + (largest - smallest) * area_draw)
        ratio = math.exp(log_lowest + (log_highest - log_lowest) * ratio_draw)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(uniforms[-2] * (height - box_height + 1))
            left = int(uniforms[-1] * (width - box_width + 1))
            return CropBox(top, left, box_height, box_width)
    box_height, box_width = height, width
    if width / height < lowest:
        box_height = round(width / lowest)
    elif width / height > highest:
        box_width = round(height * highest)
    return CropBox((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def draw_view(spec: ViewSpec, height: int, width: int, uniforms: Sequence[float]) -> ViewParameters:
    """Draws one view, no anchor, of an image of this size from `num_draws(spec)` numbers in [0, 1)."""
    assert spec.crop is not None
    crop = draw_crop(spec.crop, height, width, uniforms[:CROP_DRAWS])
    steps: list[Step] = []
    start = CROP_DRAWS
    for transform in spec.transforms:
        end = start + TRANSFORM_DRAWS[transform.type]
        if uniforms[start] < transform.probability:
            steps += _draw_steps(transform, uniforms[start + 1 : end])
        start = end
    return ViewParameters(spec.kind, spec.size, crop, spec.crop.interpolation, tuple(steps))


def anchor_of(view: ViewParameters, size: int) -> ViewParameters:
    """The same crop and flip at another size, and nothing else of what was drawn."""
    flips = tuple(step for step in view.steps if step.operation == "horizontal_flip")
    return view._replace(kind="anchor", size=size, steps=flips)


def _draw_steps(transform: TransformSpec, uniforms: Sequence[float]) -> list[Step]:
    if transform.type == "color_jitter":
        return _draw_jitter(transform.options, uniforms)
    if transform.type == "gaussian_blur":
        lowest, highest = transform.options["sigma"]
        return [Step("gaussian_blur", lowest + (highest - lowest) * uniforms[0])]
    return [Step(transform.type, transform.options.get("threshold", 0.0))]


def _draw_jitter(amounts: dict[str, float], uniforms: Sequence[float]) -> list[Step]:
    """Factors lie in [max(0, 1 - amount), 1 + amount], the hue in [-amount, amount]; amount 0: no step."""
    steps = []
    for index in JITTER_ORDERS[int(uniforms[4] * len(JITTER_ORDERS))]:
        name = JITTER_OPERATIONS[index]
        amount = amounts[name]
        lowest, highest = (-amount, amount) if name == "hue" else (max(0.0, 1 - amount), 1 + amount)
        if amount > 0:
            steps.append(Step(name, lowest + (highest - lowest) * uniforms[index]))
    return steps
