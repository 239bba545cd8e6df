"""The sheet all pictures of images share: a titled grid of tiles with captions, on white."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hf_ssl.data.decoding import decode_image

MARGIN, GAP = 20, 18
TILE_SIDE = 160
TITLE_SIZE, HEADING_SIZE, CAPTION_SIZE = 20, 14, 12
INK, FAINT = "#1f2328", "#59636e"
# Okabe and Ito's palette without black and yellow: told apart by colour-blind readers too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GOOD, BAD = "#009e73", "#d55e00"
UNSEEN = 140  # grey level of patches that a model did not see
_FRAME, _SPACE = 4, 8  # width of a frame with its white line; between text and pictures


class Tile(NamedTuple):
    """A picture in the grid, with a caption below and a frame around it if it has a colour."""

    image: Image.Image
    caption: str = ""
    color: str | None = None


def fit(image: Any, side: int = TILE_SIDE) -> Image.Image:
    """Brings whatever `decode_image` takes to at most `side` pixels per side.

    Smaller images grow by a whole factor, every pixel a square; larger ones are resized smoothly.
    """
    picture = Image.fromarray(decode_image(image))
    factor = side / max(picture.size)
    if factor >= 1:
        width, height = (length * int(factor) for length in picture.size)
        return picture.resize((width, height), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * factor)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def draw_grid(
    rows: Sequence[Sequence[Tile]], *, title: str = "", headings: Sequence[str] = ()
) -> Image.Image:
    """Lays out tiles in rows and columns.

    Args:
        rows: tiles; rows may differ in length.
        title: above the grid.
        headings: above the columns; one that is longer than its column is wrapped.

    Raises:
        ValueError: there is no tile.
    """
    num_columns = max((len(row) for row in rows), default=0)
    if num_columns == 0:
        raise ValueError("nothing to draw: give at least one image")
    widths = [max(row[c].image.width for row in rows if c < len(row)) for c in range(num_columns)]
    step = [width + GAP for width in widths]
    heading_lines = [wrap(text, width, HEADING_SIZE) for text, width in zip(headings, widths, strict=False)]
    captions = [
        [wrap(t.caption, width, CAPTION_SIZE) for t, width in zip(row, widths, strict=False)] for row in rows
    ]
    heights = [max(map(_tile_height, row, lines)) for row, lines in zip(rows, captions, strict=True)]
    title_lines = wrap(title, sum(step) - GAP, TITLE_SIZE, bold=True)
    title_height = _lines_height(len(title_lines), TITLE_SIZE)
    top = MARGIN + title_height + _lines_height(max(map(len, heading_lines), default=0), HEADING_SIZE)

    sheet = Image.new(
        "RGB", (2 * MARGIN + sum(step) - GAP, top + sum(heights) + GAP * (len(rows) - 1) + MARGIN), "white"
    )
    pen = ImageDraw.Draw(sheet)
    _write(pen, title_lines, MARGIN, MARGIN, TITLE_SIZE, INK, bold=True)
    lefts = [MARGIN + sum(step[:c]) for c in range(num_columns)]
    for lines, left in zip(heading_lines, lefts, strict=False):
        # A heading of one line stands directly above the pictures, beside headings of two.
        _write(pen, lines, left, top - _lines_height(len(lines), HEADING_SIZE), HEADING_SIZE, INK)
    for row, lines_of_row, height in zip(rows, captions, heights, strict=True):
        for tile, lines, left in zip(row, lines_of_row, lefts, strict=False):
            _draw_tile(sheet, pen, tile, lines, (left, top))
        top += height + GAP
    return sheet


def _tile_height(tile: Tile, lines: Sequence[str]) -> int:
    return tile.image.height + _lines_height(len(lines), CAPTION_SIZE)


def _draw_tile(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, lines: Sequence[str], corner: tuple[int, int]
) -> None:
    left, top = corner
    if tile.color:
        right, bottom = left + tile.image.width - 1, top + tile.image.height - 1
        box = (left - _FRAME, top - _FRAME, right + _FRAME, bottom + _FRAME)
        pen.rectangle(box, outline=tile.color, width=_FRAME - 1)
    sheet.paste(tile.image, corner)
    _write(pen, lines, left, top + tile.image.height + _FRAME, CAPTION_SIZE, FAINT)


def wrap(text: str, width: int, size: int, bold: bool = False) -> list[str]:
    """Breaks a text between words so that each line fits; a longer word is cut. A no-break space joins."""
    lines: list[str] = []
    for word in text.split(" ") if text else ():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(size, bold).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_cut(word, width, size, bold))
    return lines


def _cut(word: str, width: int, size: int, bold: bool) -> str:
    if font(size, bold).getlength(word) <= width:
        return word
    while len(word) > 1 and font(size, bold).getlength(word + "…") > width:
        word = word[:-1]
    return word + "…"


def _lines_height(count: int, size: int) -> int:
    return count * round(1.35 * size) + _SPACE if count else 0


def _write(
    pen: ImageDraw.ImageDraw,
    lines: Sequence[str],
    left: int,
    top: int,
    size: int,
    color: str,
    bold: bool = False,
) -> None:
    for number, line in enumerate(lines):
        pen.text((left, top + number * round(1.35 * size)), line, fill=color, font=font(size, bold))


def patch_mask(chosen: Any, grid: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """Patches (N,) bool of a grid of (rows, columns) as a mask of (width, height) pixels."""
    pixels = np.asarray(chosen).reshape(grid).astype(np.uint8) * 255
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
