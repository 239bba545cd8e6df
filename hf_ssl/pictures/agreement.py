"""How well hidden tokens were predicted, patch by patch: the cosine of prediction and target.

Shape suffixes: B = images, N = patches, h, w = grid of patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_ssl.pictures.attention import heat
from hf_ssl.pictures.canvas import UNSEEN, Tile, draw_grid, fit, patch_mask


def draw_agreement(
    images: Sequence[Any],
    is_context: Tensor,
    agreement: Tensor,
    grid: tuple[int, int],
    *,
    title: str = "Predicted and true tokens",
) -> Image.Image:
    """Draws each image, the context that was seen, and the cosine of every predicted token with its target.

    Args:
        images: what was predicted from, as the model saw it; whatever `decode_image` takes.
        is_context: (B, N) bool, patches that the student saw.
        agreement: (B, N) cosines, NaN where nothing was predicted; several predictions of a patch averaged.
        grid: (rows, columns) of patches.
        title: above the sheet.

    Returns:
        One row of three pictures per image; cosines from 0, dark, to 1, bright, and their mean below.

    Raises:
        ValueError: the numbers of images, patches and grid cells do not agree.
    """
    if not is_context.shape == agreement.shape == (len(images), grid[0] * grid[1]):
        raise ValueError(
            f"context {tuple(is_context.shape)} and agreement {tuple(agreement.shape)} must both be "
            f"({len(images)} images, {grid[0]} x {grid[1]} patches)"
        )
    rows = []
    for index, image in enumerate(images):
        picture = fit(image)
        gray = Image.new("RGB", picture.size, (UNSEEN,) * 3)
        known = agreement[index].isfinite()
        # One patch more, of cosine 1, gives all images one scale.
        scaled = torch.cat([agreement[index].nan_to_num().clamp(0, 1), torch.ones(1)])
        colors = Image.fromarray(heat(scaled[None])[:, :-1].reshape(*grid, 3))
        colors = colors.resize(picture.size, Image.Resampling.NEAREST)
        seen = Image.composite(picture, gray, patch_mask(is_context[index], grid, picture.size))
        cosines = Image.composite(colors, gray, patch_mask(known, grid, picture.size))
        mean = agreement[index][known].mean().item()
        rows.append([Tile(picture), Tile(seen), Tile(cosines, f"mean {mean:.2f}")])
    return draw_grid(rows, title=title, headings=["image", "context", "cosine"])
