"""The kinds of image sources: image files, Arrow tables, parquet files, streams; all behind one interface.

Nothing is decoded here: an image stays the bytes of its file, or the path of a file, until its views are
made. A *unit* is what is read at once (a row group; a single row where access is free). A source with known
units can be read at any row at no cost; one without (`unit_sizes` is None) only from the start of a shard.
"""

import os
import stat
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from hf_ssl.data.columns import Columns, DataError, Row, printable
from hf_ssl.data.decoding import BrokenImageError
from hf_ssl.data.remote import (
    DataFile,
    Persistence,
    is_missing,
    is_remote,
    is_temporary,
    reason,
    said_while_slow,
)

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

SHARD_BITS = 32  # row r of shard s of a sequential source has the index (s << SHARD_BITS) + r
BLOCK_ROWS = 2048  # rows shuffled together: enough to mix
BLOCK_BYTES = 256 << 20  # fewer rows per block where images are larger than 128 kB
FILE_BYTES = 1 << 30  # of an image at most: 8 bytes for each of Pillow's 89 million pixels are less
UNIT_BYTES = 4 << 30  # of a row group at most
READ_THREADS = 8  # for files that are not here: each read waits for the network


class ImageSource(ABC):
    """Images, and their labels or texts if there are any.

    Attributes:
        name: what to call it in messages.
        num_rows: None where only reading everything would tell.
        unit_sizes: rows of each unit; None for a source that can only be read in order.
        block_rows: how many rows to shuffle together.
        label_names: names of the classes, if the data carry them.
        origins: what paths in rows may begin with, for data from elsewhere: such data name no file of this
            machine, and no other address.
    """

    block_rows: int = BLOCK_ROWS
    origins: tuple[str, ...] | None = None

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

    def load(self, row: Row) -> Any:
        """The image of a row, see `load_image`."""
        return load_image(row["image"], self.origins)

    def undecoded_rows(self, limit: int | None = None) -> Iterator[Row]:
        """Rows in stored order for their labels and texts; an image may be the path of its file."""
        return islice(self._read(0), limit)

    def rows(self, limit: int | None = None, start: int = 0) -> Iterator[Row]:
        """Rows in stored order, images as bytes (or PIL, where the dataset holds no file).

        An image file that cannot be read comes as empty bytes, which no decoder accepts.
        """
        for row in islice(self._read(start), limit):
            try:
                row["image"] = self.load(row)
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
        row: Row = {"image": os.path.join(self.root, self.files[index])}
        if self._labels is not None:
            row["label"] = int(self._labels[index])
        return row

    def row_name(self, index: int) -> str:
        return printable(os.path.join(self.root, self.files[index]))


