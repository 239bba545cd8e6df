"""Where images come from: `open_images` and the sources it returns, all behind one interface.

`datasets` resolves names, configurations, splits and files. Rows of parquet files are then read row group by
row group (pyarrow), map-style data row by row; whatever is left (tar archives, generators, csv, ...) shard by
shard, in order. Nothing is decoded here: an image stays the bytes of its file, or the path of a file, until
its views are made.

A *unit* is what is read at once (a row group; a single row where access is free). A source with known units
can be read at any row at no cost; one without (`unit_sizes` is None) only from the start of a shard.
"""

import glob
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from hf_ssl.data.columns import Columns, DataError, Row, check_columns, features_of, find_columns
from hf_ssl.data.decoding import BrokenImageError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .avif .jp2".split()
)
FILE_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
__all__ = [
    "Columns",
    "DataError",
    "ImageSource",
    "IndexedSource",
    "Row",
    "SequentialSource",
    "load_image",
    "open_images",
]
SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | {
    name: "validation" for name in ("val", "valid", "validation", "dev")
}
SHARD_BITS = 32  # row r of shard s of a sequential source has the index (s << SHARD_BITS) + r
BLOCK_ROWS = 2048  # rows shuffled together; perf.md measured no better mixing above it
BLOCK_BYTES = 256 << 20  # fewer rows per block where images are larger than 128 kB


class ImageSource(ABC):
    """Images, and their labels or texts if there are any.

    Attributes:
        name: what to call it in messages.
        num_rows: None where only reading everything would tell.
        unit_sizes: rows of each unit; None for a source that can only be read in order.
        block_rows: how many rows to shuffle together.
        label_names: names of the classes, if the data carry them.
    """

    block_rows: int = BLOCK_ROWS

    def __init__(self, name: str, columns: Columns, unit_sizes: NDArray[np.int64] | None, details: str):
        self.name = name
        self.columns = columns
        self.unit_sizes = unit_sizes
        self.num_rows: int | None = None if unit_sizes is None else int(unit_sizes.sum())
        self._details = details
        if self.num_rows == 0:
            raise DataError(f"{name} has no rows; give a dataset with at least one image")

    @property
    def image_column(self) -> str:
        return self.columns.image

    @property
    def label_column(self) -> str | None:
        return self.columns.label

    @property
    def text_column(self) -> str | None:
        return self.columns.text

    @property
    def label_names(self) -> list[str] | None:
        return self.columns.label_names

    def describe(self) -> str:
        """What was found, in one line."""
        count = "an unknown number of" if self.num_rows is None else f"{self.num_rows:,}"
        labels = f'labels "{self.label_column}"' if self.label_column else "no labels"
        classes = f" ({len(self.label_names)} classes)" if self.label_names else ""
        return (
            f'{self.name}: {count} images ({self._details}), column "{self.image_column}", {labels}{classes}'
        )

    @abstractmethod
    def row_name(self, index: int) -> str:
        """Where row `index` comes from, for messages."""

    @abstractmethod
    def _read(self, start: int) -> Iterator[Row]:
        """Rows in stored order."""

    def rows(self, limit: int | None = None, start: int = 0) -> Iterator[Row]:
        """Rows in stored order, images as bytes (or PIL, where the dataset holds no file).

        An image file that cannot be read comes as empty bytes, which no decoder accepts.
        """
        for row in islice(self._read(start), limit):
            try:
                row["image"] = load_image(row["image"])
            except BrokenImageError:
                row["image"] = b""
            yield row


class IndexedSource(ImageSource):
    """A source that can be read at any row."""

    num_rows: int
    unit_sizes: NDArray[np.int64]

    @abstractmethod
    def row(self, index: int) -> Row:
        """Row `index`, undecoded."""

    def hold(self, owner: object, indices: NDArray[np.int64]) -> None:  # noqa: B027 - nothing to hold by default
        """Says that `owner` will read these rows now, and no longer those it named before."""

    def _read(self, start: int) -> Iterator[Row]:
        return (self.row(index) for index in range(start, self.num_rows))


class FolderSource(IndexedSource):
    """Image files below a folder; the first folder level gives the labels, if every image lies in one."""

    def __init__(self, root: Path, files: list[str]):
        self.root = root
        self.files = files  # relative to root, sorted
        tops = [file.split("/", 1)[0] if "/" in file else "" for file in files]
        names = sorted(set(tops))
        has_labels = len(names) > 1 and "" not in names
        self._labels = np.searchsorted(names, tops) if has_labels else None
        columns = Columns("image", "label", None, names) if has_labels else Columns("image")
        super().__init__(str(root), columns, np.ones(len(files), np.int64), "folder of image files")

    def row(self, index: int) -> Row:
        row: Row = {"image": self.row_name(index)}
        if self._labels is not None:
            row["label"] = int(self._labels[index])
        return row

    def row_name(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])


