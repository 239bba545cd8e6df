"""Centring and Sinkhorn-Knopp against the authors' values, and over several processes."""

import math

import pytest
import torch
from torch import Tensor

from hf_ssl.modeling.shared.centering import (
    PrototypeCenter,
    centered_targets,
    mean_logits,
    sinkhorn_targets,
)
from hf_ssl.modeling.shared.prototypes import PrototypeWeights
from tests.closeness import near, precision
from tests.distributed import run_processes
from tests.modeling.test_prototypes import all_targets, axes, unit


@precision
@pytest.mark.parametrize("rows", ["", "_patch"])
def test_sinkhorn_matches_the_authors_code(golden, rows, dtype, tolerance):
    """Mistake 26: prototypes before rows, over all rows of the step at once."""
    case = golden("dinov2")
    logits = case[f"sk{rows}_logits"].to(dtype)
    targets = sinkhorn_targets(logits, axes(logits.shape[1], dtype), case[f"sk{rows}_temp"].item())
    near(all_targets(targets), case[f"sk{rows}_probs"], tolerance)


@precision
@pytest.mark.parametrize("rows", ["cls", "patch"])
def test_centring_of_three_steps_matches_dinov2(golden, rows, dtype, tolerance):
    """Its update is lazy: folded in at the start of the next step, which is the same."""
    case = golden("dinov2")
    logits_of_steps = case[f"center_{rows}_logits"].to(dtype)
    center = PrototypeCenter(logits_of_steps.shape[-1]).to(dtype)
    directions = axes(logits_of_steps.shape[-1], dtype)
    for step, logits in enumerate(logits_of_steps):
        targets = centered_targets(logits, directions, center, case["temp"].item())
        near(all_targets(targets), case[f"center_{rows}_probs"][step], tolerance)
        center.update(mean_logits(logits.sum(dim=0), len(logits), directions), 0.9)
    near(center.value, case[f"center_{rows}_final"][0], tolerance)


def test_sinkhorn_uses_prototypes_alike_and_rows_sum_to_one():
    weights = PrototypeWeights(unit(16, 8, seed=1))
    targets = all_targets(sinkhorn_targets(unit(64, 8, seed=0), weights, 0.1, iterations=50))
    near(targets.sum(dim=1), torch.ones(64))
    near(targets.sum(dim=0), torch.full((16,), 4.0), 1e-6)


def test_sinkhorn_survives_logits_that_overflow_the_published_form():
    """Mistake 26: exp(400 / 0.04) is no float."""
    logits = torch.eye(6) * 400 + torch.arange(6.0)
    targets = all_targets(sinkhorn_targets(logits, axes(6, torch.float32), 0.04))
    assert targets.isfinite().all()
    near(targets.sum(dim=1), torch.ones(6), 1e-5)


def test_centre_is_of_raw_logits_and_keeps_the_old_value_by_its_momentum():
    """Mistake 2."""
    center = PrototypeCenter(3)
    center.value.copy_(torch.tensor([1.0, 2.0, 3.0]))
    center.update(torch.tensor([11.0, 2.0, -7.0]), 0.9)
    near(center.value, torch.tensor([2.0, 2.0, 2.0]), 1e-6)


def test_centre_of_no_rows_is_zero():
    near(mean_logits(torch.zeros(4), 0, PrototypeWeights(torch.ones(5, 4))), torch.zeros(5))


def test_targets_of_equal_logits_at_the_centre_are_uniform():
    center = PrototypeCenter(8).double()
    logits = torch.randn(1, 8, dtype=torch.float64)
    center.value.copy_(logits[0])
    targets = centered_targets(logits.expand(4, 8), axes(8), center, 0.04)
    near(targets.statistics()["target_entropy"], math.log(8))


def share_of_rows(rank: int, count: int, is_even: bool) -> slice:
    borders = [24 * index // count for index in range(count + 1)]
    if not is_even:
        borders = [0, 17, 17, 19, 24] if count == 4 else [0, 17, 24]
    return slice(borders[rank], borders[rank + 1])


def targets_of_this_process(is_even: bool) -> tuple[Tensor, Tensor]:
    import torch.distributed as dist

    started = dist.is_initialized()
    rank, count = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
    rows = unit(24, 8, seed=0)[share_of_rows(rank, count, is_even) if started else slice(None)]
    weights = PrototypeWeights(unit(16, 8, seed=1))
    return all_targets(sinkhorn_targets(rows, weights, 0.05)), mean_logits(rows.sum(0), len(rows), weights)


@pytest.mark.parametrize(("num_processes", "is_even"), [(2, True), (2, False), (4, False)])
def test_processes_equal_one_on_the_merged_rows(num_processes, is_even):
    """Mistakes 3 and 26: also with unequal numbers of rows, and with none in the second of four processes."""
    merged, mean = targets_of_this_process(is_even)
    results = run_processes(targets_of_this_process, is_even, num_processes=num_processes)
    near(torch.cat([targets for targets, _ in results]), merged)
    for _, own_mean in results:
        near(own_mean, mean)
