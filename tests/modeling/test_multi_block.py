"""Blocks of joint-embedding prediction against the authors' collator."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ssl.modeling.shared.multi_block import (
    BlockMasks,
    draw_block_masks,
    draw_block_size,
    draw_blocks,
    draw_contexts,
    kept_indices,
)
from tests.closeness import near

GRID = (14, 14)
PUBLISHED: dict[str, Any] = {
    "num_targets": 4,
    "target_scale": (0.15, 0.2),
    "target_aspect": (0.75, 1.5),
    "context_scale": (0.85, 1.0),
    "min_context_patches": 11,
    "reach_last": False,
    "truncation": "first",
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(num_rows: int, seed: int = 0, grid: tuple[int, int] = GRID, **changes: Any) -> BlockMasks:
    options = {**PUBLISHED, "group_size": num_rows, **changes}
    return draw_block_masks(num_rows, grid, seeded(seed), **options)


def cover(index: Tensor, num_patches: int = 196) -> Tensor:
    """Share of the index lists that hold each patch."""
    flat = index.reshape(-1, index.shape[-1])
    return torch.bincount(flat.flatten(), minlength=num_patches).double() / len(flat)


def test_sizes_are_the_authors_for_the_same_random_numbers(golden):
    """Target first, then context; one number decides on area and aspect (mistake 33: once a step)."""
    for seed, expected in enumerate(golden("ijepa")["mask.sizes_by_seed_predh_predw_ench_encw"].tolist()):
        generator = seeded(seed)
        target = draw_block_size(GRID, (0.15, 0.2), (0.75, 1.5), generator)
        assert [*target, *draw_block_size(GRID, (0.85, 1.0), (1.0, 1.0), generator)] == expected
        assert draw(2, seed).target_index.shape == (4, 2, expected[0] * expected[1])


def test_cover_and_lengths_are_the_authors(golden):
    """4,800 images in groups of 16, against as many of the authors' collator."""
    case = golden("ijepa")
    drawn = [draw(16, seed) for seed in range(1000, 1300)]
    context = torch.stack([cover(masks.contexts[0]) for masks in drawn]).mean(dim=0).view(GRID)
    target = torch.stack([cover(masks.target_index) for masks in drawn]).mean(dim=0).view(GRID)
    assert (context - case["mask.ctx_cover"]).abs().max() < 0.06
    assert (target - case["mask.tgt_cover"]).abs().max() < 0.03
    lengths = torch.tensor([masks.contexts[0].shape[1] for masks in drawn], dtype=torch.float64)
    near(lengths.mean(), case["mask.ctx_len_mean"], 4 / float(case["mask.ctx_len_mean"]))
    assert 0.7 < lengths.std() / case["mask.ctx_len_std"] < 1.4
    for table in (context, target):
        assert not table[-1].any() and not table[:, -1].any()


def test_the_last_row_and_column_are_reached_on_request():
    """Mistake 34: the authors' code leaves the last offset out."""
    masks = draw(512, reach_last=True)
    assert cover(masks.target_index).view(GRID)[-1, -1] > 0
    assert not cover(draw(512).target_index).view(GRID)[-1].any()


def test_blocks_are_whole_rectangles_at_every_allowed_offset():
    blocks = draw_blocks(2000, (2, 3), (4, 5), seeded()).unflatten(1, (4, 5))
    places = {tuple(block.nonzero().amin(0).tolist()) for block in blocks}
    assert places == {(top, left) for top in range(2) for left in range(2)}
    for block in blocks[:50]:
        top, left = block.nonzero().amin(0).tolist()
        assert block[top : top + 2, left : left + 3].all() and block.sum() == 6


def test_a_context_is_its_block_without_the_targets():
    masks = draw(64)
    context = torch.zeros(64, 196, dtype=torch.bool).scatter(1, masks.contexts[0], True)
    for index in masks.target_index:
        assert not context.gather(1, index).any()
    assert (masks.contexts[0].diff(dim=1) > 0).all() and (masks.target_index.diff(dim=2) > 0).all()


def test_a_context_that_stays_too_small_gives_up_its_last_targets_first():
    """Targets cover a grid of 4 x 4 but for one corner, the block is 3 x 3 at one of four places."""
    targets = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    targets[0, 0, :2], targets[0, 1, 2:] = True, True
    contexts = draw_contexts(targets.flatten(2), (3, 3), (4, 4), 2, seeded(), reach_last=True)
    grid = contexts[0].view(4, 4)
    assert grid.any() and not grid[:2].any()  # the second target was let in, the first kept out
    both = draw_contexts(torch.ones(1, 2, 16, dtype=torch.bool), (3, 3), (4, 4), 2, seeded())
    assert both.sum() == 9


def test_only_small_contexts_are_drawn_again():
    contexts = draw_contexts(
        draw_blocks(4 * 256, (4, 4), (8, 8), seeded(1)).unflatten(0, (256, 4)), (7, 7), (8, 8), 5, seeded()
    )
    assert contexts.sum(dim=1).min() >= 5


def test_truncation_keeps_the_first_or_random_patches_in_rising_order():
    is_kept = torch.tensor([[True] * 6 + [False] * 2, [False] * 5 + [True] * 3])
    assert kept_indices(is_kept, "first", seeded()).tolist() == [[0, 1, 2], [5, 6, 7]]
    rows = {tuple(kept_indices(is_kept, "random", seeded(seed))[0].tolist()) for seed in range(300)}
    assert len(rows) == 20  # all choices of 3 of 6
    assert all(list(row) == sorted(row) for row in rows)


def test_random_truncation_does_not_starve_the_lower_rows():
    """Fact 5: with "first", a patch below is seen less than one above."""
    shares = {}
    for truncation in ("first", "random"):
        drawn = [draw(64, seed, truncation=truncation) for seed in range(60)]
        table = torch.stack([cover(masks.contexts[0]) for masks in drawn]).mean(dim=0).view(GRID)
        shares[truncation] = float(table[10:13].mean() / table[:3].mean())
    assert shares["first"] < 0.6 and shares["random"] == pytest.approx(1, abs=0.15)


def test_groups_are_cut_on_their_own_and_a_micro_batch_lies_in_one():
    masks = draw(64, group_size=16)
    assert len({context.shape[1] for context in masks.contexts}) > 1
    context, target = masks.of_rows(torch.tensor([17, 30]))
    assert context.equal(masks.contexts[1][[1, 14]]) and target.equal(masks.target_index[:, [17, 30]])
    with pytest.raises(ValueError, match="spans 2 groups of mask_group_size 16"):
        masks.of_rows(torch.tensor([15, 16]))


@pytest.mark.parametrize(
    ("grid", "message"),
    [((4, 4), "context block of 3 x 3 patches has fewer than min_context_patches 11"), ((1, 9), "2 x 2")],
)
def test_grids_that_are_too_small_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        draw(4, grid=grid)