class DatasetSource(IndexedSource):
    """A map-style `datasets.Dataset`."""

    def __init__(self, name: str, dataset: "datasets.Dataset", columns: Columns):
        self._rows = dataset.select_columns(columns.names()).with_format("arrow")
        super().__init__(name, columns, np.ones(len(dataset), np.int64), "Arrow table")

    def row(self, index: int) -> Row:
        return _table_row(self._rows[index], 0, self.columns)

    def row_name(self, index: int) -> str:
        return f"{self.name}, row {index}"


class ParquetSource(IndexedSource):
    """Parquet files, local or on the Hub, read by row group; a unit is one row group of one file."""

    def __init__(self, name: str, files: list[str], columns: Columns, metadata: "list[pq.FileMetaData]"):
        self._files = files
        self._metadata = metadata
        self._units = [(f, g) for f, data in enumerate(metadata) for g in range(data.num_row_groups)]
        groups = [metadata[f].row_group(g) for f, g in self._units]
        sizes = np.array([group.num_rows for group in groups], np.int64)
        self._starts: list[int] = [0, *np.cumsum(sizes).tolist()]
        self._tables: dict[int, pa.Table] = {}
        self._held: WeakKeyDictionary[object, set[int]] = WeakKeyDictionary()  # a dead owner holds nothing
        super().__init__(name, columns, sizes, f"{len(files)} parquet files, {len(groups)} row groups")
        row_bytes = max(1, sum(group.total_byte_size for group in groups) // self.num_rows)
        largest = int(sizes.max())
        self.block_rows = max(largest, min(max(BLOCK_ROWS, 2 * largest), BLOCK_BYTES // row_bytes))

    def row(self, index: int) -> Row:
        unit = bisect_right(self._starts, index) - 1
        if unit not in self._tables:
            if not any(unit in units for units in self._held.values()):
                self._hold_units(self, {unit})  # read out of turn: kept until the next such read
            self._tables[unit] = self._read_unit(unit)
        return _table_row(self._tables[unit], index - self._starts[unit], self.columns)

    def hold(self, owner: object, indices: NDArray[np.int64]) -> None:
        units = np.unique(np.searchsorted(self._starts, indices, side="right") - 1)
        self._hold_units(owner, set(units.tolist()))

    def row_name(self, index: int) -> str:
        unit = bisect_right(self._starts, index) - 1
        file, group = self._units[unit]
        return f"{self._files[file]}, row group {group}, row {index - self._starts[unit]}"

    def _hold_units(self, owner: object, units: set[int]) -> None:
        self._held[owner] = units
        kept = set().union(*self._held.values())
        self._tables = {unit: table for unit, table in self._tables.items() if unit in kept}

    def _read_unit(self, unit: int) -> "pa.Table":
        import pyarrow.parquet as pq

        # Opened for each read: a file opened before a fork would be shared by all workers.
        file, group = self._units[unit]
        with _open(self._files[file]) as handle:
            reader = pq.ParquetFile(handle, metadata=self._metadata[file], pre_buffer=True)
            return reader.read_row_group(group, columns=self.columns.names(), use_threads=False)


class SequentialSource(ImageSource):
    """A `datasets.IterableDataset`: tar archives, generators, any format without row counts."""

    def __init__(self, name: str, dataset: "datasets.IterableDataset", columns: Columns):
        dataset = dataset.select_columns(columns.names())
        self._dataset = dataset.decode(False) if dataset.features else dataset
        self.num_shards = int(dataset.num_shards)
        super().__init__(name, columns, None, f"stream of {self.num_shards} shards")

    def shard(self, shard: int) -> Iterator[tuple[int, Row]]:
        """Index and row of every image of one shard, in stored order."""
        part = self._dataset.shard(self.num_shards, shard)
        # Inside a loader worker `iter(part)` would give each worker other shards; `part.iter` reads them all.
        batches: Iterable[Mapping[str, list[Any]]] = part.iter(batch_size=16)
        values = (
            dict(zip(batch, row, strict=True))
            for batch in batches
            for row in zip(*batch.values(), strict=True)
        )
        return ((shard << SHARD_BITS | index, self.columns.row(value)) for index, value in enumerate(values))

    def row_name(self, index: int) -> str:
        return f"{self.name}, shard {index >> SHARD_BITS}, row {index & ((1 << SHARD_BITS) - 1)}"

    def _read(self, start: int) -> Iterator[Row]:
        shards = chain.from_iterable(self.shard(shard) for shard in range(self.num_shards))
        return (row for _, row in islice(shards, start, None))


def load_image(image: Any) -> Any:
    """The image of a row ready for `decode_image`: the bytes of its file, or the object the dataset holds.

    Raises:
        BrokenImageError: the row holds no image, or its file cannot be read.
    """
    if image is None:
        raise BrokenImageError("the row holds no image")
    if not isinstance(image, str):
        return image
    if "://" in image:  # a failing connection is no broken image: its error passes
        with _open(image) as handle:
            return handle.read()
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise BrokenImageError(f"cannot read {image}: {error.strerror}") from error


def open_images(
    dataset: "str | Path | ImageSource | datasets.Dataset | datasets.IterableDataset | dict[str, Any]",
    *,
    split: str | None = None,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    streaming: bool = True,
) -> ImageSource:
    """Opens images from wherever they are.

    Args:
        dataset: name of a dataset on the Hub, a folder of images (labels from its sub-folders, if it has
            any), a folder, file or glob of parquet or webdataset tar files, an object of `datasets`, or
            "sample" for the images that come with this package.
        split: name of the split; by default "train", or the only one there is.
        config_name: configuration of a dataset on the Hub; of the sample a design, or "gallery" or "queries" of
            its retrieval task.
        image_column: by default the one column of images.
        label_column: by default the one column of class labels; training needs none.
        text_column: column of captions; none by default.
        streaming: read from where the files are; False downloads and converts them to an Arrow table first.

    Raises:
        DataError: nothing there, no images in it, or no such split or column.
    """
    if isinstance(dataset, ImageSource):
        return dataset
    wanted = Columns(image_column or "", label_column, text_column)
    if not isinstance(dataset, (str, Path)):
        return _open_object(dataset, split, wanted, "the given dataset")
    if dataset == "sample":
        return _open_sample(split, config_name, wanted)
    name = os.path.expanduser(str(dataset))
    if os.path.isdir(name):
        return _open_folder(Path(name), split, config_name, wanted, streaming)
    suffix = os.path.splitext(name)[1].lower()
    if suffix in FILE_BUILDERS:
        files = [name] if "://" in name else sorted(glob.glob(name, recursive=True))
        if not files:
            raise DataError(f"no file matches {name}; give an existing file, folder or pattern")
        return _open_named(FILE_BUILDERS[suffix], name, {"train": files}, split, None, wanted, streaming)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "*" in name:
        raise DataError(
            f"no folder or file {name}; give an existing path or the name of a dataset on the Hub"
        )
    return _open_named(name, name, None, split, config_name, wanted, streaming)


def _open_sample(split: str | None, config_name: str | None, wanted: Columns) -> ImageSource:
    from hf_ssl.data.sample import RETRIEVAL_PARTS, load_retrieval_task, load_sample

    try:
        if config_name in RETRIEVAL_PARTS:
            dataset = load_retrieval_task()[RETRIEVAL_PARTS.index(config_name)]
        else:
            dataset = load_sample(split or "train", config_name)
    except ValueError as error:
        raise DataError(str(error)) from error
    name = f"sample ({config_name})" if config_name else "sample"
    return _open_object(dataset, None, wanted._replace(label=wanted.label or "category"), name)


def _open_folder(
    root: Path, split: str | None, config_name: str | None, wanted: Columns, streaming: bool
) -> ImageSource:
    """A folder of images is walked here: `datasets` takes file names for splits, and loses images by that."""
    if any((root / marker).exists() for marker in ("dataset_dict.json", "state.json")):
        from datasets import load_from_disk

        return _open_object(load_from_disk(str(root)), split, wanted, str(root))
    files = _relative_files(root)
    suffixes = {os.path.splitext(file)[1].lower() for file in files}
    images = [file for file in files if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]
    if suffixes & {".parquet", ".tar", ".arrow"} or (".zip" in suffixes and not images):
        return _open_named(str(root), str(root), None, split, config_name, wanted, streaming)
    if not images:
        raise DataError(
            f"{root} holds no images, {len(files)} other files; give a folder with jpg, png, ... files"
        )
    tops = {file.split("/", 1)[0] for file in images}
    folders = {SPLIT_FOLDERS[top.lower()]: top for top in tops if top.lower() in SPLIT_FOLDERS}
    if folders and len(folders) == len(tops):  # every image lies in the folder of a split
        root /= folders[_pick_split(split, list(folders), str(root))]
        images = [file.split("/", 1)[1] for file in images if file.startswith(f"{root.name}/")]
    else:
        _pick_split(split, ["train"], str(root))
    for column, known in ((wanted.image, ["image"]), (wanted.label, ["label"]), (wanted.text, [])):
        if column and column not in known:
            raise DataError(f'{root} has no column "{column}"; a folder of images has: image, label')
    return FolderSource(root, images)


def _open_named(
    path: str,
    name: str,
    data_files: dict[str, list[str]] | None,
    split: str | None,
    config_name: str | None,
    wanted: Columns,
    streaming: bool,
) -> ImageSource:
    """What `datasets` finds under a name, in a folder, or for a format and files."""
    from datasets import load_dataset_builder
    from datasets.packaged_modules.parquet.parquet import Parquet

    try:
        builder = load_dataset_builder(path, name=config_name, data_files=data_files)
        files: Mapping[Any, list[str]] | None = builder.config.data_files
        if (
            not streaming or not files or (split and set(split) & set("[+"))
        ):  # an expression such as train[:10%]
            builder.download_and_prepare()
            prepared = builder.as_dataset(
                split=None if split is None or split in builder.info.splits else split
            )
            return _open_object(prepared, split, wanted, name)
        split = _pick_split(split, [str(key) for key in files], name)
        if isinstance(builder, Parquet):
            return _open_parquet(name, list(files[split]), builder.info.features, wanted)
        return _open_object(builder.as_streaming_dataset(split=split), None, wanted, name)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot open {name}: {reason}") from error


def _open_parquet(
    name: str, files: list[str], features: "datasets.Features | None", wanted: Columns
) -> ParquetSource:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    def read_metadata(file: str) -> pq.FileMetaData:
        try:
            with _open(file) as handle:
                return pq.ParquetFile(handle).metadata
        except pa.ArrowInvalid as error:
            raise DataError(f"{file} is not a parquet file: {error}") from error

    with ThreadPoolExecutor(16) as pool:
        metadata = list(pool.map(read_metadata, files))
    schemas = [data.schema.to_arrow_schema() for data in metadata]
    columns = find_columns(features or Features.from_arrow_schema(schemas[0]), wanted, name)
    for file, schema in zip(files, schemas, strict=True):
        check_columns(columns.names(), schema.names, file)
    return ParquetSource(name, files, columns, metadata)


def _open_object(dataset: Any, split: str | None, wanted: Columns, name: str) -> ImageSource:
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, dict):
        return _open_object(dataset[_pick_split(split, list(dataset), name)], None, wanted, name)
    if isinstance(dataset, Dataset):
        return DatasetSource(name, dataset, find_columns(dataset.features, wanted, name))
    if isinstance(dataset, IterableDataset):
        features = dataset.features or features_of(next(iter(dataset), {}))
        if not features:
            raise DataError(f"{name} has no rows; give a dataset with at least one image")
        return SequentialSource(name, dataset, find_columns(features, wanted, name))
    raise DataError(
        f"cannot read images from a {type(dataset).__name__}; give a path, a Hub name or a datasets object"
    )


def _pick_split(split: str | None, available: list[str], name: str) -> str:
    if split is None and ("train" in available or len(available) == 1):
        return "train" if "train" in available else available[0]
    if split not in available:
        rule = "name one of its splits" if split is None else f'no split "{split}"'
        raise DataError(f"{name}: {rule}; it has: {', '.join(available)}")
    return split


def _table_row(table: "pa.Table", index: int, columns: Columns) -> Row:
    values = {name: table.column(name)[index] for name in columns.names()}
    image = values.pop(columns.image)
    # Reading the bytes alone is three times faster than the whole struct {bytes, path} of `datasets`.
    file = image["bytes"].as_py() if hasattr(image, "keys") and image.is_valid else None
    image = image.as_py() if file is None else file
    return columns.row({columns.image: image} | {name: value.as_py() for name, value in values.items()})


def _relative_files(root: Path) -> list[str]:
    files = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if relative == "." else relative + "/"
        files += [prefix + name for name in names if not name.startswith(".")]
    return sorted(files)


def _open(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()
