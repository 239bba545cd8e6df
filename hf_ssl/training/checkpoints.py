"""Checkpoints that are whole or not there, and that are refused when something is missing.

A checkpoint is written under `_partial` in the run folder, flushed and renamed. Its last file lists all
others with their sizes, so that what a disk or a copy lost later is found without reading anything.
"""

import contextlib
import json
import logging
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerState
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_ssl.hub.folders import MOVED_AWAY, keep_one, whole_folder
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.lora import LORA_FILE

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
CONTENTS_FILE = "checkpoint.json"  # written last
PARTIAL_FOLDER = "_partial"  # Trainer uploads nothing that begins with "_", and rotates "checkpoint-*"
# torch.save and safetensors report a full disk by errors of their own.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or continued from; the message is one line."""


@dataclass(frozen=True)
class StepLayout:
    """How a run makes one optimizer step; what a checkpoint must share with the run that continues it.

    Attributes:
        processes: number of processes.
        per_device: images of one process in a micro-batch.
        accumulation: micro-batches of a step.
        optimizer: name of the optimizer, whose state the checkpoint holds.
    """

    processes: int
    per_device: int
    accumulation: int
    optimizer: str

    @classmethod
    def of(cls, args: SSLTrainingArguments) -> "StepLayout":
        """Of a run."""
        return cls(
            args.world_size,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.optimizer,
        )

    @property
    def global_batch(self) -> int:
        """Images of a step."""
        return self.processes * self.per_device * self.accumulation

    def __str__(self) -> str:
        parts = f"{self.per_device} per device x {self.processes} processes"
        return f"{parts} x {self.accumulation} accumulated"


# What is there


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return [folder for folder in checkpoint_folders(run) if why_torn(folder) is None]


def checkpoint_folders(run: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, by their steps."""
    named = [(folder.name.removeprefix("checkpoint-"), folder) for folder in run.glob("checkpoint-*")]
    return [folder for _, folder in sorted((int(step), folder) for step, folder in named if step.isdigit())]


def why_torn(checkpoint: Path) -> str | None:
    """What a checkpoint lacks; None if it is whole. Looks at sizes and the state, not at tensors."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        contents = _read_contents(checkpoint)
        for name, size in contents["files"].items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} of {size:,} bytes"
        TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"it cannot be read: {' '.join(str(error).split())}"
    if contents["weights_only"]:
        return "it holds weights only (save_only_model)"
    return None


