"""Ctrl-C in this process: the first finishes the step and saves, the second stops at once."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_ssl.training.interrupt import Interrupted
from hf_ssl.training.run import train
from hf_ssl.training.trainer import SSLTrainer
from tests.training.test_run import TINY


class PressCtrlC(TrainerCallback):
    """Sends the signal at one step, so many times."""

    def __init__(self, step: int, times: int) -> None:
        self.step, self.times = step, times

    def on_substep(self, state: Any) -> None:
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_substep(state)


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make every trainer press Ctrl-C."""

    def install(step: int, times: int) -> None:
        original = SSLTrainer.train

        def pressed(self: SSLTrainer, *args: Any, **kwargs: Any) -> Any:
            self.add_callback(PressCtrlC(step, times))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(SSLTrainer, "train", pressed)

    return install


def test_one_ctrl_c_saves_and_names_the_command(image_folder: Path, tmp_path: Path, press: Any):
    handler = signal.getsignal(signal.SIGINT)
    press(step=1, times=1)
    options = {**TINY, "max_steps": 4, "save_steps": 4}
    with pytest.raises(Interrupted, match=r"stopped at step 2 of 4 .*hf-ssl train --resume '.*/a run'"):
        train("mae", output_dir=str(tmp_path / "a run"), dataset=str(image_folder), **options)
    assert signal.getsignal(signal.SIGINT) is handler
    assert {path.name for path in (tmp_path / "a run").iterdir()} == {"checkpoint-2", "recipe.yaml"}


def test_ctrl_c_in_the_last_step_changes_nothing(image_folder: Path, tmp_path: Path, press: Any):
    press(step=1, times=1)
    run = train("mae", output_dir=str(tmp_path / "run"), dataset=str(image_folder), **TINY)
    assert (run.folder / "encoder").is_dir()


def test_two_stop_at_once_and_leave_nothing_half_done(image_folder: Path, tmp_path: Path, press: Any):
    press(step=1, times=2)
    with pytest.raises(KeyboardInterrupt):
        train("mae", output_dir=str(tmp_path / "run"), dataset=str(image_folder), **TINY)
    assert not (tmp_path / "run").exists()
