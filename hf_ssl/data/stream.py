"""Which image comes when: the order of a training stream as arithmetic, so that any batch can be computed.

An epoch puts the units of a source (row groups, rows) in an order drawn from (seed, epoch) and starts at a
row drawn likewise. That sequence of rows is cut into one contiguous piece for each lane of each rank; a lane
is cut into blocks of about `block_rows` rows, and the rows of a block are permuted by (seed, epoch, first row
of the block). Consecutive batches of a rank come from its lanes in turn, so that with LANES workers each
reads its own part of the data only. The position in the stream is the number of the batch: nothing else is
stored, nothing that went before is read.

A sequential source (tar archive, generator) goes through the same blocks, shards in an order drawn from
(seed, epoch). Its length is not known, so every rank and worker reads all of it and keeps its own rows, and a
stream that starts later reads what went before (undecoded): the first epoch to learn the length, then its own
from the start.
Several sources are mixed row by row (`mixture.py`).
"""

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, islice
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hf_ssl.data.columns import DataError, Row
from hf_ssl.data.mixture import Key, Mixture, mixture_quotas, seeded_generator
from hf_ssl.data.readers import BLOCK_BYTES, ImageSource, IndexedSource, SequentialSource

LANES = 4  # memory holds one block per lane; more workers than lanes share lanes
SOURCE_BITS = 48  # sample id = (number of the source << SOURCE_BITS) + index of the row in it

# What a generator is for is part of its seed: no two draws share one (2 is MIXTURE_DRAW).
_UNIT_ORDER, _ROW_ORDER = range(2)


class Sample(NamedTuple):
    """One undecoded row of the stream."""

    epoch: int  # of its source
    row_index: int  # in its source
    row: Row


class Share(Protocol):
    """The endless sequence of rows that one lane of one rank gets from one source."""

    def sample(self, position: int, attempt: int = 0) -> Sample:
        """The row at a position; attempt n > 0: the n-th row to take in its place, from the same block."""

    def block_length(self, position: int) -> int:
        """Rows in the block of a position: after so many attempts all of them were tried."""


class Slot(NamedTuple):
    """Where one row of a batch comes from."""

    source: int  # its number
    share: Share
    position: int


