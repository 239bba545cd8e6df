"""Views: random crops of one image with random changes of colour and sharpness, as a recipe says.

`view_recipe.py` has the format of recipes, `view_draws.py` the distributions, `pixels.py` what is done to
pixels, `batched_views.py` the same for many small images at once. Where numba is installed (the extra `fast`)
`compiled_views.py` makes the same views several times as fast.
An image is decoded once. All random numbers of its views come in one draw from one generator keyed by
(seed, epoch, sample id): a view depends on neither worker nor order, and can be described without its pixels.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from hf_ssl.data.batched_views import MAX_BATCHED_SIDE, make_views
from hf_ssl.data.decoding import BrokenImageError, decode_image
from hf_ssl.data.pixels import OPERATIONS, crop_and_resize
from hf_ssl.data.view_draws import (
    VIEW_DRAW,
    CropBox,
    Step,
    ViewParameters,
    anchor_of,
    draw_crop,
    draw_view,
    generator_of_sample,
    num_draws,
)
from hf_ssl.data.view_recipe import parse_recipe

if TYPE_CHECKING:
    from hf_ssl.data.compiled_views import CompiledViews

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

EncodedImage = bytes | Image.Image | NDArray[np.uint8] | Tensor


class ViewMaker:
    """Makes the views of an image, or of many.

    Args:
        views: the recipe.
        compiled: whether compiled loops make the views; None: where numba is installed. Both make the same
            draws and the same pixels, but for blurred ones, of which one in 100,000 differs by a level.

    Attributes:
        num_views: views of one image.
        sizes: side of each view.
        kinds: "global", "local" or "anchor" for each view.
        compiled: whether compiled loops make the views.

    Raises:
        ValueError: the recipe is wrong; the message says where.
    """

    def __init__(self, views: list[dict[str, Any]], compiled: bool | None = None) -> None:
        self._specs = parse_recipe(views)
        self.compiled = can_compile() if compiled is None else compiled
        self.num_views = len(self._specs)
        self.sizes = [spec.size for spec in self._specs]
        self.kinds = [spec.kind for spec in self._specs]
        self._draw_ends = list(itertools.accumulate(num_draws(spec) for spec in self._specs))

    def decode(self, data: EncodedImage, seed: tuple[int, int, int]) -> NDArray[np.uint8]:
        """What `decode_image` makes of it, whatever the seed."""
        return decode_image(data)

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
        if self.compiled:
            return self._compiled_views.make_views(image_HWC, seed)
        height, width = image_HWC.shape[:2]
        return [make_view(image_HWC, parameters) for parameters in self.draw(height, width, seed)]

    def make_batch(
        self, images: Sequence[EncodedImage], seeds: Sequence[tuple[int, int, int]]
    ) -> list[Tensor]:
        """Makes all views of many images; faster than one by one if all have one small size.

        The draws are those of `__call__`. Compiled loops make the same pixels as there. Without them, where
        the fast path is taken (all images of one height and width, at most 96 pixels), the crop may differ by
        a level from `__call__`, and what follows passes that on.

        Args:
            images: whatever `decode_image` takes.
            seeds: one per image, as `__call__` takes it.

        Returns:
            One uint8 tensor (images, 3, size, size) per view, in the recipe's order.

        Raises:
            BrokenImageError: an image cannot be decoded; decode beforehand to know which.
        """
        decoded = [decode_image(image) for image in images]
        if len({image.shape for image in decoded}) != 1 or max(decoded[0].shape) > MAX_BATCHED_SIDE:
            views = [self(image, seed) for image, seed in zip(decoded, seeds, strict=True)]
            return [torch.stack(view) for view in zip(*views, strict=True)]
        if self.compiled:
            return self._compiled_views.make_batch(np.stack(decoded), seeds)
        height, width = decoded[0].shape[:2]
        images_BHWC = torch.from_numpy(np.stack(decoded))
        parameters = [self.draw(height, width, seed) for seed in seeds]
        return [make_views(images_BHWC, view) for view in zip(*parameters, strict=True)]

    @cached_property
    def _compiled_views(self) -> "CompiledViews":
        from hf_ssl.data.compiled_views import CompiledViews  # imports numba: half a second

        return CompiledViews(self._specs)

    def draw(self, height: int, width: int, seed: tuple[int, int, int]) -> list[ViewParameters]:
        """Draws the parameters that `__call__` uses for an image of this size with this seed."""
        uniforms = generator_of_sample(seed, VIEW_DRAW).random(self._draw_ends[-1]).tolist()
        starts = [0, *self._draw_ends]
        drawn = [
            None if spec.crop is None else draw_view(spec, height, width, uniforms[start:end])
            for spec, start, end in zip(self._specs, starts, self._draw_ends, strict=False)
        ]
        global_views = iter([view for view in drawn if view is not None and view.kind == "global"])
        return [
            anchor_of(next(global_views), spec.size) if view is None else view
            for spec, view in zip(self._specs, drawn, strict=True)
        ]


def can_compile() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def make_view(image_HWC: NDArray[np.uint8], parameters: ViewParameters) -> Tensor:
    """Makes the view that the parameters describe; uint8 (3, size, size)."""
    pixels = crop_and_resize(image_HWC, parameters.crop, parameters.size, parameters.interpolation)
    if parameters.steps:
        image = Image.fromarray(pixels)
        for operation, value in parameters.steps:
            image = OPERATIONS[operation](image, value)
        pixels = np.asarray(image)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


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
