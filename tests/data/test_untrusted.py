"""Data come from strangers: nothing in them fills the memory, runs code, or reads or writes other files."""

import io
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

import hf_ssl
from hf_ssl.data import decoding, readers, sources
from hf_ssl.data.columns import printable
from hf_ssl.data.decoding import BrokenImageError, decode_image
from hf_ssl.data.loader import TrainLoader
from hf_ssl.data.sources import DataError, open_images
from tests.hub_server import HubServer

Encode = Callable[[int], bytes]

SIDE = 60_000


def encode(file_format: str, color: str = "red", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, file_format, **options)
    return buffer.getvalue()


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


def png_of(side: int) -> bytes:
    size = struct.pack(">II", side, side)
    header = b"IHDR" + size + b"\x08\x02\0\0\0"
    data = encode("PNG")
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def jpeg_of(side: int) -> bytes:
    data = encode("JPEG")
    small, large = struct.pack(">HH", 16, 16), struct.pack(">HH", side, side)
    return replaced(data, b"\xff\xc0\0\x11\x08" + small, b"\xff\xc0\0\x11\x08" + large)


def webp_of(side: int) -> bytes:
    data = encode("WEBP", lossless=True, exif=b"Exif\0\0MM")  # with a header that states a canvas
    place = data.index(b"VP8X") + 12
    canvas = (side - 1).to_bytes(3, "little") * 2
    return data[:place] + canvas + data[place + 6 :]


BOMBS = {
    "PNG": png_of(SIDE),
    "JPEG": jpeg_of(SIDE),
    "GIF": replaced(
        encode("GIF"), b"GIF87a" + struct.pack("<HH", 16, 16), b"GIF87a" + struct.pack("<HH", SIDE, SIDE)
    ),
    "WEBP": webp_of(16_000),  # its format allows no more
    "BMP": replaced(encode("BMP"), struct.pack("<III", 40, 16, 16), struct.pack("<III", 40, SIDE, SIDE)),
    "TIFF": encode("TIFF").replace(
        struct.pack("<HHII", 256, 4, 1, 16), struct.pack("<HHII", 256, 4, 1, SIDE * SIDE)
    ),
    "PPM": f"P6 {SIDE} {SIDE} 255\n".encode(),
}


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever decodes pixels fails."""

    def fail(*args: object) -> None:
        raise AssertionError("was decoded")

    monkeypatch.setattr(decoding, "decode_jpeg", fail)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("file_format", BOMBS)
def test_an_absurd_size_is_refused_before_anything_is_decoded(file_format: str, no_decoder: None):
    with pytest.raises(
        BrokenImageError, match=r"more than PIL.Image.MAX_IMAGE_PIXELS|pixels\) exceeds limit"
    ):
        decode_image(BOMBS[file_format])


@pytest.mark.parametrize("marker", [b"\xff\x01", b"\xff\xd0"])
def test_a_jpeg_cannot_hide_its_size_behind_a_marker_that_has_no_length(marker: bytes, no_decoder: None):
    """Who takes what follows for a length jumps over the frame that counts, into a comment with another."""
    large, small = (
        b"\xff\xc0\0\x11\x08" + struct.pack(">HH", side, side) + b"\x03\1\x22\0\2\x11\1\3\x11\1"
        for side in (SIDE, 16)
    )
    comment = b"\xff\xfe" + struct.pack(">H", 2 + len(small)) + small
    jump = struct.pack(">H", 2 + len(large) + 4)
    hidden = b"\xff\xd8" + marker + jump + large + comment + encode("JPEG").partition(small)[2]
    with pytest.raises(BrokenImageError, match="exceeds limit|cannot identify"):
        decode_image(hidden)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_the_limit_is_pillows(file_format: str, monkeypatch: pytest.MonkeyPatch):
    data = encode(file_format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16)
    assert decode_image(data).shape == (16, 16, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 16 - 1)
    with pytest.raises(
        BrokenImageError, match=r"^16 x 16 pixels are more than PIL.Image.MAX_IMAGE_PIXELS allows, 255"
    ):
        decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(data).shape == (16, 16, 3)


def test_a_bomb_counts_as_a_broken_image_and_the_stream_goes_on(numbered_png: Encode, numbered_views: Any):
    files = [numbered_png(number) for number in range(39)] + [BOMBS["PNG"]]
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": file, "path": None} for file in files]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    loader = TrainLoader(open_images(rows), numbered_views, batch_size=10, seed=0, max_bad_fraction=0.1)
    ids = [int(i) for batch, _ in zip(loader, range(4), strict=False) for i in batch["sample_id"]]
    assert len(ids) == 40 and 39 not in ids and loader.bad_images.count == 1


def test_formats_that_are_no_pictures_are_not_opened():
    """Pillow hands EPS to Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(BrokenImageError, match="cannot identify"):
        decode_image(eps)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(file_format: str):
    others = [Image.new("RGB", (16, 16), color) for color in ("green", "blue")]
    data = encode(file_format, save_all=True, append_images=others, duration=10)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert abs(decode_image(data).astype(int) - [255, 0, 0]).max() < 3


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_file_that_is_cut_anywhere_is_broken_or_whole_but_nothing_else(file_format: str):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, file_format)
    data, whole = buffer.getvalue(), decode_image(buffer.getvalue())
    for length in range(0, len(data), 7):
        try:
            decoded = decode_image(data[:length])
        except BrokenImageError as error:
            assert "\n" not in str(error)
        else:
            assert np.array_equal(decoded, whole), length


