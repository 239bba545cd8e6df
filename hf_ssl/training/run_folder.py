"""The folder of a new run: its own, and gone again if nothing came of the run."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from hf_ssl.hub.cards import RECIPE_FILE
from hf_ssl.training.checkpoints import checkpoints
from hf_ssl.training.recipes import RecipeError
from hf_ssl.training.run_lock import LOCK_FILE, run_lock

KILLED_AT_ONCE = {  # all that a run leaves that had not begun
    *(LOCK_FILE, f".{RECIPE_FILE}.partial"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@contextlib.contextmanager
def new_run_folder(output_dir: str | None, name: str) -> Iterator[Path]:
    """A folder that this run has for itself; nothing is left of one that fails before its first checkpoint.

    Args:
        output_dir: the folder; None: the next free one in `runs`.
        name: of that one.

    Raises:
        RecipeError: the folder is not empty.
        RunInUse: another run writes into it.
    """
    folder = Path(output_dir or "")
    made = _missing(folder)
    if output_dir is None:
        folder, made = _numbered(name)
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output_dir '{folder}' is a file; choose a new folder")
    with run_lock(folder):
        if any(path.name not in KILLED_AT_ONCE for path in folder.iterdir()):
            raise RecipeError(
                f"output_dir '{folder}' is not empty; choose another, or continue it with --resume {folder}"
            )
        try:
            yield folder
        except BaseException:
            if not checkpoints(folder):
                for path in folder.glob("*"):  # the folder was empty before
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                with contextlib.suppress(OSError):  # somebody else may have put something beside it
                    for path in made:
                        path.rmdir()
            raise


def _numbered(name: str) -> tuple[Path, list[Path]]:
    """The next free folder in `runs`, made at once so that no two runs take the same; and what was made."""
    count = 1
    folder = Path("runs") / name
    while True:
        made = _missing(folder)
        try:
            folder.mkdir(parents=True)
            return folder, made
        except FileExistsError:
            count += 1
            folder = Path("runs") / f"{name}-{count}"


def _missing(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.parents) if not path.exists()]
