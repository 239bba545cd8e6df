"""The order of a stream: every row once an epoch, any position at once, disjoint shares, exact mixtures."""

import datasets
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hf_ssl.data.columns import Columns, DataError, Row
from hf_ssl.data.mixture import CYCLE_ROWS, Mixture
from hf_ssl.data.readers import SHARD_BITS, ImageSource, IndexedSource, SequentialSource
from hf_ssl.data.stream import EpochOrder, Plan, make_plan


class NumberedSource(IndexedSource):
    """Rows without images, in units of the given sizes."""

    def __init__(self, unit_sizes: list[int], block_rows: int = 50):
        super().__init__("numbers", Columns("image"), np.array(unit_sizes), "made up")
        self.block_rows = block_rows
        self.held: dict[object, np.ndarray] = {}

    def row(self, index: int) -> Row:
        assert 0 <= index < self.num_rows
        return {"image": index}

    def row_name(self, index: int) -> str:
        return str(index)

    def hold(self, owner: object, indices: np.ndarray) -> None:
        self.held[owner] = indices


def sequential(shard_sizes: list[int]) -> SequentialSource:
    def generate(shards: list[int]):
        for size in shards:
            yield from ({"image": b""} for _ in range(size))

    features = datasets.Features({"image": datasets.Value("binary")})
    stream = datasets.IterableDataset.from_generator(generate, features, gen_kwargs={"shards": shard_sizes})
    return SequentialSource("numbers", stream, Columns("image"))


def plan_of(sources: list[ImageSource], weights: list[float] | None = None, **options: int) -> Plan:
    return make_plan(sources, weights, **{"seed": 0, "batch_size": 8, "rank": 0, "world_size": 1, **options})


def rows_of(plan: Plan, batch: int) -> list[tuple[int, int, int]]:
    """Source, epoch and row of every place in a batch."""
    samples = [(slot.source, slot.share.sample(slot.position)) for slot in plan.slots(batch)]
    return [(source, sample.epoch, sample.row_index) for source, sample in samples]


