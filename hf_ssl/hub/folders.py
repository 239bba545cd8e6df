"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

MOVED_AWAY = ".old"  # ending of a folder that is being replaced


def refuse_foreign_folder(folder: Path, own_files: Iterable[str], marker: str, overwrite: bool) -> None:
    """Raise unless a folder may be replaced.

    Args:
        folder: the target; it may be absent or empty.
        own_files: names of the files that an earlier write leaves.
        marker: the one of them that nothing else writes.
        overwrite: replace whatever is there.

    Raises:
        FileExistsError: it holds something that this package did not write.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder")
    if overwrite or not folder.exists():
        return
    found = {path.name for path in folder.iterdir()}
    if found and (marker not in found or found - set(own_files)):
        foreign = sorted(found - set(own_files)) or sorted(found)
        raise FileExistsError(
            f"{folder} is not empty and no earlier export (it holds {foreign[0]}); give another folder or "
            "overwrite=True"
        )


def write_whole_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a sibling folder, flush it and rename it; an error leaves `folder` as it was.

    Args:
        folder: the target; replaced if it exists.
        write: fills the empty folder it is given.
    """
    with whole_folder(folder) as partial:
        write(partial)


@contextlib.contextmanager
def whole_folder(folder: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; after the body it is flushed and renamed, after an error removed.

    Args:
        folder: the target; replaced if it exists, left as it was by an error.
        partial: the folder to fill, on the same file system; by default a hidden sibling.
    """
    # Fixed names, so that what a killed process left is found: half a folder, or the earlier one moved away.
    partial = partial or folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}{MOVED_AWAY}")
    keep_one(folder, old)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        keep_one(folder, old)


def write_whole_file(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all; an earlier one stays until then."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    partial.replace(path)
    _flush(path.parent)


def keep_one(folder: Path, old: Path) -> None:
    """Remove the earlier folder if the new one is there, else bring it back."""
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
