"""Tubes: blocks of patches hidden through the time of a clip, and what stays visible.

Source: Bardes et al. 2024 (arXiv 2404.08471), section 3.2 and appendix A; compared with the authors'
`multiblock3d.py`. Deliberate difference: all rows of a step are drawn at once, with the same distribution.
Shape suffixes: R = rows (clips) of a step, N = patches (time before row before column), K = patches of a
context, M = patches to predict.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ssl.modeling.shared.multi_block import kept_indices, place_in_group

COVER_ATTEMPTS = 1000  # to draw tubes again for clips of which they leave nothing
Grid = tuple[int, int, int]  # (time steps, rows, columns) of patches


@dataclass(frozen=True)
class TubeMasks:
    """One kind of mask for all rows of a step, on the CPU.

    Attributes:
        contexts: for each group of rows (group_size, K) int64, rising; K differs between groups.
        targets: likewise (group_size, M).
        group_size: consecutive rows of a group.
    """

    contexts: list[Tensor]
    targets: list[Tensor]
    group_size: int

    def of_rows(self, row_index: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts (B, K) and targets (B, M) of some rows, on the device of `row_index`.

        Raises:
            ValueError: they belong to several groups, whose masks have different sizes.
        """
        device = row_index.device
        group, rows = place_in_group(row_index.cpu(), self.group_size)
        return self.contexts[group][rows].to(device), self.targets[group][rows].to(device)


def draw_tube_size(
    grid: Grid, scale: float, aspect: Sequence[float], temporal_scale: float, generator: torch.Generator
) -> Grid:
    """Time steps, rows and columns of a tube; the draws of fixed scales are made and not used, as published.

    Args:
        grid: of the clip.
        scale: share of the patches of one time step.
        aspect: smallest and largest rows / columns.
        temporal_scale: share of the time steps.
        generator: three numbers are drawn.
    """
    _, _, place = (torch.rand(1, generator=generator).item() for _ in range(3))
    area = int(grid[1] * grid[2] * scale)
    ratio = aspect[0] + place * (aspect[1] - aspect[0])
    rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    steps = max(1, int(grid[0] * temporal_scale))
    return steps, max(min(rows, grid[1]), 1), max(min(columns, grid[2]), 1)


def draw_tubes(num_rows: int, num_tubes: int, size: Grid, grid: Grid, generator: torch.Generator) -> Tensor:
    """What `num_tubes` tubes of one size at uniform places cover together, (R, N) bool, True = covered."""
    inside = []
    for length, side in zip(size, grid, strict=True):
        offset = torch.randint(side - length + 1, (num_rows, num_tubes, 1), generator=generator)
        place = torch.arange(side)
        inside.append(((place >= offset) & (place < offset + length)).float())
    return torch.einsum("rkt,rky,rkx->rtyx", *inside).flatten(1) > 0


def draw_tube_masks(
    num_rows: int,
    grid: Grid,
    generator: torch.Generator,
    *,
    num_tubes: int,
    scale: float,
    aspect: Sequence[float],
    temporal_scale: float,
    truncation: str,
    group_size: int,
) -> TubeMasks:
    """Contexts and targets of all rows of a step; the size is drawn once, places for every row.

    Args:
        num_rows: R.
        grid: of the clips.
        generator: of (seed, step).
        num_tubes: tubes of a clip, whose union is hidden and to predict.
        scale: see `draw_tube_size`.
        aspect: likewise.
        temporal_scale: likewise.
        truncation: see `kept_indices`.
        group_size: consecutive rows whose lists are cut to one size.

    Raises:
        ValueError: tubes so large, or so many, that they leave no context.
    """
    size = draw_tube_size(grid, scale, aspect, temporal_scale, generator)
    covered_RN = draw_tubes(num_rows, num_tubes, size, grid, generator)
    attempts = 0
    while (is_full_R := covered_RN.all(dim=1)).any():
        attempts += 1
        if size == grid or attempts > COVER_ATTEMPTS:
            raise ValueError(
                f"{num_tubes} tubes of {size[0]} x {size[1]} x {size[2]} patches hide whole clips of "
                f"{grid[0]} x {grid[1]} x {grid[2]}; lower mask_scales or mask_num_tubes, or use smaller "
                "patches"
            )
        covered_RN[is_full_R] = draw_tubes(int(is_full_R.sum()), num_tubes, size, grid, generator)
    groups = covered_RN.split(group_size)
    contexts = [kept_indices(~group, truncation, generator) for group in groups]
    return TubeMasks(contexts, [kept_indices(group, truncation, generator) for group in groups], group_size)
