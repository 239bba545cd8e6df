"""Datasets on the Hub: only what is needed is read, failures are repeated, what fails for good is named."""

import io
import itertools
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hf_ssl.data import readers, remote
from hf_ssl.data.loader import TrainLoader
from hf_ssl.data.remote import UnreachableError
from hf_ssl.data.sources import DataError, ImageSource, open_images, pin_revision
from tests.hub_client import without_waits
from tests.hub_server import HubServer

Rows = Callable[..., datasets.Dataset]
Encode = Callable[[int], bytes]

NAME = "lab/numbers"
SHARDS = 4
GROUP_ROWS = 25
ROWS = 800
PADDING = np.random.default_rng(0).bytes(
    1000
)  # behind the image, so that a footer is a small part of a shard
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---
"""


@pytest.fixture
def shards(numbered_png: Encode) -> dict[str, bytes]:
    """800 numbered images in 4 parquet files of 8 row groups, and one file that is no part of it."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zero", "one", "two"])}
    )
    files = {"README.md": CARD.encode()}
    for shard in range(SHARDS):
        numbers = range(shard * ROWS // SHARDS, (shard + 1) * ROWS // SHARDS)
        images = [{"bytes": numbered_png(number) + PADDING, "path": None} for number in numbers]
        rows = datasets.Dataset.from_dict(
            {"image": images, "label": [number % 3 for number in numbers]}, features=features
        )
        file = io.BytesIO()
        rows.to_parquet(file, batch_size=GROUP_ROWS)
        files[f"data/train-{shard:05}-of-{SHARDS:05}.parquet"] = file.getvalue()
    files["data/extra.parquet"] = files["data/train-00000-of-00004.parquet"]
    return files


@pytest.fixture
def numbers(hub: HubServer, shards: dict[str, bytes]) -> HubServer:
    """The Hub with that dataset."""
    hub.commit("datasets", NAME, shards)
    return hub


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    without_waits(monkeypatch)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 2 * GROUP_ROWS)


