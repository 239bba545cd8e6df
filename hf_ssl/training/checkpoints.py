"""Checkpoints that are whole or not there, and that are refused when something is missing."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # Trainer writes it last: a checkpoint with a readable one is whole
# torch.save and safetensors report a full disk by errors of their own.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or continued from; the message is one line."""


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    numbered = []
    for folder in run.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and _is_whole(folder):
            numbered.append((int(number), folder))
    return [folder for _, folder in sorted(numbered)]


def last_checkpoint(run: Path) -> Path:
    """The whole checkpoint with the most steps.

    Raises:
        CheckpointError: there is none.
    """
    whole = checkpoints(run)
    if not whole:
        raise CheckpointError(f"no checkpoint to resume from in '{run}'")
    return whole[-1]


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done in a checkpoint.

    Raises:
        CheckpointError: the folder is no whole checkpoint.
    """
    if not _is_whole(checkpoint):
        raise CheckpointError(f"'{checkpoint}' is no whole checkpoint: it has no readable {STATE_FILE}")
    return int(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"])


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def removed_unless_whole(folder: Path, what: str) -> Iterator[None]:
    """Remove a folder whose writing failed, by a full disk or an interruption.

    Args:
        folder: removed with all it holds when the body raises.
        what: it, for the message.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        yield
    except WRITE_ERRORS as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(write_failed(what, folder.parent, error)) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_failed(what: str, run: Path, error: BaseException) -> str:
    """One line: what was not written, why, and what is left to continue from."""
    left = checkpoints(run)
    way_out = (
        f"free space and continue from {left[-1].name} with: hf-ssl train --resume {run}"
        if left
        else "there is no earlier checkpoint"
    )
    return f"cannot write {what} in {run}: {' '.join(str(error).split())}; {way_out}"


def check_tensors(checkpoint: Path, model: nn.Module) -> None:
    """Refuse a checkpoint that lacks tensors; Trainer would continue with random ones and a warning.

    Raises:
        CheckpointError: teacher, queue or anything else is missing.
    """
    missing = sorted(set(model.state_dict()) - _stored_names(checkpoint))
    if missing:
        raise CheckpointError(
            f"'{checkpoint}' lacks {len(missing)} tensors of {type(model).__name__}, e.g. '{missing[0]}'; "
            "continuing would start them afresh. Resume from another checkpoint, or start a new run with "
            "--init_from"
        )


def _stored_names(checkpoint: Path) -> set[str]:
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    try:
        with safe_open(checkpoint / SAFE_WEIGHTS_NAME, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {checkpoint / SAFE_WEIGHTS_NAME}: {error}") from error
