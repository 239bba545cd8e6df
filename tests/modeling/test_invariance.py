"""A step depends on its images alone: not on how many processes and micro-batches they are dealt to.

The matrix itself is `tests/invariance.py`; a row of `tests/modeling/tiny.py` gives a method all of it.
"""

import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_ssl.data.loader import TrainLoader
from hf_ssl.data.views import ViewMaker
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.pretraining import generator_of_step
from hf_ssl.training.batch_checks import has_own_statistics
from tests.closeness import near
from tests.distributed import run_processes
from tests.invariance import (
    IN_ONE_PROCESS,
    IN_TWO_PROCESSES,
    NUM_STEPS,
    ONE,
    ONE_FROZEN,
    Layout,
    Measurement,
    applies,
    deviations,
    measure,
    measure_in_processes,
    verdict,
    was_said,
)
from tests.modeling.tiny import BY_NAME, ONE_OF_EACH, TINY_METHODS, TinyMethod, gradients, run_step

TOLERANCE = 1e-9

OTHER_ROWS = [row for row in TINY_METHODS if row not in ONE_OF_EACH]


def cells(rows: list[TinyMethod], layouts: list[Layout]) -> list[tuple[str, Layout]]:
    return [(row.name, layout) for row in rows for layout in layouts if applies(row, layout)]


def over(chosen: list[tuple[str, Layout]]) -> pytest.MarkDecorator:
    names = [f"{name}: {layout.name}" for name, layout in chosen]
    return pytest.mark.parametrize(("name", "layout"), chosen, ids=names)


@cache
def one_process(name: str, frozen_norms: bool) -> Measurement:
    return measure(name, ONE_FROZEN if frozen_norms else ONE)


def assert_as_announced(name: str, layout: Layout, result: Measurement | str) -> None:
    """Equal to one process with one batch, or different and said so, or refused; in the mode it claims."""
    outcome, words = verdict(BY_NAME[name], layout)
    if outcome == "refused":
        assert isinstance(result, str) and re.search(words, result), result
        return
    assert isinstance(result, Measurement), result
    assert_mode(layout, result.facts)
    found = deviations(result, one_process(name, layout.frozen_norms))
    assert {"loss", "gradients", "student"} <= found.keys()
    if outcome == "equal":
        assert max(found.values()) < TOLERANCE, found
    else:
        assert found["loss"] > 1e-6
        assert layout.sharded or was_said(words, result.warnings), result.warnings


def assert_mode(layout: Layout, facts: dict[str, Any]) -> None:
    assert facts["processes"] == layout.num_processes
    if layout.sharded:
        assert not facts["whole parameters"] and "student" in facts["sharded branches"]
        return
    rows = layout.cached_microbatch_size or layout.batch_size
    forwards = 2 * layout.batch_size // rows if layout.cached_microbatch_size else layout.num_micro_batches
    assert facts["dtype"] == "torch.float64"
    assert facts["micro-batches"] == layout.num_micro_batches
    assert (facts["rows of a forward"], facts["forwards"]) == ({rows}, NUM_STEPS * forwards)
    if layout.num_processes == 1:
        assert (facts["distributed type"], facts["averages"]) == ("NO", 0)
        return
    assert (facts["distributed type"], facts["wrapper"]) == ("MULTI_CPU", "DistributedDataParallel")
    assert facts["averages"] == NUM_STEPS  # once a step, however many micro-batches
    assert facts["finds unused parameters"] is False and facts["broadcasts buffers"] is False


# The matrix


@over(cells(TINY_METHODS, IN_ONE_PROCESS))
def test_micro_batches_equal_one_batch(name: str, layout: Layout):
    result: Measurement | str
    try:
        result = measure(name, layout)
    except ValueError as error:
        result = str(error)
    assert_as_announced(name, layout, result)


def both_processes(rows: list[TinyMethod]) -> dict[tuple[str, Layout], list[Any]]:
    chosen = cells(rows, IN_TWO_PROCESSES)
    return dict(zip(chosen, zip(*measure_in_processes(chosen), strict=True), strict=True))  # type: ignore


@pytest.fixture(scope="module")
def one_of_each() -> dict[tuple[str, Layout], list[Any]]:
    return both_processes(ONE_OF_EACH)


@pytest.fixture(scope="module")
def the_others() -> dict[tuple[str, Layout], list[Any]]:
    return both_processes(OTHER_ROWS)


@over(cells(ONE_OF_EACH, IN_TWO_PROCESSES))
def test_two_processes_equal_one(name: str, layout: Layout, one_of_each: Any):
    assert_processes(name, layout, one_of_each[name, layout])


@pytest.mark.slow
@over(cells(OTHER_ROWS, IN_TWO_PROCESSES))
def test_two_processes_of_the_other_forms_equal_one(name: str, layout: Layout, the_others: Any):
    assert_processes(name, layout, the_others[name, layout])


