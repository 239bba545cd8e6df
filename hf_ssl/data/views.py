"""Views: random crops of one image with random changes of colour and sharpness, as a recipe says.

The distribution is that of torchvision's RandomResizedCrop, ColorJitter (four operations in random order),
RandomGrayscale and RandomSolarize; `view_recipe.py` has the format of recipes, `pixels.py` what is done.
An image is decoded once. All random numbers of its views come in one draw from one generator keyed by
(seed, epoch, sample id): a view depends on neither worker nor order, and can be described without its pixels.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from hf_ssl.data.decoding import BrokenImageError, decode_image
from hf_ssl.data.pixels import OPERATIONS, crop_and_resize
from hf_ssl.data.view_recipe import CropSpec, TransformSpec, ViewSpec, parse_recipe

__all__ = [
    "BrokenImageError",
    "CropBox",
    "Step",
    "ViewMaker",
    "ViewParameters",
    "decode_image",
    "draw_crop",
    "evaluation_view",
]

_CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop
_CROP_DRAWS = 2 * _CROP_ATTEMPTS + 2  # area and ratio of each attempt, then the corner
_JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_JITTER_ORDERS = tuple(itertools.permutations(range(4)))
# Uniform numbers a transform takes, happening or not: whether it happens, then its values.
_TRANSFORM_DRAWS = {
    "horizontal_flip": 1,
    "color_jitter": 6,
    "grayscale": 1,
    "gaussian_blur": 2,
    "solarize": 1,
}

EncodedImage = bytes | Image.Image | NDArray[np.uint8] | Tensor


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


class ViewMaker:
    """Makes the views of one image.

    Args:
        views: the recipe.

    Attributes:
        num_views: views of one image.
        sizes: side of each view.
        kinds: "global" or "local" for each view.

    Raises:
        ValueError: the recipe is wrong; the message says where.
    """

    def __init__(self, views: list[dict[str, Any]]) -> None:
        self._specs = parse_recipe(views)
        self.num_views = len(self._specs)
        self.sizes = [spec.size for spec in self._specs]
        self.kinds = [spec.kind for spec in self._specs]
        counts = [
            _CROP_DRAWS + sum(_TRANSFORM_DRAWS[t.type] for t in spec.transforms) for spec in self._specs
        ]
        self._draw_ends = list(itertools.accumulate(counts))

    def __call__(self, image: EncodedImage, seed: tuple[int, int, int]) -> list[Tensor]:
        """Makes all views of an image.

        Args:
            image: whatever `decode_image` takes.
            seed: run's seed, epoch and sample id, each >= 0; equal seeds give equal views.

        Returns:
            One uint8 tensor (3, size, size) per view, in the recipe's order.

        Raises:
            BrokenImageError: the image cannot be decoded.
        """
        image_HWC = decode_image(image)
        height, width = image_HWC.shape[:2]
        return [make_view(image_HWC, parameters) for parameters in self.draw(height, width, seed)]

    def draw(self, height: int, width: int, seed: tuple[int, int, int]) -> list[ViewParameters]:
        """Draws the parameters that `__call__` uses for an image of this size with this seed."""
        run_seed, epoch, sample_id = seed
        # Philox keyed directly is cheaper than a hashed seed; the counter's lowest words count the draws.
        key, counter = (
            np.array(words, dtype=np.uint64) for words in ((run_seed, epoch), (0, 0, sample_id, 0))
        )
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        uniforms = generator.random(self._draw_ends[-1]).tolist()
        starts = [0, *self._draw_ends]
        return [
            _draw_view(spec, height, width, uniforms[start:end])
            for spec, start, end in zip(self._specs, starts, self._draw_ends, strict=False)
        ]


def make_view(image_HWC: NDArray[np.uint8], parameters: ViewParameters) -> Tensor:
    """Makes the view that the parameters describe; uint8 (3, size, size)."""
    pixels = crop_and_resize(image_HWC, parameters.crop, parameters.size, parameters.interpolation)
    if parameters.steps:
        image = Image.fromarray(pixels)
        for operation, value in parameters.steps:
            image = OPERATIONS[operation](image, value)
        pixels = np.asarray(image)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


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
    for attempt in range(_CROP_ATTEMPTS):
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


def _draw_view(spec: ViewSpec, height: int, width: int, uniforms: Sequence[float]) -> ViewParameters:
    crop = draw_crop(spec.crop, height, width, uniforms[:_CROP_DRAWS])
    steps: list[Step] = []
    start = _CROP_DRAWS
    for transform in spec.transforms:
        end = start + _TRANSFORM_DRAWS[transform.type]
        if uniforms[start] < transform.probability:
            steps += _draw_steps(transform, uniforms[start + 1 : end])
        start = end
    return ViewParameters(spec.kind, spec.size, crop, spec.crop.interpolation, tuple(steps))


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
    for index in _JITTER_ORDERS[int(uniforms[4] * len(_JITTER_ORDERS))]:
        name = _JITTER_OPERATIONS[index]
        amount = amounts[name]
        lowest, highest = (-amount, amount) if name == "hue" else (max(0.0, 1 - amount), 1 + amount)
        if amount > 0:
            steps.append(Step(name, lowest + (highest - lowest) * uniforms[index]))
    return steps


def evaluation_view(
    image: EncodedImage, size: int, *, resize_size: int | None = None, interpolation: str = "bilinear"
) -> Tensor:
    """The one view of an image at test time, as transformers' image processors make it before they rescale.

    Args:
        image: whatever `decode_image` takes.
        size: side of the result.
        resize_size: the shorter side is first resized to this and a central square of `size` cut out (256 for
            224 is usual); None: the whole image is resized to the square, whatever its shape.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 tensor (3, size, size).

    Raises:
        BrokenImageError: the image cannot be decoded.
        ValueError: `resize_size` is smaller than `size`.
    """
    if resize_size is not None and resize_size < size:
        raise ValueError(
            f"resize_size {resize_size} is smaller than size {size}; the crop would need padding"
        )
    image_CHW = torch.from_numpy(np.ascontiguousarray(decode_image(image).transpose(2, 0, 1)))
    mode = InterpolationMode(interpolation)
    if resize_size is None:
        square_CHW: Tensor = tvF.resize(image_CHW, [size, size], interpolation=mode, antialias=True)
        return square_CHW
    height, width = image_CHW.shape[-2:]
    longer = int(resize_size * max(height, width) / min(height, width))
    shape = [resize_size, longer] if height <= width else [longer, resize_size]
    resized_CHW: Tensor = tvF.resize(image_CHW, shape, interpolation=mode, antialias=True)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return resized_CHW[:, top : top + size, left : left + size].contiguous()
