"""Which patches an encoder sees. True in a boolean mask means hidden.

Shape suffixes: B = images, N = patches, M = kept patches.
"""

import math
import random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_ATTEMPTS = 10
_LOG_ASPECT = math.log(1 / 0.3)


def num_kept_patches(num_patches: int, mask_ratio: float) -> int:
    """Patches left visible: `int(num_patches * (1 - mask_ratio))` in float arithmetic, as published.

    Args:
        num_patches: patches of an image.
        mask_ratio: hidden share, in [0, 1).

    Returns:
        At least 1.

    Raises:
        ValueError: `mask_ratio` outside [0, 1), or so high that nothing stays visible.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie in [0, 1), got {mask_ratio}")
    # int, not round, and 1 - ratio first: 10 patches at 0.9 keep int(0.99...) = 0 in the official code.
    num_kept = int(num_patches * (1 - mask_ratio))
    if num_kept == 0:
        raise ValueError(
            f"mask_ratio {mask_ratio} hides all {num_patches} patches; lower it or use smaller patches"
        )
    return num_kept


def random_masking(noise_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the patches with the smallest noise in every image.

    Args:
        noise_BN: uniform noise, one value per patch.
        num_kept: patches to keep, M.

    Returns:
        `kept_index_BM` (int64, in order of rising noise), `restore_index_BN` (int64: entry n of the original
        order is found at this place of [kept, hidden]) and `is_masked_BN` (bool, True = hidden).

    Raises:
        ValueError: `num_kept` is not between 1 and N.
    """
    if not 1 <= num_kept <= noise_BN.shape[1]:
        raise ValueError(f"num_kept must lie in [1, {noise_BN.shape[1]}], got {num_kept}")
    shuffle_index_BN = noise_BN.argsort(dim=1)
    restore_index_BN = torch.empty_like(shuffle_index_BN)
    order_BN = torch.arange(noise_BN.shape[1], device=noise_BN.device).expand_as(shuffle_index_BN)
    restore_index_BN.scatter_(1, shuffle_index_BN, order_BN)
    return shuffle_index_BN[:, :num_kept], restore_index_BN, restore_index_BN >= num_kept


def block_mask(
    grid: tuple[int, int], target: float, min_area: float, max_area: float, generator: random.Random
) -> Tensor:
    """Hide rectangles until `target` patches are hidden, or none fits any more.

    Bao et al. 2021 (arXiv 2106.08254), Algorithm 1, as iBOT's and DINOv2's code has it: a rectangle has an
    area drawn from [min_area, min(what is missing, max_area)], a log-uniform aspect in [0.3, 1 / 0.3], and is
    smaller than the grid on both sides; ten are tried before giving up.

    Args:
        grid: (rows, columns) of patches.
        target: patches to hide, at most; need not be whole.
        min_area: smallest area asked for; where less than it is missing, the bounds change places.
        max_area: largest area, and most patches that one rectangle may add.
        generator: of all random numbers.

    Returns:
        (rows, columns) bool, True = hidden.
    """
    mask = np.zeros(grid, dtype=bool)
    count = 0
    while count < target:
        added = _hide_rectangle(mask, grid, min_area, min(target - count, max_area), generator)
        if not added:
            break
        count += added
    return torch.from_numpy(mask)


def _hide_rectangle(
    mask: NDArray[np.bool_], grid: tuple[int, int], min_area: float, limit: float, generator: random.Random
) -> int:
    """Patches newly hidden by the first of ten rectangles that adds 1 to `limit` of them; 0: none did."""
    for _ in range(BLOCK_ATTEMPTS):
        area = generator.uniform(min_area, limit)
        aspect = math.exp(generator.uniform(-_LOG_ASPECT, _LOG_ASPECT))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid[0] or width >= grid[1]:
            continue
        top, left = generator.randint(0, grid[0] - height), generator.randint(0, grid[1] - width)
        rectangle = mask[top : top + height, left : left + width]
        num_fresh = rectangle.size - int(np.count_nonzero(rectangle))
        if 0 < num_fresh <= limit:
            rectangle[:] = True
            return num_fresh
    return 0


def fill_up(mask: Tensor, target: int, generator: random.Random) -> Tensor:
    """Hide random further patches of a mask (rows, columns) until exactly `target` are hidden (BEiT v2)."""
    filled = mask.flatten().clone()
    visible = (~filled).nonzero().flatten().tolist()
    missing = target - (len(filled) - len(visible))
    filled[generator.sample(visible, max(missing, 0))] = True
    return filled.view(mask.shape)


def random_mask(grid: tuple[int, int], target: float, generator: random.Random) -> Tensor:
    """Hide exactly int(target) patches, (rows, columns) bool."""
    num_patches = grid[0] * grid[1]
    mask = torch.zeros(num_patches, dtype=torch.bool)
    mask[generator.sample(range(num_patches), int(target))] = True
    return mask.view(grid)


def generator_of_row(seed: int, step: int, row: int) -> random.Random:
    """Random numbers of one image of a step: the same in every process, so that each draws its rows alone."""
    return random.Random(f"{seed} {step} {row}")  # a text: sums of numbers would repeat across steps


def stratified_counts(
    num_views: int,
    num_patches: int,
    probability: float,
    ratios: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """How many patches to hide in each view of a step, by strata, so that a step has every ratio.

    DINOv2's `collate.py`: of the views int(num_views * probability) get a mask; each has its own part of the
    range of ratios, and the parts are dealt to the views at random.

    Args:
        num_views: all views of the step.
        num_patches: of a view.
        probability: share of masked views.
        ratios: lowest and highest share of hidden patches.
        generator: of (seed, step).

    Returns:
        (num_views,) int64; 0 for views without a mask.
    """
    num_masked = int(num_views * probability)
    borders = torch.linspace(*ratios, num_masked + 1, dtype=torch.float64)
    place = torch.rand(num_masked, generator=generator, dtype=torch.float64)
    counts = torch.zeros(num_views, dtype=torch.int64)
    counts[:num_masked] = (num_patches * (borders[:-1] + place * borders.diff())).long()
    return counts[torch.randperm(num_views, generator=generator)]