@pytest.mark.parametrize("unit_sizes", [[7], [1] * 30, [10, 1, 25, 4, 10], [0, 5, 0, 3]])
def test_blocks_of_any_cut_hold_every_row_once(unit_sizes: list[int]):
    num_rows = sum(unit_sizes)
    order = EpochOrder(np.array(unit_sizes), (3, 0))
    for epoch in range(4):
        for step in (1, 3, num_rows):
            cuts = [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
            rows = np.concatenate([order.block(epoch, *cut) for cut in cuts])
            assert_array_equal(np.sort(rows), np.arange(num_rows))


def test_block_reads_few_units():
    order = EpochOrder(np.full(100, 10), (0, 0))
    assert len(np.unique(order.block(0, 400, 450) // 10)) in (5, 6)


def test_order_changes_with_the_epoch_and_with_the_seed():
    orders = [EpochOrder(np.full(9, 5), (seed, 0)).block(epoch, 0, 45) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(("num_rows", "world_size"), [(100, 1), (100, 3), (5_000, 2), (4_999, 2)])
def test_ranks_share_an_epoch_without_overlap_and_drop_less_than_one_global_batch(
    num_rows: int, world_size: int
):
    plans = [
        plan_of([NumberedSource([10] * (num_rows // 10) + [num_rows % 10])], rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = num_rows // (8 * world_size)
    assert [plan.batches_per_epoch for plan in plans] == [batches] * world_size
    for epoch in range(3):
        seen = [rows_of(plan, epoch * batches + batch) for batch in range(batches) for plan in plans]
        rows = [row for batch in seen for _, _, row in batch]
        assert {epoch_seen for batch in seen for _, epoch_seen, _ in batch} == {epoch}
        assert len(set(rows)) == len(rows) == batches * 8 * world_size
        assert num_rows - len(rows) < 8 * world_size


def test_batches_larger_than_blocks_and_fewer_than_lanes_hold_every_row_once():
    plan = plan_of([NumberedSource([10] * 400)], batch_size=1333)
    rows = [row for batch in range(3) for _, _, row in rows_of(plan, batch)]
    assert len(set(rows)) == len(rows) == 3 * 1333
    assert {epoch for _, epoch, _ in rows_of(plan, 3)} == {1}


def test_dropped_rows_of_one_row_group_are_others_every_epoch():
    plan = plan_of([NumberedSource([15], block_rows=4)])
    seen = {row for epoch in range(40) for _, _, row in rows_of(plan, epoch)}
    assert seen == set(range(15))


def test_any_batch_is_the_same_without_those_before():
    source = NumberedSource([10] * 300)
    in_order = [rows_of(plan, batch) for plan in [plan_of([source])] for batch in range(800)]
    for batch in (0, 1, 374, 375, 376, 799):  # an epoch has 375
        assert rows_of(plan_of([source]), batch) == in_order[batch]


def test_workers_up_to_the_lanes_read_their_own_part():
    sources = [NumberedSource([10] * 400) for _ in range(2)]
    for worker, source in enumerate(sources):
        plan = plan_of([source])
        for batch in range(worker, 500, 2):
            rows_of(plan, batch)
            source.seen = getattr(source, "seen", set()).union(*(set(rows) for rows in source.held.values()))
    assert len(sources[0].seen) + len(sources[1].seen) <= 4000 + 2 * 50


def test_replacements_of_a_row_are_all_rows_of_its_block_and_never_its_neighbours_first():
    plan = plan_of([NumberedSource([50])])
    slot = plan.slots(0)[3]
    length = slot.share.block_length(slot.position)
    tried = [slot.share.sample(slot.position, attempt).row_index for attempt in range(length)]
    assert len(set(tried)) == length == 48
    assert tried[1] not in [row for _, _, row in rows_of(plan, 0)]


def test_cycle_of_a_mixture_is_exact_and_counts_each_source_on():
    mixture = Mixture(np.array([3, 1]), (0,))
    located = [mixture.locate(row) for row in range(40)]
    for source, expected in ((0, 30), (1, 10)):
        assert [position for which, position in located if which == source] == list(range(expected))
    assert len({tuple(source for source, _ in located[start : start + 4]) for start in range(0, 40, 4)}) > 1


def test_mixture_keeps_weights_and_epochs_of_each_source():
    plan = plan_of([NumberedSource([10] * 30), NumberedSource([10] * 10)], [0.5, 0.5], batch_size=64)
    rows = [row for batch in range(CYCLE_ROWS // 64) for row in rows_of(plan, batch)]
    assert sum(source == 0 for source, _, _ in rows) == CYCLE_ROWS // 2
    for source, num_rows in ((0, 300), (1, 100)):
        first = [row for which, epoch, row in rows if which == source and epoch == 0]
        assert sorted(first) == list(range(num_rows))


def test_mixture_without_weights_follows_the_numbers_of_rows():
    plan = plan_of([NumberedSource([3000], 1000), NumberedSource([1000], 1000)], batch_size=64)
    rows = [row for batch in range(CYCLE_ROWS // 64) for row in rows_of(plan, batch)]
    assert sum(source == 0 for source, _, _ in rows) == CYCLE_ROWS * 3 // 4
    assert plan.batches_per_epoch == 4000 // 64


@pytest.mark.parametrize("make", [lambda: sequential([30, 5, 40]), lambda: NumberedSource([30, 5, 40])])
def test_mixture_is_the_same_from_any_batch_and_disjoint_over_ranks(make):
    def plan(rank: int) -> Plan:
        return plan_of([NumberedSource([10] * 9), make()], [1, 2], rank=rank, world_size=2)

    in_order = [[rows_of(each, batch) for each in [plan(rank)] for batch in range(30)] for rank in range(2)]
    for batch in (0, 7, 13, 29):
        assert rows_of(plan(0), batch) == in_order[0][batch]
    firsts = [{row for batch in batches for row in batch if row[1] == 0} for batches in in_order]
    assert firsts[0] and not firsts[0] & firsts[1]


def test_sequential_source_gives_every_row_once_and_the_same_from_any_batch():
    shard_sizes = [20, 3, 30, 27]
    plans = [plan_of([sequential(shard_sizes)], rank=rank, world_size=2) for rank in range(2)]
    in_order = [[rows_of(plan, batch) for batch in range(15)] for plan in plans]
    assert [plan.batches_per_epoch for plan in plans] == [5, 5]
    valid = {(shard << SHARD_BITS) + row for shard, size in enumerate(shard_sizes) for row in range(size)}
    for epoch in range(3):
        batches = [batch for rank in in_order for batch in rank[5 * epoch : 5 * epoch + 5]]
        assert {row for batch in batches for _, _, row in batch} == valid
        assert {seen for batch in batches for _, seen, _ in batch} == {epoch}
    assert in_order[0][0] != in_order[0][5] != in_order[0][10]
    for start in (0, 4, 5, 9, 14):
        assert rows_of(plan_of([sequential(shard_sizes)], rank=1, world_size=2), start) == in_order[1][start]


def test_wrong_weights_and_too_few_rows_are_refused_in_one_line():
    numbers = NumberedSource([7])
    for sources, weights, message in (
        (
            [numbers],
            None,
            r"numbers has 7 rows, fewer than one batch \(8 x 1 processes\); lower the batch size",
        ),
        ([numbers, numbers], None, r"numbers and numbers has 14 rows, fewer than one batch \(16 x 1"),
        ([numbers, numbers], [1.0], "1 weights for 2 sources; give one for each"),
        ([numbers, numbers], [1.0, 0.0], r"weights must be > 0, got \[1.0, 0.0\]"),
        ([numbers, sequential([9])], None, "rows of numbers is not known; give weights"),
    ):
        with pytest.raises(DataError, match=message):
            plan_of(sources, weights, batch_size=8 * len(sources))
    with pytest.raises(
        DataError, match="numbers has fewer than 8 rows, one batch of all processes; lower the batch size"
    ):
        rows_of(plan_of([sequential([3, 4])]), 0)
