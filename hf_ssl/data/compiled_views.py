"""Views made by compiled loops: the same as `views.py` makes them, several times as fast; needs numba.

Shape suffixes: B = images, C = 3, H, W = pixels of an image, S = side of a view, V = views.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ssl.data.compiled_draws import Draws, compile_recipe, draw_views
from hf_ssl.data.compiled_pixels import make_planes, resize_crops, run_steps
from hf_ssl.data.pixels import crop_and_resize
from hf_ssl.data.view_recipe import ViewSpec

Seed = tuple[int, int, int]


class CompiledViews:
    """Makes the views of a recipe.

    Args:
        specs: the recipe, parsed.
    """

    def __init__(self, specs: Sequence[ViewSpec]) -> None:
        self._program = compile_recipe(specs)
        self._sizes = [spec.size for spec in specs]
        anchors = self._program.anchor_of
        crops = [
            specs[number if anchors[number] < 0 else anchors[number]].crop for number in range(len(specs))
        ]
        self._interpolations = [crop.interpolation for crop in crops if crop is not None]

    def make_views(self, image_HWC: NDArray[np.uint8], seed: Seed) -> list[Tensor]:
        """All views of one image, uint8 (3, S, S) each."""
        draws = draw_views(self._program, np.array([image_HWC.shape[:2]]), [seed])
        views = []
        for number, size in enumerate(self._sizes):
            pixels_SSC = crop_and_resize(
                image_HWC, draws.boxes[number, 0].tolist(), size, self._interpolations[number]
            )
            view_BCSS = np.empty((1, 3, size, size), np.uint8)
            make_planes(pixels_SSC, draws.is_flipped[number, 0], view_BCSS[0])
            self._run_steps(view_BCSS, draws, number)
            views.append(torch.from_numpy(view_BCSS[0]))
        return views

    def make_batch(self, images_BHWC: NDArray[np.uint8], seeds: Sequence[Seed]) -> list[Tensor]:
        """All views of images of one small size, uint8 (B, 3, S, S) each."""
        count, height, width, _ = images_BHWC.shape
        draws = draw_views(self._program, np.tile([height, width], (count, 1)), seeds)
        views = []
        for number, size in enumerate(self._sizes):
            views_BCSS = np.empty((count, 3, size, size), np.uint8)
            resize_crops(
                images_BHWC,
                draws.boxes[number],
                draws.is_flipped[number],
                self._interpolations[number] == "bicubic",
                views_BCSS,
            )
            self._run_steps(views_BCSS, draws, number)
            views.append(torch.from_numpy(views_BCSS))
        return views

    def _run_steps(self, views_BCSS: NDArray[np.uint8], draws: Draws, number: int) -> None:
        run_steps(views_BCSS, draws.codes[number], draws.values[number])
