"""The loader: bit-equal from any batch, with any number of workers; broken images; the shape of a batch."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_ssl.data.loader import TrainLoader
from hf_ssl.data.sources import DataError, ImageSource, open_images
from hf_ssl.data.views import ViewMaker

Rows = Callable[..., datasets.Dataset]
Batch = dict[str, Any]


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            assert_close(batch[key], other[key], rtol=0, atol=0)


@pytest.fixture
def parquet(tmp_path: Path, numbered_rows: Rows) -> ImageSource:
    """70 rows in 8 row groups of two files."""
    for shard in range(2):
        numbered_rows(35, 35 * shard).to_parquet(tmp_path / f"train-{shard}.parquet", batch_size=10)
    return open_images(f"{tmp_path}/train-*.parquet")


@pytest.fixture
def load(numbered_views: Any) -> Callable[..., TrainLoader]:
    def make(sources: ImageSource | list[ImageSource], **options: Any) -> TrainLoader:
        return TrainLoader(sources, numbered_views, **{"batch_size": 8, "seed": 5, **options})

    return make


def test_batch_is_uint8_and_laid_out_by_view(parquet: ImageSource, load, number_of: Callable[[Tensor], int]):
    for num_workers in (0, 1):
        batch = take(load(parquet, num_workers=num_workers), 1)[0]
        assert batch["pixel_values"].dtype == torch.uint8
        assert batch["pixel_values"].shape == (8, 2, 3, 4, 4)
        assert batch["local_pixel_values"].shape == (8, 1, 3, 2, 2)
        assert batch["pixel_values"].transpose(0, 1).is_contiguous()
        for row in range(8):  # both views show the image that sample_id names, with noise of their own
            views = batch["pixel_values"][row]
            assert [number_of(view) for view in views] == [int(batch["sample_id"][row])] * 2
            assert not torch.equal(views[0], views[1])


def test_one_global_view_has_no_view_axis(parquet: ImageSource):
    maker = ViewMaker([{"count": 1, "kind": "global", "size": 8, "crop": {"scale": [0.5, 1.0]}}])
    batch = take(TrainLoader(parquet, maker, batch_size=8, seed=0), 1)[0]
    assert batch["pixel_values"].shape == (8, 3, 8, 8) and batch["pixel_values"].is_contiguous()
    assert set(batch) == {"pixel_values", "sample_id", "epoch"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_stream_is_bit_equal_at_every_position(parquet: ImageSource, load, num_workers: int):
    whole = take(load(parquet), 20)  # 8 batches an epoch
    starts = (1, 7, 8, 13) if num_workers else range(18)
    for start in starts:
        count = 6 if num_workers else 2
        resumed = take(load(parquet, start_batch=start, num_workers=num_workers), count)
        assert_same(resumed, whole[start : start + count])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_mixture_is_bit_equal(parquet: ImageSource, numbered_rows: Rows, load, num_workers: int):
    def mixture(**options: int) -> TrainLoader:
        stream = open_images(numbered_rows(30, 200).to_iterable_dataset(num_shards=3))
        return load([parquet, open_images(numbered_rows(50, 100)), stream], weights=[1, 1, 2], **options)

    whole = take(mixture(), 30)
    assert {int(epoch) for batch in whole for epoch in batch["epoch"]} >= {0, 1, 2}
    for start in (0, 5, 23):
        assert_same(take(mixture(start_batch=start, num_workers=num_workers), 5), whole[start : start + 5])


def test_order_does_not_depend_on_workers(parquet: ImageSource, load):
    whole = take(load(parquet), 17)
    for num_workers in (1, 3):
        assert_same(take(load(parquet, num_workers=num_workers), 17), whole)


def test_loading_draws_nothing_from_the_global_generator(parquet: ImageSource, load):
    for num_workers in (0, 1):
        state = torch.get_rng_state()
        take(load(parquet, num_workers=num_workers), 2)
        assert torch.equal(torch.get_rng_state(), state)


def test_ranks_get_other_images_and_the_same_number_of_batches(parquet: ImageSource, load):
    loaders = [load(parquet, rank=rank, world_size=2) for rank in range(2)]
    assert [loader.batches_per_epoch for loader in loaders] == [4, 4]
    seen = [{int(i) for batch in take(loader, 4) for i in batch["sample_id"]} for loader in loaders]
    assert [len(ids) for ids in seen] == [32, 32] and not seen[0] & seen[1]


def test_views_of_an_image_change_with_the_epoch(numbered_rows: Rows, load):
    batches = take(load(open_images(numbered_rows(8))), 2)
    first, second = (batch["pixel_values"][batch["sample_id"].argsort()] for batch in batches)
    assert torch.equal(first[:, 0, :2], second[:, 0, :2]) and not torch.equal(first, second)
    assert batches[0]["sample_id"].tolist() != batches[1]["sample_id"].tolist()


def test_epoch_is_a_whole_number_of_batches(parquet: ImageSource, load):
    loader = load(parquet)
    assert loader.batches_per_epoch == 8
    assert [loader.epoch_at(batch) for batch in (0, 4, 16)] == [0.0, 0.5, 2.0]
    assert [int(batch["epoch"][0]) for batch in take(loader, 17)] == [0] * 8 + [1] * 8 + [2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_of_unknown_length_resumes_bit_equal(numbered_rows: Rows, load, num_workers: int):
    def stream(**options: int) -> TrainLoader:
        return load(open_images(numbered_rows(70).to_iterable_dataset(num_shards=4)), **options)

    loader = stream()
    whole = take(loader, 20)
    assert loader.batches_per_epoch == 8 and loader.epoch_at(12) == 1.5
    assert {len({int(i) for batch in whole[s : s + 8] for i in batch["sample_id"]}) for s in (0, 8)} == {64}
    for start in (3, 8, 14):
        assert_same(take(stream(start_batch=start, num_workers=num_workers), 4), whole[start : start + 4])


def test_texts_follow_their_images(numbered_rows: Rows, load, number_of: Callable[[Tensor], int]):
    rows = numbered_rows(20).add_column("caption", [f"number {number}" for number in range(20)])
    batch = take(load(open_images(rows, text_column="caption"), num_workers=1), 1)[0]
    assert batch["text"] == [f"number {number_of(views[0])}" for views in batch["pixel_values"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_replaced_counted_and_named(
    numbered_rows: Rows,
    load,
    number_of: Callable[[Tensor], int],
    caplog: pytest.LogCaptureFixture,
    num_workers: int,
):
    source = open_images(numbered_rows(64, broken=(3, 17)))
    loader = load(source, num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        whole = take(loader, 24)
    for batch in whole:
        assert [number_of(views[0]) for views in batch["pixel_values"]] == batch["sample_id"].tolist()
        assert len(set(batch["sample_id"].tolist()) - {3, 17}) == 8  # full, and no image twice
    assert loader.bad_images.count == 2 and loader.bad_images.met == 6  # three epochs
    assert sorted(loader.bad_images.names) == ["the given dataset, row 17", "the given dataset, row 3"]
    assert len(caplog.messages) == 2
    assert all("skipped a broken image: the given dataset, row" in message for message in caplog.messages)
    for start in (2, 11):
        assert_same(take(load(source, start_batch=start), 3), whole[start : start + 3])


def test_file_that_vanished_is_a_broken_image(tmp_path: Path, numbered_png, load):
    for number in range(16):
        (tmp_path / f"{number:02d}.png").write_bytes(numbered_png(number))
    source = open_images(tmp_path)
    (tmp_path / "04.png").unlink()
    loader = load(source)
    take(loader, 2)
    assert loader.bad_images.names == [str(tmp_path / "04.png")]
    assert "No such file" in loader.bad_images.reasons[str(tmp_path / "04.png")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_images_stop_the_run(numbered_rows: Rows, load, num_workers: int):
    source = open_images(numbered_rows(200, broken=tuple(range(0, 200, 10))))
    with pytest.raises(
        DataError, match=r"11 of \d+ images are broken, more than max_bad_fraction 0.01; the last: .* row"
    ) as caught:
        take(load(source, num_workers=num_workers), 50)
    assert "\n" not in str(caught.value)
    assert len(take(load(source, max_bad_fraction=0.2), 50)) == 50


def test_first_broken_image_stops_a_run_that_allows_none(numbered_rows: Rows, load):
    with pytest.raises(DataError, match="1 of 8 images are broken"):
        take(load(open_images(numbered_rows(8, broken=(3,))), max_bad_fraction=0), 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_without_one_good_image_stop_the_run(numbered_rows: Rows, load, num_workers: int):
    source = open_images(numbered_rows(16, broken=tuple(range(16))))
    with pytest.raises(
        DataError, match="none of 16 images around .* can be read; the last: cannot decode"
    ) as caught:
        take(load(source, num_workers=num_workers), 1)
    assert "\n" not in str(caught.value)


def test_error_in_a_worker_is_one_line(numbered_rows: Rows, load):
    stream = open_images(numbered_rows(5).to_iterable_dataset())
    with pytest.raises(DataError, match="^the given dataset has fewer than 8 rows.*lower the batch size"):
        take(load(stream, num_workers=1), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"batch_size": 71}, r"has 70 rows, fewer than one batch \(71 x 1 processes\)"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1 = 1, got 2"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction must be from 0 to 1, got 2.0"),
        ({"weights": [0.5, 0.5]}, "2 weights for 1 sources"),
    ],
)
def test_wrong_arguments_are_refused(parquet: ImageSource, load, options: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        load(parquet, **options)


def test_no_source_is_refused(load):
    with pytest.raises(DataError, match="no source of images; give at least one"):
        load([])


def test_start_far_in_the_stream_reads_no_more_than_one_block(
    parquet: ImageSource, load, monkeypatch: pytest.MonkeyPatch
):
    reads: list[int] = []
    read_unit = parquet._read_unit
    monkeypatch.setattr(parquet, "_read_unit", lambda unit: reads.append(unit) or read_unit(unit))
    batch = take(load(parquet, start_batch=8_000_003), 1)[0]
    assert batch["epoch"].tolist() == [1_000_000] * 8
    assert len(reads) == len(set(reads)) <= 8


@pytest.fixture
def count_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Makes a source record how many rows every read of it brings; its blocks are of 50 rows."""

    def watch(source: Any) -> list[int]:
        rows: list[int] = []
        name = "_read_unit" if hasattr(source, "_read_unit") else "row"
        original = getattr(source, name)

        def read(index: int) -> Any:
            found = original(index)
            rows.append(found.num_rows if name == "_read_unit" else 1)
            return found

        monkeypatch.setattr(source, name, read)
        source.block_rows = 50
        return rows

    return watch