def last_checkpoint(run: Path) -> Path:
    """The whole checkpoint with the most steps; a warning names each later one that is torn.

    Raises:
        CheckpointError: there is none.
    """
    torn: list[tuple[str, str]] = []
    for folder in reversed(checkpoint_folders(run)):
        reason = why_torn(folder)
        if reason is None:
            for name, why in torn:
                logger.warning("passed over %s: %s; continuing from %s", name, why, folder.name)
            return folder
        torn.append((folder.name, reason))
    if not torn:
        raise CheckpointError(f"no checkpoint to resume from in '{run}'")
    listed = ", ".join(f"{name} ({why})" for name, why in torn)
    raise CheckpointError(
        f"no whole checkpoint to resume from in '{run}': {listed}; remove them to start again from step 0"
    )


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done in a whole checkpoint."""
    return int(TrainerState.load_from_json(str(checkpoint / STATE_FILE)).global_step)


def layout_of(checkpoint: Path) -> StepLayout:
    """How the run made its steps that wrote a whole checkpoint."""
    return StepLayout(**_read_contents(checkpoint)["layout"])


def _read_contents(checkpoint: Path) -> Any:
    return json.loads((checkpoint / CONTENTS_FILE).read_text(encoding="utf-8"))


# Writing


@contextlib.contextmanager
def whole_checkpoint(folder: Path, renames: bool) -> Iterator[Path]:
    """Yield the folder that processes write into; it gets its final name after the body, or is removed.

    Args:
        folder: of the checkpoint.
        renames: whether this process does so; the others only write.

    Raises:
        CheckpointError: it could not be written.
    """
    partial = folder.parent / PARTIAL_FOLDER / folder.name
    try:
        with whole_folder(folder, partial) if renames else contextlib.nullcontext(partial):
            yield partial
    except CheckpointError:
        raise
    except WRITE_ERRORS as error:
        raise CheckpointError(write_failed(folder.name, folder.parent, error)) from error
    finally:
        if renames:
            shutil.rmtree(partial.parent, ignore_errors=True)


def write_contents(checkpoint: Path, layout: StepLayout, weights_only: bool) -> None:
    """List the files of a checkpoint beside how its run made a step; the last thing to be written."""
    files = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    contents = {"layout": asdict(layout), "weights_only": weights_only, "files": files}
    (checkpoint / CONTENTS_FILE).write_text(json.dumps(contents, indent=1), encoding="utf-8")


def remove_leftovers(run: Path) -> None:
    """Remove what a run that was killed while writing a checkpoint left."""
    shutil.rmtree(run / PARTIAL_FOLDER, ignore_errors=True)
    for old in run.glob(f".checkpoint-*{MOVED_AWAY}"):
        keep_one(run / old.name.removeprefix(".").removesuffix(MOVED_AWAY), old)


def rotate(run: Path, limit: int | None, current: Path, best: Path | None) -> None:
    """Remove the checkpoints written first until `limit` are left; the current and the best one stay.

    Trainer's own rotation can take the current checkpoint for an old one, where a torn one of a later step
    was passed over and the file system keeps no times.
    """
    if limit is None or limit <= 0:
        return
    kept = {current, best or current}
    folders = checkpoint_folders(run)
    old = sorted((folder for folder in folders if folder not in kept), key=lambda path: path.stat().st_mtime)
    removed = run / PARTIAL_FOLDER
    for folder in old[: max(len(folders) - max(limit, len(kept)), 0)]:
        # Renamed first: one that a killed run left half removed would be the newest by its time.
        removed.mkdir(exist_ok=True)
        folder.rename(removed / folder.name)
    shutil.rmtree(removed, ignore_errors=True)


def write_failed(what: str, run: Path, error: BaseException) -> str:
    """One line: what was not written, why, and what is left to continue from."""
    way_on = resume_hint(run)
    way_out = f"free space and {way_on}" if way_on else "there is no earlier checkpoint"
    return f"cannot write {what} in {run}: {' '.join(str(error).split())}; {way_out}"


def resume_hint(run: Path) -> str:
    """How to continue a run that ended too early; empty where it left no checkpoint."""
    left = checkpoints(run)
    if not left:
        return ""
    return f"continue from {left[-1].name} with: hf-ssl train --resume {shlex.quote(str(run))}"


# Reading


def check_layout(checkpoint: Path, layout: StepLayout) -> None:
    """Refuse a checkpoint whose steps are not those of this run.

    Raises:
        CheckpointError: another global batch or optimizer.
    """
    written = layout_of(checkpoint)
    for name, then, now in (
        ("global_batch_size", written.global_batch, layout.global_batch),
        ("optimizer", written.optimizer, layout.optimizer),
    ):
        if then != now:
            raise CheckpointError(
                f"'{checkpoint}' was written with {name} {then}, this run has {now}: a step would no longer "
                f"be the same; give {name} {then}, or start a new run with --init_from"
            )


def check_tensors(checkpoint: Path, model: nn.Module) -> None:
    """Refuse a checkpoint that lacks tensors; Trainer would continue with random ones and a warning.

    Raises:
        CheckpointError: teacher, queue or anything else is missing or has another shape.
    """
    stored = _stored_shapes(checkpoint)
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    if missing := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(
            f"'{checkpoint}' lacks {len(missing)} tensors of {type(model).__name__}, e.g. '{missing[0]}'; "
            "continuing would start them afresh. Resume from another checkpoint, or start a new run with "
            "--init_from"
        )
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise CheckpointError(
                f"'{name}' is {tuple(stored[name])} in '{checkpoint}' and {tuple(shape)} in this run; resume "
                "with the values that the run began with, or start a new run with --init_from"
            )


def _stored_shapes(checkpoint: Path) -> dict[str, list[int]]:
    """Shape of every tensor by name, from the headers of the files."""
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    names = [SAFE_WEIGHTS_NAME]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if (checkpoint / LORA_FILE).is_file():
        names.append(LORA_FILE)
    shapes: dict[str, list[int]] = {}
    for name in names:
        try:
            with safe_open(checkpoint / name, framework="pt") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot read {checkpoint / name}: {error}; resume from another checkpoint"
            ) from error
    return shapes