class Plan(Protocol):
    """The rows of every batch of one rank."""

    def slots(self, batch: int) -> list[Slot]:
        """Where the rows of a batch come from."""

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of this rank in one epoch; None as long as a sequential source has not been read once."""


class EpochOrder:
    """The order in which an epoch goes through the rows of a source.

    Args:
        unit_sizes: rows of each unit.
        key: what every draw is seeded by, besides its purpose and its epoch.
    """

    def __init__(self, unit_sizes: NDArray[np.int64], key: Key):
        self._sizes = unit_sizes
        self._starts = np.cumsum(unit_sizes) - unit_sizes
        self._num_rows = int(unit_sizes.sum())
        self._key = key
        self._sequence = lru_cache(maxsize=2)(self._draw_sequence)

    def block(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Indices of the rows from place `start` to `stop` of the epoch's sequence, permuted."""
        units, ends, turn = self._sequence(epoch)
        first, last, wrap = start + turn, stop + turn, self._num_rows
        pieces = [(first, min(last, wrap)), (max(first, wrap) - wrap, last - wrap)]
        rows = np.concatenate([self._rows(units, ends, *piece) for piece in pieces if piece[0] < piece[1]])
        order: NDArray[np.int64] = seeded_generator(self._key, _ROW_ORDER, epoch, start).permutation(rows)
        return order

    def _draw_sequence(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        generator = seeded_generator(self._key, _UNIT_ORDER, epoch)
        units = generator.permutation(len(self._sizes))
        # Without the turn, a file of one row group would end in the same rows every epoch, dropped for ever.
        turn = int(generator.integers(self._num_rows))
        return units, np.cumsum(self._sizes[units]), turn

    def _rows(
        self, units: NDArray[np.int64], ends: NDArray[np.int64], start: int, stop: int
    ) -> NDArray[np.int64]:
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        read = units[first : last + 1]
        sizes = self._sizes[read]
        before = np.cumsum(sizes) - sizes
        rows = np.arange(sizes.sum()) + np.repeat(self._starts[read] - before, sizes)
        skipped = start - int(ends[first] - sizes[0])
        kept: NDArray[np.int64] = rows[skipped : skipped + stop - start]
        return kept


class IndexedShare:
    """Rows `start` to `start + length` of every epoch's sequence, block by block."""

    def __init__(self, source: IndexedSource, order: EpochOrder, start: int, length: int):
        self._source = source
        self._order = order
        self._start = start
        self._length = length
        self._block_rows = -(-length // max(1, length // source.block_rows))  # blocks of equal length
        self._current = (-1, -1)

    def sample(self, position: int, attempt: int = 0) -> Sample:
        epoch, place = divmod(position, self._length)
        block, offset = divmod(place, self._block_rows)
        if (epoch, block) != self._current:
            first = self._start + block * self._block_rows
            last = min(first + self._block_rows, self._start + self._length)
            indices = self._order.block(epoch, first, last)
            self._current = (epoch, block)
            self._source.hold(self, indices)
            self._indices: list[int] = indices.tolist()
        index = self._indices[_place_of_attempt(offset, attempt, len(self._indices))]
        return Sample(epoch, index, self._source.row(index))

    def block_length(self, position: int) -> int:
        first = position % self._length // self._block_rows * self._block_rows
        return min(self._block_rows, self._length - first)


class SequentialShare:
    """What one rank gets of a sequential source, in multiples of `multiple` rows an epoch."""

    def __init__(self, source: SequentialSource, key: Key, rank: int, world_size: int, multiple: int):
        self._source = source
        self.length: int | None = None  # rows of an epoch, known once the first has been read
        self._key = key
        self._rank = rank
        self._world_size = world_size
        self._step = world_size * multiple
        self._restart()

    def sample(self, position: int, attempt: int = 0) -> Sample:
        if position < self._first:
            self._restart()
        while position >= self._first + len(self._block):
            self._advance(position)
        offset = _place_of_attempt(position - self._first, attempt, len(self._block))
        return Sample(self._epoch, *self._block[offset])

    def block_length(self, position: int) -> int:
        self.sample(position)
        return len(self._block)

    def _restart(self) -> None:
        self._first = 0  # position of the first row of the block in memory
        self._block: list[tuple[int, Row]] = []
        self._open_epoch(0)

    def _open_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._blocks = self._read_blocks(epoch)

    def _advance(self, position: int) -> None:
        self._first += len(self._block)
        self._block = next(self._blocks, [])
        if self._block:
            return
        if self.length is None:
            self.length = self._first
            if self.length == 0:
                raise DataError(
                    f"{self._source.name} has fewer than {self._step} rows, one batch of all processes; "
                    "lower the batch size or give more images"
                )
        epoch = max(self._epoch + 1, position // self.length)
        self._first = epoch * self.length
        self._open_epoch(epoch)

    def _read_blocks(self, epoch: int) -> Iterator[list[tuple[int, Row]]]:
        shards = seeded_generator(self._key, _UNIT_ORDER, epoch).permutation(self._source.num_shards)
        rows = chain.from_iterable(self._source.shard(int(shard)) for shard in shards)
        for number in itertools.count():
            block = self._read_block(rows)
            order = seeded_generator(self._key, _ROW_ORDER, epoch, number).permutation(len(block))
            kept = len(block) - len(block) % self._step
            if kept:
                yield [block[place] for place in order[self._rank : kept : self._world_size]]
            if kept < len(block) or not block:  # the last of the epoch
                return

    def _read_block(self, rows: Iterator[tuple[int, Row]]) -> list[tuple[int, Row]]:
        block: list[tuple[int, Row]] = []
        size = 0
        while len(block) < self._source.block_rows and size < BLOCK_BYTES:
            part = list(islice(rows, self._step))
            block += part
            size += sum(len(row["image"]) for _, row in part if isinstance(row["image"], bytes))
            if len(part) < self._step:
                break
        return block


class EpochPlan:
    """Batches of one indexed source; an epoch is a whole number of batches, the rest of it is dropped."""

    def __init__(self, source: IndexedSource, seed: int, batch_size: int, rank: int, world_size: int):
        self._batch_size = batch_size
        self._batches = source.num_rows // (batch_size * world_size)
        if self._batches == 0:
            raise _too_few_rows(source.name, source.num_rows, batch_size, world_size)
        order = EpochOrder(source.unit_sizes, (seed, 0))
        lanes = min(_num_lanes(self._batches * batch_size, source), self._batches)
        self._lane_batches = [len(range(lane, self._batches, lanes)) for lane in range(lanes)]
        starts = np.cumsum([0, *self._lane_batches]) + rank * self._batches
        self._shares = [
            IndexedShare(source, order, int(start) * batch_size, batches * batch_size)
            for start, batches in zip(starts, self._lane_batches, strict=False)
        ]

    @property
    def batches_per_epoch(self) -> int:
        return self._batches

    def slots(self, batch: int) -> list[Slot]:
        epoch, place = divmod(batch, self._batches)
        turn, lane = divmod(place, len(self._shares))
        first = (epoch * self._lane_batches[lane] + turn) * self._batch_size
        return [Slot(0, self._shares[lane], first + row) for row in range(self._batch_size)]


class MixedPlan:
    """Batches of several sources, or of one sequential source; every source has epochs of its own."""

    def __init__(
        self,
        sources: list[ImageSource],
        quotas: NDArray[np.int64],
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ):
        self._batch_size = batch_size
        self._batches: int | None = None
        counts = [source.num_rows for source in sources if source.num_rows is not None]
        if len(counts) == len(sources):
            self._batches = sum(counts) // (batch_size * world_size)
            if self._batches == 0:
                names = " and ".join(source.name for source in sources)
                raise _too_few_rows(names, sum(counts), batch_size, world_size)
        lanes = min(_num_lanes((source.num_rows or 0) // world_size, source) for source in sources)
        self._mixtures = [Mixture(quotas, (seed, rank * lanes + lane)) for lane in range(lanes)]
        multiple = batch_size if len(sources) == 1 else 1
        self._shares = [  # by source, then by lane
            _shares(source, (seed, number), rank, world_size, lanes, multiple)
            for number, source in enumerate(sources)
        ]

    @property
    def batches_per_epoch(self) -> int | None:
        only = self._shares[0][0]
        if len(self._shares) == 1 and isinstance(only, SequentialShare) and only.length is not None:
            return only.length // self._batch_size
        return self._batches

    def slots(self, batch: int) -> list[Slot]:
        turn, lane = divmod(batch, len(self._mixtures))
        located = [
            self._mixtures[lane].locate(turn * self._batch_size + row) for row in range(self._batch_size)
        ]
        return [Slot(source, self._shares[source][lane], position) for source, position in located]


def make_plan(
    sources: list[ImageSource],
    weights: list[float] | None,
    *,
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Plan:
    """The rows of every batch of rank `rank`; ranks get the same number of batches and no row in common.

    Args:
        sources: where the images come from.
        weights: part of each source in the stream; None: its part of all rows.
        seed: of the order, not negative.
        batch_size: rows per batch of this rank.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        DataError: weights that do not fit the sources, or fewer rows than one batch of all processes.
    """
    quotas = mixture_quotas(sources, weights)
    if len(sources) == 1 and isinstance(sources[0], IndexedSource):
        return EpochPlan(sources[0], seed, batch_size, rank, world_size)
    return MixedPlan(sources, quotas, seed, batch_size, rank, world_size)


def _shares(
    source: ImageSource, key: Key, rank: int, world_size: int, lanes: int, multiple: int
) -> list[Share]:
    if isinstance(source, SequentialSource):
        return [SequentialShare(source, key, rank, world_size, multiple)]
    assert isinstance(source, IndexedSource)
    order = EpochOrder(source.unit_sizes, key)
    length = source.num_rows // (world_size * lanes)
    if length == 0:
        raise _too_few_rows(source.name, source.num_rows, 1, world_size)
    return [IndexedShare(source, order, (rank * lanes + lane) * length, length) for lane in range(lanes)]


def _num_lanes(rows_per_rank: int, source: ImageSource) -> int:
    """As many lanes as leave each a few blocks: short lanes would mix too little."""
    lanes = LANES
    while lanes > 1 and rows_per_rank < lanes * 4 * source.block_rows:
        lanes //= 2
    return lanes


def _too_few_rows(name: str, num_rows: int, batch_size: int, world_size: int) -> DataError:
    return DataError(
        f"{name} has {num_rows} rows, fewer than one batch ({batch_size} x {world_size} processes); "
        "lower the batch size or give more images"
    )


def _place_of_attempt(offset: int, attempt: int, length: int) -> int:
    """Steps through a whole block, far from the rows of the same batch first."""
    if attempt == 0:
        return offset
    step = int(0.618 * length) + 1
    while math.gcd(step, length) > 1:
        step += 1
    return (offset + attempt * step) % length
