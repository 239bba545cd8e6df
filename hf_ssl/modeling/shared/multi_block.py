"""Context and target blocks of joint-embedding prediction, as index lists of the patches they keep.

Source: Assran et al. 2023 (arXiv 2301.08243), section 3 and appendix A; compared with the authors'
`multiblock.py`. Deliberate differences: all rows of a step are drawn at once, with the same distribution; a
target of few patches is kept, where the authors' code would draw its offset again for ever.
Shape suffixes: R = rows (images) of a step, T = target blocks of an image, N = patches in row-major order,
M = patches of a target block, K = patches of a context.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONTEXT_ATTEMPTS = 20  # before one target fewer is kept out of a context
TRUNCATIONS = ("first", "random")

Range = Sequence[float]


@dataclass(frozen=True)
class BlockMasks:
    """Blocks of all rows of a step, on the CPU.

    Attributes:
        contexts: for each group of rows (group_size, K) int64, rising; K differs between groups.
        target_index: (T, R, M) int64, rising.
        group_size: consecutive rows of a group.
    """

    contexts: list[Tensor]
    target_index: Tensor
    group_size: int

    def of_rows(self, row_index: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts (B, K) and targets (T, B, M) of some rows, on the device of `row_index`.

        Raises:
            ValueError: they belong to several groups, whose contexts have different sizes.
        """
        device, row_index = row_index.device, row_index.cpu()
        group, rows = place_in_group(row_index, self.group_size)
        return self.contexts[group][rows].to(device), self.target_index[:, row_index].to(device)


