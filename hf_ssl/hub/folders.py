"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path


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
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Fixed names, so that what a killed process left is found: half a folder, or the earlier one moved away.
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    _keep_one(folder, old)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _keep_one(folder, old)


def _keep_one(folder: Path, old: Path) -> None:
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
