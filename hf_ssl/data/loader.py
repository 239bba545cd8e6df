"""Batches of views for training: made by workers, the same whatever their number, from any batch on.

Batch b is made by worker b mod W from the plan of `stream.py`, which every worker knows; the DataLoader
delivers them in turn. Views are seeded by (seed, epoch, sample id). So a loader that starts at batch b gives
exactly what an uninterrupted one gives from there, without any state to store.

A broken image is replaced by the next good row of its block, in an order that depends on its position alone.
Shape suffixes in this file: V = views, B = images in a batch, C = channels, H, W = height, width.
"""

import itertools
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_ssl.data.batched_views import MAX_BATCHED_SIDE
from hf_ssl.data.captions import captions_of, choose_caption
from hf_ssl.data.columns import DataError
from hf_ssl.data.decoding import BrokenImageError
from hf_ssl.data.readers import ImageSource
from hf_ssl.data.stream import SOURCE_BITS, Plan, Sample, Slot, make_plan

logger = logging.getLogger(__name__)

FEW_ROWS = 1000  # broken images are counted against at least so many rows: a first bad one is no 100 %
MAX_REMEMBERED = 10_000  # reasons of broken images
BATCH_KEYS = {
    "global": "pixel_values",
    "local": "local_pixel_values",
    "anchor": "anchor_pixel_values",
    "clip": "pixel_values_videos",
}
_REPORT = "report"  # what a worker tells the main process with a batch

Batch = dict[str, Any]
Image = NDArray[np.uint8]
Seed = tuple[int, int, int]  # of a sample's views: the run's seed, epoch, sample id
ViewOfImages = Tensor | tuple[Tensor, ...]  # one view of all images of a batch


class MakesViews(Protocol):
    """What the loader needs of a `ViewMaker` or a `ClipMaker`."""

    kinds: list[str]  # of every view; those of one kind have one size

    def decode(self, data: Any, seed: Seed) -> Image: ...

    def __call__(self, image: Any, seed: Seed) -> list[Tensor]: ...

    def make_batch(self, images: list[Image], seeds: list[Seed]) -> list[Tensor]: ...