@pytest.mark.parametrize("kind", ["parquet", "arrow", "mixture"])
def test_rows_read_to_resume_do_not_grow_with_the_position(
    tmp_path: Path, numbered_rows: Rows, load, count_rows: Callable[..., list[int]], kind: str
):
    """Mistake: skipping through the stream. 600 rows, 75 batches an epoch; one block more is the most."""
    data = numbered_rows(600)
    data.to_parquet(tmp_path / "train.parquet", batch_size=10)
    sources = {"parquet": [open_images(tmp_path / "train.parquet")], "arrow": [open_images(data)]}
    sources["mixture"] = sources["parquet"] + sources["arrow"]
    counts = [count_rows(source) for source in sources[kind]]
    weights = [2, 1] if kind == "mixture" else None

    def rows_read(start: int) -> int:
        for rows in counts:
            rows.clear()
        take(load(sources[kind], start_batch=start, weights=weights), 3)
        return sum(map(sum, counts))

    early = rows_read(3)
    assert 24 <= early <= 24 * 50
    for late in (60, 75 * 20 + 37, 75 * 100_000 + 74):
        assert rows_read(late) <= early + 50


def test_rows_of_a_sequential_source_are_read_again_up_to_the_position(numbered_rows: Rows, load):
    """What cannot be addressed is read: the first epoch for its length, then the part of its own epoch."""
    source = open_images(numbered_rows(64).to_iterable_dataset(num_shards=4))
    rows: list[int] = []
    shard = source.shard

    def counted(number: int) -> Any:
        for row in shard(number):
            rows.append(number)
            yield row

    source.shard = counted  # type: ignore[method-assign, attr-defined]
    for start, most in ((0, 64), (8 * 50, 2 * 64)):  # 50 epochs later no more than two
        rows.clear()
        take(load(source, start_batch=start), 1)
        assert 8 <= len(rows) <= most


def test_cifar10_resumes_bit_equal_across_an_epoch(shared_dir: Path, load):
    source = open_images(shared_dir / "data" / "cifar10", split="test")
    whole = take(load(source, batch_size=100, num_workers=2), 22)
    ids = torch.cat([batch["sample_id"] for batch in whole[:20]])
    assert torch.equal(ids.sort().values, torch.arange(2_000))
    assert_same(take(load(source, batch_size=100, start_batch=19), 3), whole[19:])
