"""Several sources in one stream: which of them gives row i, as arithmetic.

Rows come in cycles of CYCLE_ROWS. Each cycle holds every source in exact proportion to its weight, in an
order drawn from the seed and the number of the cycle.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hf_ssl.data.columns import DataError
from hf_ssl.data.readers import ImageSource

CYCLE_ROWS = 4096  # weights are rounded to this fraction
MIXTURE_DRAW = 2  # part of the seed: says what the draw is for

Key = tuple[int, ...]  # (seed, number of the source), or (seed, lane)


class Mixture:
    """Which source gives row i of a lane: cycles with exact quotas, each in its own seeded order.

    Args:
        quotas: rows of each source in a cycle.
        key: what the order of every cycle is seeded by.
    """

    def __init__(self, quotas: NDArray[np.int64], key: Key):
        self._quotas = quotas
        self._key = key
        self._cycle = lru_cache(maxsize=2)(self._draw_cycle)

    def locate(self, row: int) -> tuple[int, int]:
        """The source of a row, and the row's position among those this source gives."""
        cycle, place = divmod(row, int(self._quotas.sum()))
        sources, ranks = self._cycle(cycle)
        source = int(sources[place])
        return source, cycle * int(self._quotas[source]) + int(ranks[place])

    def _draw_cycle(self, cycle: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        sources = np.repeat(np.arange(len(self._quotas)), self._quotas)
        ranks = np.concatenate([np.arange(quota) for quota in self._quotas])
        order = seeded_generator(self._key, MIXTURE_DRAW, cycle).permutation(len(sources))
        sources = sources[order]
        for source in range(len(self._quotas)):  # each source is read forwards within the cycle
            ranks[sources == source] = np.arange(self._quotas[source])
        return sources, ranks


def mixture_quotas(sources: list[ImageSource], weights: list[float] | None) -> NDArray[np.int64]:
    """Rows of each source in a cycle, in proportion to its weight; at least one."""
    if weights is None:
        if len(sources) > 1 and any(source.num_rows is None for source in sources):
            unknown = next(source.name for source in sources if source.num_rows is None)
            raise DataError(
                f"the number of rows of {unknown} is not known; give weights, one for each source"
            )
        weights = [float(source.num_rows or 1) for source in sources]
    if len(weights) != len(sources):
        raise DataError(f"{len(weights)} weights for {len(sources)} sources; give one for each")
    if not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"weights must be > 0, got {weights}; leave out a source that is not wanted")
    parts = np.array(weights) / np.sum(weights) * CYCLE_ROWS
    quotas: NDArray[np.int64] = np.maximum(np.floor(parts), 1).astype(np.int64)
    missing = max(0, CYCLE_ROWS - int(quotas.sum()))
    quotas[np.argsort(quotas - parts, kind="stable")[:missing]] += 1  # largest remainders first
    return quotas


def seeded_generator(key: Key, *purpose: int) -> np.random.Generator:
    """A generator of its own for every key and purpose."""
    return np.random.default_rng((*key, *purpose))