@dataclass
class BadImages:
    """Broken images met so far.

    Attributes:
        reasons: by the name of the row, why it could not be used.
        met: how often one was met, repetitions in later epochs included.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    met: int = 0

    @property
    def count(self) -> int:
        return len(self.reasons)

    @property
    def names(self) -> list[str]:
        return list(self.reasons)


@dataclass
class _Report:
    bad: list[tuple[str, str]]  # name and reason of every broken image met
    batches_per_epoch: int | None
    error: str | None = None
    seconds: float = 0.0  # that making the batch took


class TrainLoader:
    """Endless batches of views.

    Args:
        sources: where the images come from.
        view_maker: makes the views of an image.
        batch_size: images per batch of this process.
        seed: of order and views, not negative.
        weights: part of each source in the stream; None: its part of all rows.
        rank: number of this process.
        world_size: number of processes; they get the same number of batches, of different images.
        num_workers: processes that make batches; 0: this one. Batches do not depend on it.
        start_batch: the first batch to give; every iteration starts there.
        max_bad_fraction: more broken images than this part of the rows seen stop the run.

    Attributes:
        bad_images: broken images met so far.
        batches_per_epoch: of this process; None as long as a sequential source has not been read once.
        seconds_of_making: that reading, decoding and views of all batches given took, in this process or in
            its workers.

    Yields dicts:
        pixel_values: uint8 (B, V, C, H, W), in memory (V, B, C, H, W); (B, C, H, W) if there is one global
            view.
        pixel_values_videos: of a recipe of clips in place of it, uint8 (B, T, C, H, W).
        local_pixel_values, anchor_pixel_values: the same of those views, if there are any, always with V.
        sample_id: int64 (B,), stable: the index of the row in its source, plus the source's number << 48.
        epoch: int64 (B,), the epoch of the row's source.
        text: list of B captions, if all sources have a text column: of several of an image the one that the
            sample's seed draws. An image without any counts as broken.

    Raises:
        DataError: arguments that do not fit the data; in iteration, too many broken images.
    """

    def __init__(
        self,
        sources: ImageSource | list[ImageSource],
        view_maker: MakesViews,
        *,
        batch_size: int,
        seed: int,
        weights: list[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        start_batch: int = 0,
        max_bad_fraction: float = 0.01,
    ):
        self.sources = [sources] if isinstance(sources, ImageSource) else list(sources)
        self.bad_images = BadImages()
        self._check(batch_size, seed, rank, world_size, num_workers, start_batch, max_bad_fraction)
        plan = make_plan(
            self.sources, weights, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size
        )
        self.batches_per_epoch = plan.batches_per_epoch
        self._batch_size = batch_size
        self._seed = seed
        self._num_workers = num_workers
        self._max_bad_fraction = max_bad_fraction
        self._stream = _BatchStream(plan, BatchMaker(self.sources, view_maker, seed), start_batch)
        self._delivered = 0
        self.seconds_of_making = 0.0

    def __iter__(self) -> Iterator[Batch]:
        self._delivered = 0
        loader: DataLoader[Batch] = DataLoader(
            self._stream,
            batch_size=None,
            num_workers=self._num_workers,
            worker_init_fn=_prepare_worker,
            multiprocessing_context="fork" if self._num_workers else None,
            generator=torch.Generator().manual_seed(self._seed),  # iter() would draw from the global one
        )
        for batch in loader:
            self._delivered += 1
            self._take_report(batch.pop(_REPORT))
            yield batch

    def epoch_at(self, batch: int) -> float:
        """Epochs done before a batch; 0.0 as long as the length of a sequential source is not known."""
        return batch / self.batches_per_epoch if self.batches_per_epoch else 0.0

    def _take_report(self, report: _Report) -> None:
        if report.error is not None:
            raise DataError(report.error)
        self.seconds_of_making += report.seconds
        self.batches_per_epoch = report.batches_per_epoch or self.batches_per_epoch
        for name, reason in report.bad:
            self.bad_images.met += 1
            if name not in self.bad_images.reasons:
                self.bad_images.reasons[name] = reason
                logger.warning("skipped a broken image: %s: %s", name, reason)
        rows = self._delivered * self._batch_size
        if report.bad and self.bad_images.met > self._max_bad_fraction * max(rows, FEW_ROWS):
            name, reason = report.bad[-1]
            raise DataError(
                f"{self.bad_images.met} of {rows} images are broken, more than max_bad_fraction "
                f"{self._max_bad_fraction:g}; the last: {name}: {reason}"
            )

    def _check(
        self,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        num_workers: int,
        start_batch: int,
        max_bad_fraction: float,
    ) -> None:
        if not self.sources:
            raise DataError("no source of images; give at least one")
        if batch_size < 1:
            raise DataError(f"batch_size must be >= 1, got {batch_size}")
        for name, value in (("seed", seed), ("num_workers", num_workers), ("start_batch", start_batch)):
            if value < 0:
                raise DataError(f"{name} must be >= 0, got {value}")
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")
        if not 0 <= max_bad_fraction <= 1:
            raise DataError(f"max_bad_fraction must be from 0 to 1, got {max_bad_fraction}")


class BatchMaker:
    """Makes one batch of views from the slots of a plan.

    Args:
        sources: to name broken images, and to know whether there are texts.
        view_maker: makes the views of an image.
        seed: of the views.
    """

    def __init__(self, sources: list[ImageSource], view_maker: MakesViews, seed: int):
        self._sources = sources
        self._view_maker = view_maker
        self._seed = seed
        self._has_text = all(source.text_column for source in sources)
        self._views = {  # batch key -> numbers of its views
            key: [number for number, of in enumerate(view_maker.kinds) if of == kind]
            for kind, key in BATCH_KEYS.items()
            if kind in view_maker.kinds
        }
        # By seed, as a clip may be broken in some epochs' frames alone: what is remembered changes no sample.
        self._broken: dict[Seed, str] = {}

    def make(self, slots: list[Slot]) -> tuple[Batch, list[tuple[str, str]]]:
        """The batch, and name and reason of every broken image met on the way."""
        images, seeds, texts = [], [], []
        bad: list[tuple[str, str]] = []
        for slot in slots:
            sample, sample_id, image = self._first_good(slot, bad)
            images.append(image)
            seeds.append((self._seed, sample.epoch, sample_id))
            texts.append(choose_caption(sample.row["text"], seeds[-1]) if self._has_text else "")
        batch = self._stack(self._make_views(images, seeds))
        _, epochs, sample_ids = zip(*seeds, strict=True)
        batch |= {"sample_id": torch.tensor(sample_ids), "epoch": torch.tensor(epochs)}
        if self._has_text:
            batch["text"] = texts
        return batch, bad

    def _make_views(self, images: list[Image | list[Tensor]], seeds: list[Seed]) -> list[ViewOfImages]:
        """Views by number, each one tensor per image; small images of one size are made together."""
        pictures = [image for image in images if not isinstance(image, list)]
        if len(pictures) == len(images):
            return list(self._view_maker.make_batch(pictures, seeds))
        views = [
            image if isinstance(image, list) else self._view_maker(image, seed)
            for image, seed in zip(images, seeds, strict=True)
        ]
        return list(zip(*views, strict=True))

    def _stack(self, views: list[ViewOfImages]) -> Batch:
        """Views as (B, V, C, H, W), in memory (V, B, C, H, W)."""
        batch: Batch = {}
        for key, numbers in self._views.items():
            buffer_VBCHW = _empty((len(numbers), len(views[0]), *views[numbers[0]][0].shape))
            for place, number in enumerate(numbers):
                for row, view_CHW in enumerate(views[number]):
                    buffer_VBCHW[place, row] = view_CHW
            batch[key] = buffer_VBCHW.transpose(0, 1)
        for key in ("pixel_values", "pixel_values_videos"):
            if len(self._views.get(key, [])) == 1:
                batch[key] = batch[key][:, 0]
        return batch

    def _first_good(self, slot: Slot, bad: list[tuple[str, str]]) -> tuple[Sample, int, Image | list[Tensor]]:
        """The sample, its id, and its decoded picture; of a large one the views, to hold one at a time."""
        attempts = 0
        while True:
            sample = slot.share.sample(slot.position, attempts)
            sample_id = (slot.source << SOURCE_BITS) + sample.row_index
            seed = (self._seed, sample.epoch, sample_id)
            if seed not in self._broken:
                try:
                    if self._has_text and not captions_of(sample.row["text"]):
                        raise BrokenImageError("the image has no caption")
                    image = self._view_maker.decode(self._sources[slot.source].load(sample.row), seed)
                    if max(image.shape) <= MAX_BATCHED_SIDE:
                        return sample, sample_id, image
                    return sample, sample_id, self._view_maker(image, seed)
                except BrokenImageError as error:
                    if len(self._broken) == MAX_REMEMBERED:
                        self._broken.clear()
                    self._broken[seed] = str(error)
            name, reason = self._sources[slot.source].row_name(sample.row_index), self._broken[seed]
            if attempts == 0:
                bad.append((name, reason))
            attempts += 1
            if attempts == slot.share.block_length(slot.position):
                raise DataError(f"none of {attempts} images around {name} can be read; the last: {reason}")


class _BatchStream(IterableDataset[Batch]):
    def __init__(self, plan: Plan, maker: BatchMaker, start_batch: int):
        self._plan = plan
        self._maker = maker
        self._start_batch = start_batch

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for number in itertools.count(self._start_batch + first, step):
                start = time.perf_counter()
                batch, bad = self._maker.make(self._plan.slots(number))
                seconds = time.perf_counter() - start
                yield {**batch, _REPORT: _Report(bad, self._plan.batches_per_epoch, seconds=seconds)}
        except DataError as error:  # as data: the DataLoader would wrap it in a worker's traceback
            yield {_REPORT: _Report([], None, str(error))}


def _empty(shape: tuple[int, ...]) -> Tensor:
    """A uint8 tensor; in a worker in shared memory, where the main process reads it without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage: Any = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.tensor([], dtype=torch.uint8).set_(storage).view(shape)


def _prepare_worker(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers
    torch.set_num_threads(1)
    if "cv2" in sys.modules:  # its threads would compete with the other workers
        sys.modules["cv2"].setNumThreads(0)