def place_in_group(row_index_B: Tensor, group_size: int) -> tuple[int, Tensor]:
    """The group of consecutive rows that all these rows are of, and their numbers in it (B,).

    Raises:
        ValueError: they belong to several groups, whose masks have different sizes.
    """
    groups = (row_index_B // group_size).unique()
    if len(groups) != 1:
        raise ValueError(
            f"a micro-batch of {len(row_index_B)} rows spans {len(groups)} groups of mask_group_size "
            f"{group_size}; make it a multiple of the micro-batch, or leave it out"
        )
    return int(groups), row_index_B % group_size


def draw_block_size(
    grid: tuple[int, int], scale: Range, aspect: Range, generator: torch.Generator
) -> tuple[int, int]:
    """Height and width of a block; one random number decides on both area and aspect.

    Args:
        grid: (rows, columns) of patches.
        scale: smallest and largest share of the patches.
        aspect: smallest and largest height / width.
        generator: one number is drawn.

    Returns:
        Each at least 1 and less than the grid's side.
    """
    place = torch.rand(1, generator=generator).item()
    area = int(grid[0] * grid[1] * (scale[0] + place * (scale[1] - scale[0])))
    ratio = aspect[0] + place * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return max(min(height, grid[0] - 1), 1), max(min(width, grid[1] - 1), 1)


def draw_blocks(
    num_blocks: int,
    size: tuple[int, int],
    grid: tuple[int, int],
    generator: torch.Generator,
    *,
    reach_last: bool = False,
) -> Tensor:
    """Blocks of one size at uniform offsets.

    Args:
        num_blocks: how many.
        size: (height, width).
        grid: (rows, columns) of patches, larger on both sides.
        generator: of the offsets.
        reach_last: draw the last offset too; the authors' code leaves it out.

    Returns:
        (num_blocks, N) bool, True = inside.
    """
    inside = []
    for length, side in zip(size, grid, strict=True):
        offset = torch.randint(side - length + int(reach_last), (num_blocks, 1), generator=generator)
        place = torch.arange(side)
        inside.append((place >= offset) & (place < offset + length))
    return (inside[0][:, :, None] & inside[1][:, None, :]).flatten(1)


def draw_contexts(
    targets_RTN: Tensor,
    size: tuple[int, int],
    grid: tuple[int, int],
    min_patches: int,
    generator: torch.Generator,
    *,
    reach_last: bool = False,
) -> Tensor:
    """A context block for every row, without the row's targets.

    A context of fewer than `min_patches` is drawn again; after each 20 attempts the last target that is still
    kept out may overlap with it.

    Args:
        targets_RTN: bool, True = target.
        size: (height, width) of the blocks.
        grid: (rows, columns) of patches.
        min_patches: of a context.
        generator: of the offsets.
        reach_last: see `draw_blocks`.

    Returns:
        (R, N) bool, True = context.

    Raises:
        ValueError: a whole block has fewer than `min_patches`.
    """
    if size[0] * size[1] < min_patches:
        raise ValueError(
            f"a context block of {size[0]} x {size[1]} patches has fewer than min_context_patches "
            f"{min_patches}; lower it, or use smaller patches or a larger context_scale"
        )
    num_rows, num_targets, num_patches = targets_RTN.shape
    contexts_RN = torch.zeros(num_rows, num_patches, dtype=torch.bool)
    open_rows = torch.arange(num_rows)
    attempts = 0
    while len(open_rows):  # with no target left to avoid, every block is large enough
        num_avoided = max(num_targets - attempts // CONTEXT_ATTEMPTS, 0)
        is_free = ~targets_RTN[open_rows, :num_avoided].any(dim=1)
        blocks = draw_blocks(len(open_rows), size, grid, generator, reach_last=reach_last)
        contexts_RN[open_rows] = blocks & is_free
        open_rows = open_rows[(blocks & is_free).sum(dim=1) < min_patches]
        attempts += 1
    return contexts_RN


def kept_indices(is_kept_RN: Tensor, truncation: str, generator: torch.Generator) -> Tensor:
    """Rising indices (R, K) of the kept patches, cut to the row that has the fewest.

    Args:
        is_kept_RN: bool.
        truncation: "first" keeps the first patches of a row, "random" any.
        generator: of "random".
    """
    num_kept = int(is_kept_RN.sum(dim=1).min())
    if truncation == "random":
        order_RN = torch.rand(is_kept_RN.shape, generator=generator)
    else:
        order_RN = torch.linspace(0, 1, is_kept_RN.shape[1]).expand_as(is_kept_RN)
    chosen_RK = order_RN.masked_fill(~is_kept_RN, 2.0).argsort(dim=1)[:, :num_kept]
    return chosen_RK.sort(dim=1).values


def draw_block_masks(
    num_rows: int,
    grid: tuple[int, int],
    generator: torch.Generator,
    *,
    num_targets: int,
    target_scale: Range,
    target_aspect: Range,
    context_scale: Range,
    min_context_patches: int,
    reach_last: bool,
    truncation: str,
    group_size: int,
) -> BlockMasks:
    """Targets and contexts of all rows of a step; block sizes are drawn once, offsets for every row.

    Args:
        num_rows: R.
        grid: (rows, columns) of patches, at least two each.
        generator: of (seed, step).
        num_targets: T.
        target_scale: share of the patches in a target block.
        target_aspect: height / width of a target block.
        context_scale: share of the patches in a context block, whose aspect is 1.
        min_context_patches: see `draw_contexts`.
        reach_last: see `draw_blocks`.
        truncation: see `kept_indices`.
        group_size: consecutive rows whose contexts are cut to one size.

    Raises:
        ValueError: the grid is too small.
    """
    if min(grid) < 2:
        raise ValueError(f"blocks need at least 2 x 2 patches, got a grid of {grid[0]} x {grid[1]}")
    target_size = draw_block_size(grid, target_scale, target_aspect, generator)
    context_size = draw_block_size(grid, context_scale, (1.0, 1.0), generator)
    targets = draw_blocks(num_rows * num_targets, target_size, grid, generator, reach_last=reach_last)
    targets_RTN = targets.unflatten(0, (num_rows, num_targets))
    contexts_RN = draw_contexts(
        targets_RTN, context_size, grid, min_context_patches, generator, reach_last=reach_last
    )
    contexts = [kept_indices(group, truncation, generator) for group in contexts_RN.split(group_size)]
    target_index_RTM = targets.nonzero()[:, 1].view(num_rows, num_targets, -1)
    return BlockMasks(contexts, target_index_RTM.transpose(0, 1), group_size)
