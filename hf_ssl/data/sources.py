"""Where images come from: `open_images` finds them and returns a source to read them from.

`datasets` resolves names, configurations, splits and files. Rows of parquet files are then read row group by
row group (pyarrow), map-style data row by row; whatever is left (tar archives, generators, csv, ...) shard by
shard, in order. A folder of image files is walked here.
"""

import glob
import logging
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ssl.data.columns import Columns, DataError, check_columns, features_of, find_columns, printable
from hf_ssl.data.frame_folders import FRAMES_COLUMN, FrameFolderSource
from hf_ssl.data.readers import DatasetSource, FolderSource, ImageSource, ParquetSource, SequentialSource
from hf_ssl.data.remote import (
    DataFile,
    end_broken_streams,
    is_remote,
    pin_commit,
    repeated,
    said_while_slow,
    short_name,
    split_revision,
)

if TYPE_CHECKING:
    import datasets
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

__all__ = ["DataError", "ImageSource", "open_images", "pin_revision"]

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .avif .jp2".split()
)
FILE_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
OPEN_THREADS = 16
GROUP_ROWS = 10_000_000
REPOSITORY = re.compile("hf://datasets/[^@]+@[^/]+/")  # with the commit, as `datasets` names its files
SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | {
    name: "validation" for name in ("val", "valid", "validation", "dev")
}


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
        dataset: name of a dataset on the Hub, owner/name or owner/name@revision (branch, tag or commit); a
            folder of images (labels from its sub-folders, if it has any); a folder, file or glob of parquet
            or webdataset tar files; an object of `datasets`; or "sample" for the images that come with this
            package.
        split: name of the split; by default "train", or the only one there is.
        config_name: configuration of a dataset on the Hub; of the sample a design, or "gallery" or "queries"
            of its retrieval task.
        image_column: by default the one column of images; of a folder "frames" makes each folder of images in
            it a clip.
        label_column: by default the one column of class labels; training needs none.
        text_column: column of captions, one or a list of several for an image; none by default, "" finds it
            by name and type.
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
        files = [name] if is_remote(name) else sorted(glob.glob(name, recursive=True))
        if not files:
            raise DataError(f"no file matches {name}; give an existing file, folder or pattern")
        return _open_named(FILE_BUILDERS[suffix], name, {"train": files}, split, None, wanted, streaming)
    if not _is_hub_name(name):
        raise DataError(
            f"no folder or file {name}; give an existing path or the name of a dataset on the Hub"
        )
    return _open_named(name, short_name(name), None, split, config_name, wanted, streaming)


def pin_revision(dataset: str) -> str:
    """The name of a dataset with the commit that it means now: what was pushed later is not read.

    Args:
        dataset: as `open_images` takes it.

    Returns:
        owner/name@commit for a dataset on the Hub, anything else as it is.

    Raises:
        DataError: the Hub has no such dataset, or cannot be reached.
    """
    name = os.path.expanduser(dataset)
    is_file = os.path.splitext(name)[1].lower() in FILE_BUILDERS
    if dataset == "sample" or os.path.isdir(name) or is_file or not _is_hub_name(name):
        return dataset
    repository, revision = split_revision(name)
    commit = pin_commit(repository, revision)
    return f"{repository}@{commit}" if commit else dataset


def _is_hub_name(name: str) -> bool:
    repository, _ = split_revision(name)
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or "*" in name or is_remote(name)
    return not is_path and repository.count("/") <= 1


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
    if not images and wanted.image != FRAMES_COLUMN:
        images = [file for file in files if os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES]
    if not images:
        raise DataError(
            f"{root} holds no images, {len(files)} other files; give a folder with jpg, png, ... or mp4, ... "
            "files"
        )
    tops = {file.split("/", 1)[0] for file in images}
    folders = {SPLIT_FOLDERS[top.lower()]: top for top in tops if top.lower() in SPLIT_FOLDERS}
    if folders and len(folders) == len(tops):  # every image lies in the folder of a split
        root /= folders[_pick_split(split, list(folders), str(root))]
        images = [file.split("/", 1)[1] for file in images if file.startswith(f"{root.name}/")]
    else:
        _pick_split(split, ["train"], str(root))
    for column, known in (
        (wanted.image, ["image", FRAMES_COLUMN]),
        (wanted.label, ["label"]),
        (wanted.text, []),
    ):
        if column and column not in known:
            raise DataError(
                f'{root} has no column "{column}"; a folder of images has: image, label, and frames (each '
                "folder in it as a clip)"
            )
    if wanted.text == "":
        raise DataError(
            f"{root} is a folder of images without texts; give a dataset with a column of captions"
        )
    return (FrameFolderSource if wanted.image == FRAMES_COLUMN else FolderSource)(root, images)


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
    try:
        builder = _find(path, data_files, config_name)
        source = _open_built(builder, name, split, wanted, streaming)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises all that its decoders do
        first_line = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise DataError(f"cannot open {name}: {first_line}") from error
    if not os.path.exists(path):
        source.origins = _origins(builder)
    return source