def batches(source: ImageSource, views: Any, count: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    options = {"batch_size": 10, "seed": 0, **options}
    return list(itertools.islice(TrainLoader(source, views, **options), count))


def same(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def group_ranges(content: bytes) -> list[tuple[int, int]]:
    """First and last byte of every row group of a parquet file."""
    metadata = pq.ParquetFile(io.BytesIO(content)).metadata
    ranges = []
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
        starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
        ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
        ranges.append((min(starts), max(ends) - 1))
    return ranges


def asked_groups(hub: HubServer, shards: dict[str, bytes]) -> list[tuple[str, int]]:
    """File and row group of every read since the log was cleared; anything else that was read fails."""
    groups = []
    for request in hub.asked(r"GET .*\.parquet"):
        path = request.path.split("/", 6)[6]
        first, last = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
        assert (first, last) in group_ranges(shards[path]), f"{request}: {first}-{last} is no row group"
        groups.append((path, group_ranges(shards[path]).index((first, last))))
    return groups


# Reading only what is needed


@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_batch_costs_the_footers_and_the_row_groups_of_one_block(
    numbers: HubServer, shards: dict[str, bytes], numbered_views: Any, workers: int
):
    source = open_images(NAME)
    assert source.describe() == (
        f'{NAME}: 800 images (4 parquet files, 32 row groups), column "image", labels "label" (3 classes)'
    )
    footers = numbers.asked(r"GET .*\.parquet")
    assert len(footers) == SHARDS and sum(request.sent for request in footers) <= SHARDS << 16
    numbers.requests.clear()
    loader = iter(TrainLoader(source, numbered_views, batch_size=10, seed=0, num_workers=workers))
    next(loader)
    groups = asked_groups(numbers, shards)
    blocks = 1 + 2 * workers  # a worker makes two batches ahead, from other lanes
    assert 2 <= len(groups) == len(set(groups)) <= 3 * blocks  # a block of 50 rows begins anywhere
    assert max(Counter(path for path, _ in groups).values()) < 8  # no shard was read whole
    assert len(numbers.asked("GET /api/")) <= 2  # one listing, however many threads read


def test_an_epoch_reads_every_row_group_about_once_and_gives_every_image(
    numbers: HubServer, shards: dict[str, bytes], numbered_views: Any
):
    source = open_images(NAME)
    numbers.requests.clear()
    ids = [int(i) for batch in batches(source, numbered_views, ROWS // 10) for i in batch["sample_id"]]
    assert sorted(ids) == list(range(ROWS))
    groups = asked_groups(numbers, shards)
    assert set(groups) == {(path, group) for path in shards if "train" in path for group in range(8)}
    assert len(groups) <= 1.5 * 32  # neighbouring blocks share the row groups at their border


def test_a_stream_that_starts_later_gives_the_same_and_reads_from_there(
    numbers: HubServer, shards: dict[str, bytes], numbered_views: Any
):
    whole = batches(open_images(NAME), numbered_views, 41)
    source = open_images(NAME)
    numbers.requests.clear()
    assert same(batches(source, numbered_views, 1, start_batch=40), whole[40:])
    assert len(asked_groups(numbers, shards)) <= 3


def test_a_push_does_not_change_a_pinned_dataset(
    numbers: HubServer, shards: dict[str, bytes], numbered_views: Any
):
    pinned = pin_revision(NAME)
    assert re.fullmatch(rf"{NAME}@[0-9a-f]{{40}}", pinned) and pin_revision(pinned) == pinned
    source = open_images(NAME)
    before = batches(source, numbered_views, 4)
    gone = dict.fromkeys((path for path in shards if path != "data/extra.parquet"), None)
    numbers.commit("datasets", NAME, gone | {"data/train-0.parquet": shards["data/extra.parquet"]})
    assert open_images(NAME).num_rows == 200
    assert same(batches(open_images(pinned), numbered_views, 4), before)
    assert same(batches(source, numbered_views, 4), before)  # opened before, read after


def test_branches_and_tags_are_revisions_too(numbers: HubServer, shards: dict[str, bytes]):
    huggingface_hub.HfApi().create_tag(NAME, tag="v1", repo_type="dataset")
    numbers.commit("datasets", NAME, {"data/train-00001-of-00004.parquet": None})
    assert [open_images(name).num_rows for name in (NAME, f"{NAME}@v1")] == [600, 800]
    assert pin_revision(f"{NAME}@v1") != pin_revision(NAME)
    for other in ("sample", "./images", "images/*.parquet", "hf://datasets/lab/numbers/data/a.parquet"):
        assert pin_revision(other) == other


def test_not_streamed_gives_the_same_rows(numbers: HubServer):
    rows = [row["label"] for row in open_images(NAME, streaming=False).rows()]
    assert rows == [number % 3 for number in range(ROWS)]


# Failures that pass


FAULTS: dict[str, dict[str, Any]] = {
    "error": {"status": 500, "times": 3},
    "overloaded": {"status": 503, "times": 8},  # more than huggingface_hub's own tries
    "rate limit": {"status": 429, "retry_after": 0},
    "no answer": {"cut_after": 0, "times": 3},
    "reset": {"cut_after": 3000, "times": 3},
    "cut short": {"keep": 3000, "times": 2},
    "timeout": {"delay": 0.5},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_reads_are_repeated_and_give_the_same_samples_bit_for_bit(
    numbers: HubServer, numbered_views: Any, fault: str, monkeypatch: pytest.MonkeyPatch
):
    expected = batches(open_images(NAME), numbered_views, 12)
    source = open_images(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    numbers.fail(r"GET .*\.parquet", skip=2, **FAULTS[fault])
    assert same(batches(source, numbered_views, 12), expected)
    assert all(fault.times == 0 for fault in numbers.faults)


@pytest.mark.parametrize("fault", ["error", "no answer", "reset", "cut short"])
def test_failed_downloads_are_repeated(hub: HubServer, shards: dict[str, bytes], fault: str):
    name = f"{NAME}-{fault.replace(' ', '-')}"  # nothing of it is in the cache
    hub.commit("datasets", name, shards)
    hub.fail(r"GET .*\.parquet", **{**FAULTS[fault], "times": 4})
    rows = [row["label"] for row in open_images(name, streaming=False).rows()]
    assert rows == [number % 3 for number in range(ROWS)] and hub.faults[0].times == 0


def test_a_server_that_comes_back_is_noticed_by_a_worker(numbers: HubServer, numbered_views: Any):
    expected = batches(open_images(NAME), numbered_views, 30)
    loader = iter(TrainLoader(open_images(NAME), numbered_views, batch_size=10, seed=0, num_workers=1))
    got = [next(loader)]
    numbers.fail(r"GET .*\.parquet", cut_after=0, times=10)
    assert same(got + list(itertools.islice(loader, 29)), expected)


def test_no_failure_while_opening_changes_what_is_found(numbers: HubServer, shards: dict[str, bytes]):
    """In particular a card that could not be fetched is not taken for one that does not exist."""
    expected = open_images(NAME).describe()
    paths = {str(request).replace(NAME, "NAME").split("?")[0] for request in numbers.requests}
    assert len(paths) > 8
    for number, (path, what) in enumerate(itertools.product(sorted(paths), ("status", "cut_after"))):
        name = f"lab/numbers-{number}"  # nothing of it is in the cache
        numbers.commit("datasets", name, shards)
        pattern = re.sub(r"[0-9a-f]{40}", "[0-9a-f]{40}", path).replace("NAME", name)
        fault = numbers.fail(
            rf"^{pattern}(\?|$)", **({"status": 503} if what == "status" else {"cut_after": 0})
        )
        assert open_images(name).describe() == expected.replace(NAME, name), path
        assert fault.times == 0 or path.startswith("HEAD"), f"{path} was not asked for"
        numbers.faults.clear()


def test_a_description_that_cannot_be_had_is_not_taken_for_one_that_does_not_exist(
    numbers: HubServer, shards: dict[str, bytes]
):
    """As `datasets` does, which would add the file that is no part of the dataset."""
    name = "lab/described"
    described = {path: content for path, content in shards.items() if path != "README.md"}
    numbers.commit("datasets", name, described | {".huggingface.yaml": CARD.replace("---\n", "").encode()})
    numbers.fail("HEAD .*/.huggingface.yaml", status=503, times=10_000)
    with pytest.raises(UnreachableError, match=rf"^cannot read .huggingface.yaml of {name}: "):
        open_images(name)
    numbers.faults.clear()
    assert open_images(name).num_rows == ROWS


def test_tries_and_waits_are_in_the_log(numbers: HubServer, caplog: pytest.LogCaptureFixture):
    numbers.fail("GET /api/datasets/lab/numbers$", status=503, times=2)
    with caplog.at_level(logging.WARNING, logger="hf_ssl"):
        open_images(NAME)
    line = f"cannot open {NAME}: the server answers 503 Service Unavailable; trying again in 0 s"
    assert [record.message for record in caplog.records if record.name.startswith("hf_ssl")] == [line] * 2


def test_a_slow_server_is_said(
    numbers: HubServer, numbered_views: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "SLOW_SECONDS", 0.1)
    source = open_images(NAME)
    numbers.fail(r"GET .*\.parquet", bytes_per_second=100_000, times=9)
    with caplog.at_level(logging.INFO, logger="hf_ssl"):
        batches(source, numbered_views, 1)
    assert re.search(rf"{NAME}: \d of [23] row groups of the next block read, \d s so far", caplog.text)


# Failures that stay


def test_a_shard_that_is_gone_is_named_at_once(numbers: HubServer, numbered_views: Any):
    source = open_images(NAME)
    numbers.requests.clear()
    numbers.fail(r"GET .*/resolve/.*train-00002", status=404, times=1000)
    with pytest.raises(DataError) as caught:
        batches(source, numbered_views, ROWS)
    expected = r"cannot read hf://datasets/lab/numbers@[0-9a-f]{40}/data/train-00002-of-00004.parquet: "
    assert re.fullmatch(expected + "the server answers 404 Not Found", str(caught.value))
    assert len(numbers.asked("train-00002")) <= 3  # a block's row groups, each asked for once


@pytest.mark.parametrize("what", [{"status": 503}, {"cut_after": 0}, {"keep": 100}], ids=str)
def test_a_shard_that_stays_broken_is_named_after_a_bounded_number_of_tries(
    numbers: HubServer, numbered_views: Any, what: dict[str, int]
):
    source = open_images(NAME)
    numbers.fail(r"GET .*/resolve/.*train-0000", times=10_000, **what)
    numbers.requests.clear()
    with pytest.raises(
        DataError, match=r"^cannot read hf://.*/data/train-0000\d.*still after \d+ s and 5 tries$"
    ):
        batches(source, numbered_views, 1)
    assert len(numbers.requests) <= 3 * 5 * 6 + 5


def test_a_hub_that_stays_away_is_said_in_one_line(numbers: HubServer):
    numbers.stop()
    with pytest.raises(UnreachableError, match=rf"^cannot open {NAME}: ConnectError: .* and 5 tries$"):
        open_images(NAME)


def test_an_older_download_is_no_substitute(numbers: HubServer, shards: dict[str, bytes]):
    """`datasets` falls back to what it has of any revision."""
    open_images(NAME, streaming=False)
    numbers.commit("datasets", NAME, {"data/train-00001-of-00004.parquet": None})
    numbers.fail("GET /api/datasets/.*/tree/", status=404, times=1000)
    with pytest.raises(UnreachableError, match="the cache holds another"):
        open_images(NAME, streaming=False)


def test_without_network_a_download_is_read_from_the_cache(
    numbers: HubServer, monkeypatch: pytest.MonkeyPatch
):
    open_images(NAME, streaming=False)
    numbers.requests.clear()
    for settings in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    assert open_images(NAME, streaming=False).num_rows == ROWS
    with pytest.raises(
        DataError, match=f"^cannot open {NAME}@0000000 without network: the cache holds another commit"
    ):
        open_images(f"{NAME}@{'0' * 40}", streaming=False)
    assert numbers.requests == []


def test_what_does_not_exist_is_said_in_one_line(numbers: HubServer, monkeypatch: pytest.MonkeyPatch):
    for name, options, message in (
        (
            "lab/nothing",
            {},
            "the Hub has no dataset lab/nothing, or it is private or gated; check the name, or",
        ),
        (f"{NAME}@v9", {}, f"{NAME} has no revision v9; give a branch, tag or commit"),
        (NAME, {"split": "dev"}, f'{NAME}: no split "dev"; it has: train'),
        ("lab/num..bers", {}, "cannot open lab/num..bers: "),
        ("lab/empty", {}, "cannot open lab/empty: "),
    ):
        numbers.commit("datasets", "lab/empty", {})
        with pytest.raises(DataError, match="^" + re.escape(message)) as caught:
            open_images(name, **options)
        assert "\n" not in str(caught.value)


# Streams without row counts


MEMBER = 20 * 512  # header and content of one member: as much as tarfile reads at once


@pytest.fixture
def tars(hub: HubServer, numbered_png: Encode) -> HubServer:
    """A webdataset of 2 tar files with 30 images each."""
    files = {}
    for shard in range(2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for number in range(30 * shard, 30 * shard + 30):
                content = numbered_png(number).ljust(MEMBER - 512, b"\0")
                member = tarfile.TarInfo(f"{number:04}.png")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        files[f"part-{shard}.tar"] = buffer.getvalue()
    hub.commit("datasets", "lab/tars", files)
    return hub


@pytest.mark.parametrize("fault", ["error", "overloaded", "no answer", "reset"])
def test_a_tar_that_breaks_off_is_read_on_with_the_same_samples(
    tars: HubServer, numbered_views: Any, fault: str
):
    source = open_images("lab/tars")
    expected = batches(source, numbered_views, 12)
    assert sorted(int(i) for batch in expected[:6] for i in batch["sample_id"])[29:31] == [29, 1 << 32]
    tars.fail(r"GET .*\.tar", **{**FAULTS[fault], "times": 3})
    assert same(batches(source, numbered_views, 12), expected)
    assert tars.faults[0].times == 0


def test_a_tar_whose_connection_breaks_between_two_images_does_not_end_there(
    tars: HubServer, numbered_views: Any
):
    """The client takes a connection that cannot be opened again for the end of the file."""
    source = open_images("lab/tars")
    tars.fail(r"GET .*\.tar", cut_after=3 * MEMBER)
    tars.fail(r"GET .*\.tar", cut_after=0, times=8)
    assert len(list(source.rows())) == 60


def test_a_tar_that_is_gone_or_cut_is_named(tars: HubServer, numbered_views: Any):
    source = open_images("lab/tars")
    tars.fail(r"GET .*/part-1.tar", status=404, times=1000)
    with pytest.raises(
        DataError, match=r"^cannot read hf://datasets/lab/tars@[0-9a-f]{40}/part-1.tar: .*404"
    ):
        batches(source, numbered_views, 12)
    tars.faults.clear()
    cut = tars.files("datasets", "lab/tars")["part-1.tar"][:100_000]
    tars.commit("datasets", "lab/tars", {"part-1.tar": cut})
    with pytest.raises(DataError, match=r"part-1.tar cannot be read: ReadError: unexpected end of data$"):
        batches(open_images("lab/tars"), numbered_views, 12)
