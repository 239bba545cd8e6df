"""Sources: what is found in folders, files and objects, and what is said when nothing is."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ssl.data.decoding import decode_image
from hf_ssl.data.readers import ParquetSource
from hf_ssl.data.sources import DataError, ImageSource, open_images

Rows = Callable[..., datasets.Dataset]
Encode = Callable[[int], bytes]


def numbers(source: ImageSource, **which: int) -> list[int]:
    images = [decode_image(row["image"]) for row in source.rows(**which)]
    return [int(image[0, 0, 0]) * 256 + int(image[0, 0, 1]) for image in images]


def labels(source: ImageSource) -> list[int]:
    return [row["label"] for row in source.rows()]


def write_images(folder: Path, encode: Encode, files: dict[str, int]) -> None:
    for name, number in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number))


def write_tar(path: Path, encode: Encode, first: int, count: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(first, first + count):
            for suffix, content in (("png", encode(number)), ("cls", str(number % 3).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def parquet_folder(tmp_path: Path, numbered_rows: Rows) -> Path:
    folder = tmp_path / "parquet"
    folder.mkdir()
    for shard in range(2):
        numbered_rows(25, 25 * shard).to_parquet(
            folder / f"train-0000{shard}-of-00002.parquet", batch_size=10
        )
    numbered_rows(7, 100).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def test_parquet_folder_has_its_splits_columns_and_row_groups(parquet_folder: Path):
    source = open_images(parquet_folder)
    assert source.num_rows == 50
    assert source.unit_sizes is not None and source.unit_sizes.tolist() == [10, 10, 5, 10, 10, 5]
    assert (source.image_column, source.label_column) == ("image", "label")
    assert source.label_names == ["zero", "one", "two"]
    assert numbers(source) == list(range(50))
    assert labels(source) == [number % 3 for number in range(50)]
    assert numbers(open_images(parquet_folder, split="test")) == list(range(100, 107))


def test_parquet_file_and_glob_give_the_rows_of_the_folder(parquet_folder: Path):
    assert numbers(open_images(f"{parquet_folder}/train-*.parquet")) == list(range(50))
    assert numbers(open_images(parquet_folder / "test-00000-of-00001.parquet")) == list(range(100, 107))


def test_rows_start_and_stop_where_asked(parquet_folder: Path):
    assert numbers(open_images(parquet_folder), start=18, limit=4) == [18, 19, 20, 21]


def test_not_streamed_gives_the_same_rows(parquet_folder: Path):
    source = open_images(parquet_folder, streaming=False)
    assert "Arrow" in source.describe()
    assert numbers(source) == list(range(50))


def test_part_of_a_split_can_be_named(parquet_folder: Path):
    assert numbers(open_images(parquet_folder, split="train[10:13]")) == [10, 11, 12]


def test_parquet_reads_a_row_group_once_while_it_is_held(
    parquet_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    source = open_images(parquet_folder)
    reads: list[int] = []
    read_unit = source._read_unit  # type: ignore[attr-defined]
    monkeypatch.setattr(source, "_read_unit", lambda unit: reads.append(unit) or read_unit(unit))
    assert numbers(source) == list(range(50))
    assert reads == [0, 1, 2, 3, 4, 5]


def test_row_groups_of_an_owner_that_is_gone_are_let_go(parquet_folder: Path):
    class Owner:
        pass

    source = open_images(parquet_folder)
    assert isinstance(source, ParquetSource)
    first, second = Owner(), Owner()
    source.hold(first, np.array([0, 12]))
    source.row(0), source.row(12)
    source.hold(second, np.array([30]))
    source.row(30)
    assert sorted(source._tables) == [0, 1, 3]
    del first
    source.hold(second, np.array([31, 49]))
    assert sorted(source._tables) == [3]


def test_parquet_at_an_address_is_read_through_fsspec(numbered_rows: Rows):
    import fsspec

    with fsspec.open("memory://images/train.parquet", "wb") as file:
        numbered_rows(5).to_parquet(file)
    assert numbers(open_images("memory://images/train.parquet")) == [0, 1, 2, 3, 4]


def test_sub_folders_are_labels(tmp_path: Path, numbered_png: Encode):
    write_images(
        tmp_path, numbered_png, {"dog/deep/a.png": 1, "cat/b.png": 2, "dog/c.PNG": 3, "cat/.hidden.png": 4}
    )
    source = open_images(tmp_path)
    assert source.label_names == ["cat", "dog"]
    assert (numbers(source), labels(source)) == ([2, 3, 1], [0, 1, 1])


def test_folder_without_sub_folders_has_no_labels_and_ignores_other_files(
    tmp_path: Path, numbered_png: Encode
):
    write_images(tmp_path, numbered_png, {"blue_train.png": 1, "test.png": 2})
    (tmp_path / "notes.txt").write_text("none")
    source = open_images(str(tmp_path))
    assert source.label_column is None and numbers(source) == [1, 2]
    assert "no labels" in source.describe()


def test_folders_named_as_splits_are_splits(tmp_path: Path, numbered_png: Encode):
    write_images(tmp_path, numbered_png, {"train/cat/a.png": 1, "train/dog/b.png": 2, "val/cat/c.png": 3})
    assert numbers(open_images(tmp_path)) == [1, 2]
    assert open_images(tmp_path).label_names == ["cat", "dog"]
    assert numbers(open_images(tmp_path, split="validation")) == [3]


def test_file_that_vanished_comes_as_empty_bytes(tmp_path: Path, numbered_png: Encode):
    write_images(tmp_path, numbered_png, {"a.png": 1, "b.png": 2})
    source = open_images(tmp_path)
    (tmp_path / "a.png").unlink()
    assert [bool(row["image"]) for row in source.rows()] == [False, True]


def test_webdataset_is_read_shard_by_shard(tmp_path: Path, numbered_png: Encode):
    write_tar(tmp_path / "shard-0.tar", numbered_png, 0, 5)
    write_tar(tmp_path / "shard-1.tar", numbered_png, 5, 4)
    for source in (open_images(tmp_path), open_images(f"{tmp_path}/shard-*.tar", label_column="cls")):
        assert source.num_rows is None and source.unit_sizes is None
        assert numbers(source) == list(range(9))
    assert labels(source) == [number % 3 for number in range(9)]


def test_objects_of_datasets(numbered_rows: Rows):
    rows = numbered_rows(12)
    assert numbers(open_images(rows)) == list(range(12))
    assert numbers(open_images(rows.select([3, 1]))) == [3, 1]
    assert numbers(open_images(rows.to_iterable_dataset(num_shards=3))) == list(range(12))
    splits = datasets.DatasetDict({"train": rows, "test": numbered_rows(3, 50)})
    assert numbers(open_images(splits, split="test")) == [50, 51, 52]
    assert numbers(open_images(splits)) == list(range(12))


def test_saved_dataset_is_a_folder_too(tmp_path: Path, numbered_rows: Rows):
    numbered_rows(4).save_to_disk(str(tmp_path / "saved"))
    assert numbers(open_images(tmp_path / "saved")) == [0, 1, 2, 3]


def test_generator_of_pil_images_without_features(numbered_png: Encode):
    from PIL import Image

    def generate():
        for number in range(5):
            yield {"picture": Image.open(io.BytesIO(numbered_png(number)))}

    source = open_images(datasets.IterableDataset.from_generator(generate))
    assert source.image_column == "picture" and numbers(source) == [0, 1, 2, 3, 4]


def test_bytes_are_found_and_paths_are_taken_when_named(tmp_path: Path, numbered_png: Encode):
    write_images(tmp_path / "images", numbered_png, {"a.png": 7})
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"raw": [numbered_png(5)], "file": [str(tmp_path / "images/a.png")]}), path)
    assert numbers(open_images(path)) == [5]
    assert numbers(open_images(path, image_column="file")) == [7]


def test_texts_come_with_the_images(numbered_rows: Rows):
    rows = numbered_rows(3).add_column("caption", ["a", "b", "c"])
    assert [row["text"] for row in open_images(rows, text_column="caption").rows()] == ["a", "b", "c"]


def test_built_in_sample():
    source = open_images("sample")
    assert source.num_rows and source.num_rows > 1000
    assert source.label_column == "category" and source.label_names is not None


def test_cifar10(shared_dir: Path):
    source = open_images(shared_dir / "data" / "cifar10")
    assert (source.num_rows, len(source.label_names or [])) == (10_000, 10)
    assert decode_image(next(source.rows(start=9_999))["image"]).shape == (32, 32, 3)


def test_every_image_of_a_folder_is_found(shared_dir: Path):
    assert open_images(shared_dir / "data" / "photos").num_rows == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, r'no split "dev"; it has: train, test$'),
        ({"image_column": "img"}, r'no column "img"; it has: image, label$'),
        ({"image_column": "label"}, r'column "label" .* holds no images; it has: image \(Image\), label'),
        ({"label_column": "klass"}, r'no column "klass"; it has: image, label$'),
        ({"label_column": "image"}, r"holds no classes but Image; columns of classes: label$"),
        ({"config_name": "large"}, r"BuilderConfig 'large' not found"),
    ],
)
def test_wrong_name_lists_the_right_ones(parquet_folder: Path, options: dict[str, str], message: str):
    with pytest.raises(DataError, match=message) as caught:
        open_images(parquet_folder, **options)
    assert "\n" not in str(caught.value)


def test_nothing_there_is_said_in_one_line(tmp_path: Path, numbered_rows: Rows, numbered_png: Encode):
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(numbered_png(1))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet file")
    numbered_rows(0).to_parquet(tmp_path / "empty.parquet")
    two = numbered_rows(1).add_column("thumb", [{"bytes": b"", "path": None}], feature=datasets.Image())
    for dataset, options, message in (
        (tmp_path / "missing", {}, "no folder or file .*missing; give an existing path"),
        ("missing/", {}, "no folder or file missing/; give an existing path"),
        (tmp_path / "x-*.parquet", {}, "no file matches .*x-.*parquet"),
        (tmp_path / "empty", {}, "holds no images, 0 other files"),
        (tmp_path / "images", {"split": "test"}, 'no split "test"; it has: train'),
        (tmp_path / "images", {"text_column": "text"}, 'no column "text"; a folder of images has: image'),
        (tmp_path / "broken.parquet", {}, "is not a parquet file"),
        (tmp_path / "empty.parquet", {}, "has no rows"),
        (numbered_rows(0), {}, "has no rows"),
        (numbered_rows(2).to_iterable_dataset().filter(lambda row: False), {}, "DEFERRED"),
        (two, {}, "several image columns, image, thumb; name one as image_column"),
        (datasets.Dataset.from_dict({"x": [1]}), {}, r"has no image column; it has: x \(int64\)"),
        (datasets.DatasetDict({"a": two, "b": two}), {}, "name one of its splits; it has: a, b"),
        (42, {}, "cannot read images from a int"),
    ):
        if message == "DEFERRED":  # only reading tells that a stream is empty
            assert list(open_images(dataset).rows()) == []
            continue
        with pytest.raises(DataError, match=message) as caught:
            open_images(dataset, **options)
        assert "\n" not in str(caught.value)
