"""A sheet of views: each image with its crop boxes, and beside it the views in the colours of their boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hf_ssl.data.decoding import decode_image
from hf_ssl.data.views import Step, ViewMaker, ViewParameters
from hf_ssl.pictures.canvas import COLORS, TILE_SIDE, Tile, draw_grid, fit

_NAMES = {"horizontal_flip": "flip", "grayscale": "grey", "gaussian_blur": "blur"}


def draw_views(
    images: Sequence[Any],
    view_maker: ViewMaker,
    seed: int = 0,
    *,
    title: str = "Views",
    first_sample_id: int = 0,
) -> Image.Image:
    """Draws what training sees of each image.

    Args:
        images: whatever `decode_image` takes.
        view_maker: makes the views.
        seed: the run's seed; views are those of epoch 0.
        title: above the sheet.
        first_sample_id: sample id of the first image; the others follow.

    Returns:
        One row per image: the original with all crop boxes, then each view with what was done to it.
    """
    rows = []
    for number, image in enumerate(images):
        image_HWC = decode_image(image)
        sample_seed = (seed, 0, first_sample_id + number)
        parameters = view_maker.draw(image_HWC.shape[0], image_HWC.shape[1], sample_seed)
        views = view_maker(image_HWC, sample_seed)
        tiles = [
            Tile(fit(view), _describe(drawn.steps), COLORS[index % len(COLORS)])
            for index, (view, drawn) in enumerate(zip(views, parameters, strict=True))
        ]
        size = f"{image_HWC.shape[1]} x {image_HWC.shape[0]} px"
        rows.append([Tile(_with_boxes(image_HWC, parameters), size), *tiles])
    headings = ["image and crops"]
    for index, (kind, side) in enumerate(zip(view_maker.kinds, view_maker.sizes, strict=True), start=1):
        headings.append(f"view {index}: {kind}, {side} px")
    return draw_grid(rows, title=title, headings=headings)


def _with_boxes(image_HWC: np.ndarray, parameters: Sequence[ViewParameters]) -> Image.Image:
    large = max(image_HWC.shape[:2]) > TILE_SIDE
    picture = fit(image_HWC, TILE_SIDE * 3 // 2 if large else TILE_SIDE)
    scale = picture.width / image_HWC.shape[1]
    pen = ImageDraw.Draw(picture)
    for index, drawn in reversed(list(enumerate(parameters))):  # the first views lie on top
        top, left, height, width = (round(length * scale) for length in drawn.crop)
        box = (left, top, max(left, left + width - 1), max(top, top + height - 1))
        pen.rectangle(box, outline="white", width=4)
        pen.rectangle(box, outline=COLORS[index % len(COLORS)], width=3)
    return picture


def _describe(steps: Sequence[Step]) -> str:
    """The steps in their order, with values where they have any that vary."""
    words = []
    for operation, value in steps:
        word = _NAMES.get(operation, operation)
        if operation == "hue":
            word += f"\N{NO-BREAK SPACE}{value:+.2f}"
        elif operation not in ("horizontal_flip", "grayscale", "solarize"):
            word += f"\N{NO-BREAK SPACE}{value:.1f}"
        words.append(word)
    return ", ".join(words) or "no change"
