"""Clips that are stored as folders of frames: every folder that holds image files is one clip."""

import os
import re
from pathlib import Path

from hf_ssl.data.columns import DataError, Row, printable
from hf_ssl.data.decoding import FrameFiles
from hf_ssl.data.readers import FolderSource

FRAMES_COLUMN = "frames"
NUMBERS = re.compile(r"(\d+)")


class FrameFolderSource(FolderSource):
    """Folders of frames below a folder; the first folder level gives the labels, if clips lie below it.

    Args:
        root: the folder.
        files: image files, relative to `root`. Those of one folder are frames in the order of the numbers in
            their names, so that 10.jpg comes after 9.jpg.

    Raises:
        DataError: images lie in `root` itself.
    """

    def __init__(self, root: Path, files: list[str]):
        clips: dict[str, list[str]] = {}
        for file in files:
            folder, _, name = file.rpartition("/")
            clips.setdefault(folder, []).append(name)
        if "" in clips:
            raise DataError(
                f"{root} holds frames of no clip, such as {printable(clips[''][0])}; give a folder in which "
                "each clip's frames lie in a folder of their own"
            )
        super().__init__(root, sorted(clips))
        self._frames = [sorted(clips[folder], key=_by_numbers) for folder in self.files]
        self.columns = self.columns._replace(image=FRAMES_COLUMN)
        self._details = "folders of frames"

    def row(self, index: int) -> Row:
        folder = os.path.join(self.root, self.files[index])
        paths = tuple(os.path.join(folder, name) for name in self._frames[index])
        return {**super().row(index), "image": FrameFiles(paths)}


def _by_numbers(name: str) -> tuple[list[str | int], str]:
    parts = NUMBERS.split(name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