class DatasetSource(IndexedSource):
    """A map-style `datasets.Dataset`."""

    def __init__(self, name: str, dataset: "datasets.Dataset", columns: Columns):
        self._rows = dataset.select_columns(columns.names()).with_format("arrow")
        super().__init__(name, columns, np.ones(len(dataset), np.int64), "Arrow table")

    def row(self, index: int) -> Row:
        return TableRows(self._rows[index], self.columns).row(0)

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
        self._tables: dict[int, TableRows] = {}
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
            self._tables[unit] = TableRows(self._read_unit(unit), self.columns)
        return self._tables[unit].row(index - self._starts[unit])

    def hold(self, owner: object, indices: NDArray[np.int64]) -> None:
        units = np.unique(np.searchsorted(self._starts, indices, side="right") - 1)
        self._hold_units(owner, set(units.tolist()))
        missing = [unit for unit in units.tolist() if unit not in self._tables]
        if missing and is_remote(self._files[0]):
            self._fetch(missing)

    def _fetch(self, units: list[int]) -> None:
        """Reads units from elsewhere, several at once."""
        total = len(units)
        files = {number: DataFile(self._files[number]) for number, _ in map(self._units.__getitem__, units)}
        tables: list[pa.Table] = []
        files[self._units[units[0]][0]].read(lambda _: None)  # else every thread would fetch the listing
        with (
            ThreadPoolExecutor(READ_THREADS) as pool,
            said_while_slow(
                lambda: f"{self.name}: {len(tables)} of {total} row groups of the next block read"
            ),
        ):
            for unit, table in zip(
                units, pool.map(partial(self._read_unit, files=files), units), strict=True
            ):
                tables.append(table)
                self._tables[unit] = TableRows(table, self.columns)

    def row_name(self, index: int) -> str:
        unit = bisect_right(self._starts, index) - 1
        file, group = self._units[unit]
        return f"{printable(self._files[file])}, row group {group}, row {index - self._starts[unit]}"

    def _hold_units(self, owner: object, units: set[int]) -> None:
        self._held[owner] = units
        kept = set().union(*self._held.values())
        self._tables = {unit: table for unit, table in self._tables.items() if unit in kept}

    def _read_unit(self, unit: int, files: Mapping[int, DataFile] | None = None) -> "pa.Table":
        import pyarrow as pa

        number, group = self._units[unit]
        # Opened for each read: a file opened before a fork would be shared by all workers.
        file = files[number] if files else DataFile(self._files[number])
        where = f"{printable(file.path)}, row group {group},"
        try:
            table = file.read(
                partial(_read_group, metadata=self._metadata[number], group=group, columns=self.columns)
            )
        except (pa.ArrowException, OSError, MemoryError) as error:
            raise DataError(f"{where} cannot be read: {printable(reason(error))}") from error
        if table is None:
            raise DataError(
                f"{where} has more than {UNIT_BYTES >> 30} GiB, which memory must hold at once; write the "
                "file again with smaller row groups"
            )
        if table.num_rows != self.unit_sizes[unit]:
            raise DataError(f"{where} has {table.num_rows} rows, not the {self.unit_sizes[unit]} it claims")
        return table


class SequentialSource(ImageSource):
    """A `datasets.IterableDataset`: tar archives, generators, any format without row counts.

    Args:
        name: what to call it in messages.
        dataset: the stream.
        columns: that are read.
        files: the file of each shard, where it is known.
    """

    def __init__(
        self, name: str, dataset: "datasets.IterableDataset", columns: Columns, files: list[str] | None = None
    ):
        # In this order: columns selected before would be decoded nevertheless.
        dataset = dataset.decode(False) if dataset.features else dataset
        self._dataset = dataset.select_columns(columns.names())
        self.num_shards = int(dataset.num_shards)
        self._files = files if files is not None and len(files) == self.num_shards else None
        super().__init__(name, columns, None, f"stream of {self.num_shards} shards")

    def shard(self, shard: int) -> Iterator[tuple[int, Row]]:
        """Index and row of every image of one shard, in stored order.

        A shard at an address that fails midway is read again up to where it failed.

        Raises:
            DataError: a file cannot be read.
        """
        persistence = Persistence(f"read {self._shard_name(shard)}")
        done = 0
        while True:
            try:
                for index, values in enumerate(islice(self._values(shard), done, None), done):
                    done = index + 1
                    yield shard << SHARD_BITS | index, self.columns.row(values)
                    persistence.restart()
                return
            except GeneratorExit:
                raise
            except Exception as error:
                if self._files is None:  # made by a program, not read from a file
                    raise
                self._wait(persistence, shard, error)

    def _wait(self, persistence: Persistence, shard: int, error: Exception) -> None:
        if is_remote(self._shard_name(shard)) and (is_temporary(error) or is_missing(error)):
            return persistence.wait(error)
        raise DataError(f"{self._shard_name(shard)} cannot be read: {reason(error)}") from error

    def _values(self, shard: int) -> Iterator[dict[str, Any]]:
        part = self._dataset.shard(self.num_shards, shard)
        # Inside a loader worker `iter(part)` would give each worker other shards; `part.iter` reads them all.
        batches: Iterable[Mapping[str, list[Any]]] = part.iter(batch_size=16)
        for batch in batches:
            for row in zip(*batch.values(), strict=True):
                yield dict(zip(batch, row, strict=True))

    def _shard_name(self, shard: int) -> str:
        return printable(self._files[shard]) if self._files else f"{self.name}, shard {shard}"

    def row_name(self, index: int) -> str:
        return f"{self._shard_name(index >> SHARD_BITS)}, row {index & ((1 << SHARD_BITS) - 1)}"

    def _read(self, start: int) -> Iterator[Row]:
        shards = chain.from_iterable(self.shard(shard) for shard in range(self.num_shards))
        return (row for _, row in islice(shards, start, None))