def _open_built(builder: Any, name: str, split: str | None, wanted: Columns, streaming: bool) -> ImageSource:
    from datasets.packaged_modules.parquet.parquet import Parquet

    files: Mapping[Any, list[str]] | None = builder.config.data_files
    is_expression = split is not None and any(mark in split for mark in "[+")  # such as train[:10%]
    if is_expression or not streaming or not files:
        _download(builder, name)
        prepared = builder.as_dataset(split=split if is_expression else None)
        return _open_object(prepared, None if is_expression else split, wanted, name)
    split = _pick_split(split, [str(key) for key in files], name)
    if isinstance(builder, Parquet):
        return _open_parquet(name, list(files[split]), builder.info.features, wanted)
    end_broken_streams()
    stream = builder.as_streaming_dataset(split=split)
    return _open_object(stream, None, wanted, name, files=[str(file) for file in files[split]])


def _origins(builder: Any) -> tuple[str, ...] | None:
    """Where files of a dataset from elsewhere lie: in its repository, and in the caches once downloaded."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    files = [str(file) for split in (builder.config.data_files or {}).values() for file in split]
    if files and not any(map(is_remote, files)):
        return None
    homes = {REPOSITORY.match(file) or os.path.dirname(file) + "/" for file in files}
    caches = (HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
    return *(home if isinstance(home, str) else home[0] for home in homes), *(f"{cache}/" for cache in caches)


def _find(path: str, data_files: dict[str, list[str]] | None, config_name: str | None) -> Any:
    """The builder of `datasets` for a name on the Hub, a folder, or a format and its files.

    Raises:
        UnreachableError: it is not here and could not be fetched.
    """
    from datasets import load_dataset_builder
    from huggingface_hub.constants import is_offline_mode

    if data_files is None and not os.path.isdir(path):
        repository, revision = split_revision(path)
        commit = pin_commit(repository, revision)

        def load() -> Any:
            builder = load_dataset_builder(repository, name=config_name, revision=commit)
            if commit and builder.hash != commit:  # after a failure, what an earlier download left
                if is_offline_mode():
                    raise DataError(
                        f"cannot open {short_name(path)} without network: the cache holds another commit"
                    )
                raise ConnectionError("the Hub does not answer, and the cache holds another commit")
            return builder

        return repeated(f"open {short_name(path)}", load)

    def load_files() -> Any:
        return load_dataset_builder(path, name=config_name, data_files=data_files)

    are_remote = data_files is not None and any(map(is_remote, chain(*data_files.values())))
    return repeated(f"open {path}", load_files) if are_remote else load_files()


def _download(builder: Any, name: str) -> None:
    """Downloads and converts what a builder found, unless it is in the cache."""
    with said_while_slow(lambda: f"downloading {name}"):
        repeated(f"download {name}", builder.download_and_prepare)


def _open_parquet(
    name: str, files: list[str], features: "datasets.Features | None", wanted: Columns
) -> ParquetSource:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    def read_metadata(file: DataFile) -> pq.FileMetaData:
        try:
            return file.read(lambda handle: pq.ParquetFile(handle).metadata)
        except pa.ArrowInvalid as error:
            raise DataError(f"{file.path} is not a parquet file: {error}") from error

    metadata: list[pq.FileMetaData] = []
    with (
        ThreadPoolExecutor(OPEN_THREADS) as pool,
        said_while_slow(lambda: f"{name}: {len(metadata)} of {len(files)} parquet files opened"),
    ):
        for data in pool.map(read_metadata, map(DataFile, files)):
            metadata.append(data)
    for file, data in zip(files, metadata, strict=True):
        _check_rows(file, data)
    schemas = [data.schema.to_arrow_schema() for data in metadata]
    columns = find_columns(features or Features.from_arrow_schema(schemas[0]), wanted, name)
    for file, schema in zip(files, schemas, strict=True):
        check_columns(columns.names(), schema.names, file)
    return ParquetSource(name, files, columns, metadata)


def _check_rows(file: str, metadata: "pq.FileMetaData") -> None:
    """Refuses row counts by which planning an epoch alone would fill the memory."""
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if not 0 <= rows <= GROUP_ROWS:
            raise DataError(
                f"{printable(file)} claims {rows:,} rows in row group {group}, more than {GROUP_ROWS:,}; it "
                "is damaged, or holds no images"
            )


def _open_object(
    dataset: Any, split: str | None, wanted: Columns, name: str, files: list[str] | None = None
) -> ImageSource:
    """A source for an object of `datasets`; `files` are those a stream reads, one for each of its shards."""
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, dict):
        return _open_object(dataset[_pick_split(split, list(dataset), name)], None, wanted, name)
    if isinstance(dataset, Dataset):
        return DatasetSource(name, dataset, find_columns(dataset.features, wanted, name))
    if isinstance(dataset, IterableDataset):
        features = dataset.features or features_of(next(iter(dataset), {}))
        if not features:
            raise DataError(f"{name} has no rows; give a dataset with at least one image")
        return SequentialSource(name, dataset, find_columns(features, wanted, name), files)
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


def _relative_files(root: Path) -> list[str]:
    """All files below a folder but hidden ones, sorted.

    Links are followed, wherever they lead: the folder is the user's own. Only a link to a folder above is
    not, as it would have no end; the log names it.
    """
    files: list[str] = []

    def walk(folder: str, prefix: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if real in above:
            logger.warning("not followed, as it leads back to a folder above: %s", printable(folder))
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    walk(entry.path, f"{prefix}{entry.name}/", (*above, real))
                else:
                    files.append(prefix + entry.name)

    walk(str(root), "", ())
    return sorted(files)
