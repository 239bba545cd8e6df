"""Checkpoint folders: what makes one whole, which one is taken, which go."""

import json
import logging
import os
from pathlib import Path

import pytest

from hf_ssl.training.checkpoints import (
    PARTIAL_FOLDER,
    CheckpointError,
    StepLayout,
    checkpoints,
    last_checkpoint,
    remove_leftovers,
    rotate,
    whole_checkpoint,
    why_torn,
    write_contents,
)

LAYOUT = StepLayout(processes=2, per_device=4, accumulation=1, optimizer="adamw")


def write(run: Path, step: int, weights_only: bool = False) -> Path:
    """A checkpoint of two processes."""
    folder = run / f"checkpoint-{step}"
    with whole_checkpoint(folder, renames=True) as partial:
        (partial / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for name in ("model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"):
            (partial / name).write_bytes(b"x" * 1000)
        write_contents(partial, LAYOUT, weights_only)
    return folder


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 700), "has 700 of 1,000 bytes"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: (folder / "rng_state_1.pth").unlink(), "rng_state_1.pth is missing"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"global_step":4'), "has 16 of 19 bytes"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"global_step"= 10}'), "cannot be read"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json is missing"),
        (lambda folder: (folder / "checkpoint.json").write_text("[]"), "cannot be read"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "checkpoint.json is missing"),
    ],
)
def test_torn_checkpoint_is_passed_over_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, reason: str
):
    write(tmp_path, 2)
    damage(write(tmp_path, 10))
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
    assert caplog.messages[0].startswith("passed over checkpoint-10: ") and reason in caplog.messages[0]
    assert "continuing from checkpoint-2" in caplog.messages[0]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_when_none_is_whole_one_line_names_them_all(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no checkpoint to resume from in"):
        last_checkpoint(tmp_path)
    for step in (2, 4):
        (write(tmp_path, step) / "optimizer.pt").unlink()
    with pytest.raises(
        CheckpointError, match="no whole checkpoint.*checkpoint-4 .optimizer.pt is missing.*-2 .*step 0"
    ):
        last_checkpoint(tmp_path)


def test_weights_alone_are_no_checkpoint_to_continue_from(tmp_path: Path):
    assert why_torn(write(tmp_path, 2, weights_only=True)) == "it holds weights only (save_only_model)"
    assert why_torn(tmp_path / "nothing") == "there is no such folder"


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path):
    write(tmp_path, 2)
    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "full"), CheckpointError)):
        with pytest.raises(expected), whole_checkpoint(tmp_path / "checkpoint-4", renames=True) as partial:
            (partial / "model.safetensors").write_bytes(b"half")
            raise error
        assert names(tmp_path) == ["checkpoint-2"]


def test_nothing_has_the_final_name_before_all_is_written(tmp_path: Path):
    with whole_checkpoint(tmp_path / "checkpoint-2", renames=True) as partial:
        (partial / "model.safetensors").write_bytes(b"half")
        assert names(tmp_path) == [PARTIAL_FOLDER]
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_torn_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    (write(tmp_path, 2) / "optimizer.pt").unlink()
    assert why_torn(write(tmp_path, 2)) is None
    assert names(tmp_path) == ["checkpoint-2"]


def test_what_a_killed_write_left_is_removed(tmp_path: Path):
    """Killed in a write, and between the two renames that replace a checkpoint."""
    write(tmp_path, 2).rename(tmp_path / ".checkpoint-2.old")
    (tmp_path / PARTIAL_FOLDER / "checkpoint-4").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"] and why_torn(tmp_path / "checkpoint-2") is None


def test_rotation_keeps_the_current_and_the_best_whatever_the_numbers_say(tmp_path: Path):
    """A run that passed over a torn checkpoint-40 and went on from an earlier one."""
    folders = [write(tmp_path, step) for step in (40, 10, 20, 35)]
    for age, folder in enumerate(folders):
        os.utime(folder, (age, age))
    rotate(tmp_path, None, folders[3], None)
    assert len(names(tmp_path)) == 4
    rotate(tmp_path, 3, folders[3], folders[1])
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20", "checkpoint-35"]
    rotate(tmp_path, 1, folders[3], folders[1])
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-35"]
    rotate(tmp_path, 1, folders[3], None)
    assert names(tmp_path) == ["checkpoint-35"]