def assert_processes(name: str, layout: Layout, results: list[Any]) -> None:
    """Mistake 56 among others: a process that began with another queue, or enqueued its own keys only."""
    assert len(results) == 2
    for result in results:
        assert_as_announced(name, layout, result)
    if isinstance(results[0], Measurement):
        between = deviations(results[1], results[0])
        if has_own_statistics(BY_NAME[name].build()):
            between.pop("BatchNorm statistics")
        assert not any(between.values()), between


def test_state_of_a_method_is_compared_whole():
    """The matrix would not see a part of the state that `deviations` skips."""
    model = BY_NAME["moco-v2"].build()
    values = one_process("moco-v2", False).values
    compared = {name for part in values.values() for name in part}
    assert model.state_dict().keys() <= compared
    assert {"loss", "gradients", "student", "teacher", "queue"} == values.keys()
    assert "masks" in one_process("mae", False).values


def test_deviations_see_what_is_missing_or_moved():
    values = {"queue": {"keys": torch.zeros(2)}}
    one = Measurement(values, {})
    assert deviations(Measurement({"queue": {"keys": torch.tensor([0.0, 0.5])}}, {}), one) == {"queue": 0.5}
    assert deviations(Measurement({}, {}), one) == {"queue": float("inf")}


# BatchNorm on several devices, and on one that stands for several


def steps_with_own_batch_norm(splits: int, order: list[int] | None = None) -> dict[str, Tensor]:
    """Two steps of MoCo on this process's images, or on all in another `order`; means over processes."""
    started = dist.is_initialized()
    rank, count = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
    row = BY_NAME["moco-v2-splits"]
    model = row.build(batch_norm_splits=splits).double()
    losses = []
    for step in range(2):
        images = row.images(16, seed=step, dtype=torch.float64)
        own = images[order] if order is not None else images.chunk(count)[rank]
        losses.append(run_step(model, [own], step, rank=rank, num_processes=count))
    result = {f"gradient {name}": value for name, value in gradients(model).items()}
    result |= {name: value for name, value in model.state_dict().items() if "running" in name}
    result["loss"] = torch.tensor(losses, dtype=torch.float64)
    for value in result.values() if started else ():
        dist.all_reduce(value)
        value /= count
    return result | {"queue": model.queue.keys.clone()}


def test_two_groups_of_one_device_equal_two_devices_with_their_own_batch_norm(monkeypatch):
    """Row n of one device belongs to group n mod 2, so image i of device d is its row 2i + d."""
    per_device = run_processes(steps_with_own_batch_norm, 1)
    row_of_image = torch.tensor([2 * (image % 8) + image // 8 for image in range(16)])
    order = row_of_image.argsort().tolist()
    permutations = [torch.randperm(16, generator=generator_of_step(3, step)) for step in range(2)]
    dealt = iter([row_of_image[permutation].view(2, 8).T.flatten() for permutation in permutations])
    monkeypatch.setattr(torch, "randperm", lambda count, generator: next(dealt))
    grouped = steps_with_own_batch_norm(2, order)
    queue = grouped.pop("queue")
    for step in range(2):
        keys = queue[16 * step : 16 * step + 16]
        for result in per_device:
            near(result["queue"][16 * step : 16 * step + 16], keys[row_of_image])
    for result in per_device:
        for name, value in grouped.items():
            near(result[name], value)


# Views


def test_views_depend_on_seed_epoch_and_sample_alone(numbered_loader):
    """The same pixels in every epoch whatever batch, process or worker a sample falls to."""
    alone = numbered_loader(batch_size=8)
    for layout in (
        {"batch_size": 4},
        {"batch_size": 2, "world_size": 2},
        {"batch_size": 4, "num_workers": 2},
    ):
        together = {}
        for rank in range(layout.get("world_size", 1)):
            together |= numbered_loader(rank=rank, **layout)
        assert together.keys() == alone.keys()
        assert all(torch.equal(pixels, alone[key]) for key, pixels in together.items())
    other = numbered_loader(batch_size=8, seed=1)
    assert not any(torch.equal(pixels, alone[key]) for key, pixels in other.items())


@pytest.fixture
def numbered_loader():
    """Views of two epochs by (epoch, sample)."""
    from tests.training.conftest import make_source

    source = make_source(16)
    maker = ViewMaker(METHODS["simclr"].processor_class.default_views(16))

    def load(**options: Any) -> dict[tuple[int, int], Tensor]:
        loader = TrainLoader([source], maker, **{"seed": 0, **options})
        found = {}
        for index, batch in zip(range(2 * (loader.batches_per_epoch or 0)), loader, strict=False):
            epoch = index // loader.batches_per_epoch
            for sample, pixels in zip(batch["sample_id"].tolist(), batch["pixel_values"], strict=True):
                found[epoch, sample] = pixels
        return found

    return load