# Archives


def tar_of(members: list[tarfile.TarInfo], content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_nothing_of_an_archive_is_ever_written(
    tmp_path: Path, numbered_png: Encode, numbered_views: Any, monkeypatch: pytest.MonkeyPatch
):
    home = tmp_path / "deep" / "data"
    home.mkdir(parents=True)
    members = [
        member("../../up.png"),
        member(str(tmp_path / "absolute.png")),
        member("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        member("hard.png", tarfile.LNKTYPE, "../../up.png"),
        member("pipe.png", tarfile.FIFOTYPE),
        member("fine.png"),
    ]
    (home / "shard.tar").write_bytes(tar_of(members, numbered_png(5)))
    for name in ("extract", "extractall", "_extract_member"):
        monkeypatch.setattr(tarfile.TarFile, name, lambda *args, **kwargs: pytest.fail("was extracted"))
    monkeypatch.chdir(home)
    rows = list(open_images(home / "shard.tar").rows())
    assert [row["image"] for row in rows] == [numbered_png(5)] * len(rows) and len(rows) >= 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [home / "shard.tar"]


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickles_among_the_data_are_not_loaded(tmp_path: Path, numbered_png: Encode):
    mark = tmp_path / "mark"
    payload = pickle.dumps(Bomb(mark))
    pickle.loads(payload)
    mark.rmdir()  # it works
    array = io.BytesIO()
    np.save(array, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    for suffix, content in {
        "pickle": payload,
        "pyd": payload,
        "pth": payload,
        "npy": array.getvalue(),
    }.items():
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for name, data in (("a.png", numbered_png(1)), (f"a.{suffix}", content)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        try:
            assert len(list(open_images(tmp_path / "shard.tar").rows())) == 1
        except DataError as error:
            assert "\n" not in str(error)
        assert not mark.exists(), suffix


def test_the_package_loads_no_pickle():
    for path in Path(hf_ssl.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"\bpickle\b|allow_pickle|weights_only=False|np\.load\(|yaml\.(unsafe|full)_load", text
        ), path


# Folders


def test_links_are_followed_but_not_in_circles(
    tmp_path: Path, numbered_png: Encode, caplog: pytest.LogCaptureFixture
):
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder, names in ((outside, ["b.png"]), (root / "cat", ["a.png"]), (root / "dog", ["c.png"])):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(numbered_png(ord(name[0])))
    (root / "cat" / "elsewhere").symlink_to(outside)
    (root / "cat" / "single.png").symlink_to(outside / "b.png")
    (root / "cat" / "circle").symlink_to(root)
    (root / "dog" / "self").symlink_to(root / "dog")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nothing")
    source = open_images(root)
    files = [os.path.relpath(source.row_name(index), root) for index in range(source.num_rows or 0)]
    assert files == ["cat/a.png", "cat/elsewhere/b.png", "cat/single.png", "dog/c.png", "dog/gone.png"]
    assert [bool(row["image"]) for row in source.rows()] == [True, True, True, True, False]
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2 and all("leads back to a folder above" in line for line in lines)


def test_what_is_no_file_of_bounded_size_is_not_read(tmp_path: Path, numbered_png: Encode):
    (tmp_path / "a.png").write_bytes(numbered_png(1))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2 << 30)
    source = open_images(tmp_path)
    assert [len(row["image"]) > 0 for row in source.rows()] == [True, False, False, False]


def test_names_from_data_reach_the_log_without_control_characters(
    tmp_path: Path, numbered_png: Encode, numbered_views: Any, caplog: pytest.LogCaptureFixture
):
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(numbered_png(number))
    (tmp_path / "x\n\x1b[31mhf-ssl: all is well\r.png").write_bytes(b"no image")
    loader = TrainLoader(open_images(tmp_path), numbered_views, batch_size=21, seed=0, max_bad_fraction=0.2)
    next(iter(loader))
    (line,) = (record.message for record in caplog.records if "broken" in record.message)
    assert r"x\n\x1b[31mhf-ssl: all is well\r.png" in line and line.isprintable()


def test_printable_text_is_bounded_and_left_as_it_is_otherwise():
    assert printable("häuser/猫 1.png") == "häuser/猫 1.png"
    assert printable("a\udcff\u202eb") == r"a\udcff\u202eb"
    assert len(printable("x" * 10_000)) == 303


# Tables


def image_table(rows: list[dict[str, Any]]) -> bytes:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_table_from_the_hub_reads_no_file_of_this_machine_and_no_address(
    hub: HubServer, tmp_path: Path, numbered_png: Encode, numbered_views: Any, streaming: bool
):
    (tmp_path / "private.png").write_bytes(numbered_png(7))
    hub.commit("datasets", "lab/other", {"image.png": numbered_png(8)})
    paths = [
        str(tmp_path / "private.png"),
        "/dev/zero",
        f"{hub.address}/datasets/lab/other/resolve/main/image.png",
        "hf://datasets/lab/other/image.png",
        f"zip://a.png::{tmp_path}/private.zip",
    ]
    rows = [{"bytes": None, "path": path} for path in paths]
    good = [{"bytes": numbered_png(number), "path": "/etc/passwd"} for number in range(35)]
    hub.commit("datasets", f"lab/paths-{streaming}", {"train.parquet": image_table(rows + good)})
    source = open_images(f"lab/paths-{streaming}", streaming=streaming)
    assert [len(row["image"]) > 0 for row in source.rows()] == [False] * 5 + [True] * 35
    loader = TrainLoader(source, numbered_views, batch_size=10, seed=0, max_bad_fraction=1)
    for _ in zip(range(4), loader, strict=False):
        pass
    assert loader.bad_images.count == 5
    reasons = loader.bad_images.reasons.values()
    assert all(reason.startswith("the row names a file outside of its dataset, ") for reason in reasons)
    assert not hub.asked("lab/other")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_of_images_on_the_hub_is_read(hub: HubServer, numbered_png: Encode, streaming: bool):
    name = f"lab/folder-{streaming}"
    files = {
        f"train/{label}/{number}.png": numbered_png(number) for number, label in enumerate(("cat", "dog"))
    }
    hub.commit("datasets", name, files)
    rows = list(open_images(name, streaming=streaming).rows())
    assert sorted((row["image"], row["label"]) for row in rows) == sorted(
        (numbered_png(i), i) for i in range(2)
    )


def test_absurd_row_groups_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "GROUP_ROWS", 1000)
    nothing = pa.table({"image": pa.nulls(1001, pa.binary())})
    pq.write_table(nothing, tmp_path / "rows.parquet")
    with pytest.raises(
        DataError, match="rows.parquet claims 1,001 rows in row group 0, more than 1,000; it is dam"
    ):
        open_images(tmp_path / "rows.parquet")


def test_a_small_file_of_huge_values_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One value of 256 kB, 4,096 times: 1 GiB in a file of some kB."""
    value = b"\0" * (1 << 18)
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4096, np.int32)), pa.array([value]))
    path = tmp_path / "values.parquet"
    pq.write_table(pa.table({"image": images}), path, dictionary_pagesize_limit=1 << 20, store_schema=False)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(readers, "UNIT_BYTES", 64 << 20)
    pool = pa.default_memory_pool()
    source = open_images(path)
    before = pool.bytes_allocated()
    with pytest.raises(DataError, match=r"values.parquet, row group 0, has more than 0 GiB"):
        next(source.rows())
    assert pool.max_memory() - before < 200 << 20


def test_rows_that_are_no_images_are_counted(tmp_path: Path, numbered_png: Encode, numbered_views: Any):
    rows: list[dict[str, Any]] = [
        {"bytes": None, "path": None},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": "a\0b.png"},
        {"bytes": None, "path": "x" * 5000},
        {"bytes": None, "path": "/"},
    ]
    good = [{"bytes": numbered_png(number), "path": None} for number in range(35)]
    (tmp_path / "train.parquet").write_bytes(image_table(rows + good))
    source = open_images(tmp_path / "train.parquet")
    loader = TrainLoader(source, numbered_views, batch_size=10, seed=0, max_bad_fraction=1)
    for _ in zip(range(4), loader, strict=False):
        pass
    assert loader.bad_images.count == 5
    assert all(reason.isprintable() and len(reason) < 400 for reason in loader.bad_images.reasons.values())