def _read_group(handle: Any, metadata: "pq.FileMetaData", group: int, columns: Columns) -> "pa.Table | None":
    """One row group; None if it is too large, which compressed values do not show before they are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    reader = pq.ParquetFile(handle, metadata=metadata, pre_buffer=True)
    batches, size = [], 0
    for batch in reader.iter_batches(64, row_groups=[group], columns=columns.names(), use_threads=False):
        size += batch.nbytes
        if size > UNIT_BYTES:
            return None
        batches.append(batch)
    return pa.Table.from_batches(batches, None if batches else reader.schema_arrow)


def load_image(image: Any, origins: tuple[str, ...] | None = None) -> Any:
    """The image of a row ready for `decode_image`: the bytes of its file, or the object the dataset holds.

    Args:
        image: bytes, an object, or the path of a file.
        origins: what a path may begin with; None for data of this machine, which may name any file.

    Raises:
        BrokenImageError: the row holds no image, or its file cannot or must not be read.
        UnreachableError: its file is at an address that does not answer.
    """
    if image is None:
        raise BrokenImageError("the row holds no image")
    if not isinstance(image, str):
        return image
    if origins is not None and not _lies_within(image, origins):
        raise BrokenImageError(f"the row names a file outside of its dataset, {printable(image)}")
    return _read_remote(image) if is_remote(image) else _read_local(image)


def _lies_within(path: str, origins: tuple[str, ...]) -> bool:
    *archives, file = path.split("::")  # such as zip://cat/a.png::hf://datasets/...
    is_inside = file.startswith(origins) and all(archive.startswith("zip://") for archive in archives)
    return is_inside and ".." not in path.split("/")


def _read_remote(path: str) -> bytes:
    """A failing connection is no broken image: its error passes."""
    content: bytes = DataFile(path).read(lambda handle: handle.read(FILE_BYTES + 1))
    if len(content) > FILE_BYTES:
        raise BrokenImageError(f"{printable(path)} has more than {FILE_BYTES >> 20} MiB")
    return content


def _read_local(path: str) -> bytes:
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode) and found.st_size <= FILE_BYTES:
            return Path(path).read_bytes()
    except OSError as error:
        raise BrokenImageError(f"cannot read {printable(path)}: {error.strerror}") from error
    except ValueError as error:  # a null character in the name
        raise BrokenImageError(f"cannot read {printable(path)}: {error}") from error
    raise BrokenImageError(f"{printable(path)} is no file of at most {FILE_BYTES >> 20} MiB")


class TableRows:
    """Rows of an Arrow table; what is small becomes lists at once, as reading value by value takes longer.

    Args:
        table: has the columns.
        columns: which those are.
    """

    def __init__(self, table: "pa.Table", columns: Columns):
        import pyarrow as pa
        import pyarrow.compute as pc

        self._columns = columns
        self._images = table.column(columns.image)
        others = [name for name in columns.names() if name != columns.image]
        self._others = {name: table.column(name).to_pylist() for name in others}
        kind = self._images.type
        # Reading the bytes alone is several times faster than the whole struct {bytes, path} of `datasets`.
        has_files = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        self._files = pc.struct_field(self._images, "bytes") if has_files else None

    def row(self, index: int) -> Row:
        """The row at a place of the table."""
        image = None if self._files is None else self._files[index].as_py()
        values = {name: column[index] for name, column in self._others.items()}
        values[self._columns.image] = self._images[index].as_py() if image is None else image
        return self._columns.row(values)
