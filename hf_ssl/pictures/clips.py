"""Clips, the tubes hidden from the student, and how well their tokens were predicted.

Shape suffixes: B = clips, T = frames, N = patches, t, h, w = grid of patches.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from hf_ssl.pictures.attention import heat
from hf_ssl.pictures.canvas import UNSEEN, Tile, draw_grid, fit, patch_mask


def draw_clips(
    clips: Tensor,
    kinds: Sequence[tuple[Tensor, Tensor]],
    grid: tuple[int, int, int],
    *,
    title: str = "Clips, what the student saw of them, and the cosine of predicted and true tokens",
) -> Image.Image:
    """Draws each clip, and for each kind of mask the context and the cosine of every predicted token.

    Args:
        clips: uint8 (B, T, 3, H, W).
        kinds: of each kind of mask (B, N) bool, patches that the student saw, and (B, N) cosines of
            prediction and target, NaN where nothing was predicted.
        grid: (time steps, rows, columns) of patches.
        title: above the sheet.

    Returns:
        For each clip a row of frames, the first of each time step, and below two rows for each kind; cosines
        from 0, dark, to 1, bright, and their mean below.

    Raises:
        ValueError: the numbers of clips, patches and grid cells do not agree.
    """
    shape = (len(clips), grid[0] * grid[1] * grid[2])
    for is_context, cosines in kinds:
        if not is_context.shape == cosines.shape == shape:
            raise ValueError(
                f"context {tuple(is_context.shape)} and cosines {tuple(cosines.shape)} must both be "
                f"({len(clips)} clips, {grid[0]} x {grid[1]} x {grid[2]} patches)"
            )
    rows = []
    for index, clip in enumerate(clips):
        frames = [fit(frame.permute(1, 2, 0).numpy()) for frame in clip[:: len(clip) // grid[0]]]
        rows.append([Tile(frame) for frame in frames])
        for is_context, cosines in kinds:
            rows += _rows_of_kind(frames, is_context[index], cosines[index], grid)
    return draw_grid(rows, title=title, headings=[f"step {number + 1}" for number in range(grid[0])])


def _rows_of_kind(
    frames: list[Image.Image], is_context_N: Tensor, cosine_N: Tensor, grid: tuple[int, int, int]
) -> list[list[Tile]]:
    size, space = frames[0].size, grid[1:]
    gray = Image.new("RGB", size, (UNSEEN,) * 3)
    seen = [
        Tile(Image.composite(frame, gray, patch_mask(is_context, space, size)))
        for frame, is_context in zip(frames, is_context_N.view(grid), strict=True)
    ]
    known_N = cosine_N.isfinite()
    # One patch more, of cosine 1, gives all pictures one scale.
    scaled = torch.cat([cosine_N.nan_to_num().clamp(0, 1), torch.ones(1)])
    colors = heat(scaled[None])[:, :-1].reshape(*grid, 3)
    cosines = []
    for color, known, cosine in zip(colors, known_N.view(grid), cosine_N.view(grid), strict=True):
        picture = Image.fromarray(color).resize(size, Image.Resampling.NEAREST)
        caption = f"mean {cosine[known].mean().item():.2f}" if known.any() else ""
        cosines.append(Tile(Image.composite(picture, gray, patch_mask(known, space, size)), caption))
    return [seen, cosines]
