"""Lines of the log: short, in per cent, scores beside their floors."""

import io
import sys

import pytest
from transformers import TrainerState

from hf_ssl.training.progress import ReadableLog, format_entry, format_scores


def test_a_step():
    logs = {"loss": 5.1234, "grad_norm": 1.5, "learning_rate": 1.2e-3, "accuracy": 0.25, "epoch": 1.234}
    assert format_entry(logs, 20, 300) == (
        "step 20/300  loss 5.123  grad 1.5  lr 1.2e-03  accuracy 0.25  epoch 1.23"
    )


def test_scores_stand_beside_their_floors():
    logs = {
        "eval_knn": 0.612,
        "eval_linear": 0.7,
        "eval_pixels_knn": 0.401,
        "eval_random_init_knn": 0.43,
        "eval_pixels_linear": 0.5,
        "epoch": 3.0,
    }
    assert format_entry(logs, 100, 300) == (
        "step 100/300  knn 61.2 % (pixels 40.1, random init 43.0)  linear 70.0 % (pixels 50.0)"
    )
    assert format_scores({"knn": 0.5}) == "knn 50.0 %"


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (65, "1 min 5 s"), (7322, "2 h 2 min")])
def test_the_end(seconds: float, text: str):
    logs = {"train_runtime": seconds, "train_samples_per_second": 1234.5, "train_loss": 0.5}
    assert format_entry(logs, 9, 9) == f"step 9/9  {text}, 1234 images/s, mean loss 0.500"


def test_a_terminal_gets_a_bar_and_a_file_does_not(monkeypatch: pytest.MonkeyPatch):
    for is_terminal in (True, False):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda answer=is_terminal: answer)
        monkeypatch.setattr(sys, "stderr", screen)
        log, state = ReadableLog(), TrainerState(max_steps=10, global_step=4, is_world_process_zero=True)
        log.on_train_begin(None, state, None)  # type: ignore[arg-type]
        state.global_step = 7
        log.on_step_end(None, state, None)  # type: ignore[arg-type]
        log.on_log(None, state, None, {"loss": 1.0})  # type: ignore[arg-type]
        log.on_train_end(None, state, None)  # type: ignore[arg-type]
        assert ("7/10" in screen.getvalue()) is is_terminal
