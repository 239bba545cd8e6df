"""Where the time of a run goes."""

import json
import logging
import re
import time
from pathlib import Path

import pytest

from hf_ssl.training.step_clock import PROFILE_FILE, SPANS, StepClock, describe_shares, loading_advice


def test_a_span_inside_another_is_counted_once():
    clock = StepClock()
    clock.start()
    with clock.span("backward"):
        time.sleep(0.02)
        with clock.span("forward"):
            time.sleep(0.04)
    clock.stop()
    assert 0.015 < clock.seconds["backward"] < 0.035 and 0.035 < clock.seconds["forward"] < 0.06
    assert sum(clock.shares().values()) == pytest.approx(1)


def test_a_span_that_fails_is_counted_and_closed():
    clock = StepClock()
    clock.start()
    with pytest.raises(ValueError, match="broken"), clock.span("loading"):
        raise ValueError("broken")
    with clock.span("forward"):
        time.sleep(0.01)
    clock.stop()
    assert clock.seconds["forward"] >= 0.01


def test_nothing_is_counted_before_the_start():
    clock = StepClock()
    with clock.span("evaluation"):
        time.sleep(0.01)
    clock.move(1.0, "loading", "views")
    assert not any(clock.seconds.values())


def profile_of(trainer) -> Path:
    return Path(trainer.args.output_dir) / PROFILE_FILE


def shares(loading: float, views: float = 0.0) -> dict[str, float]:
    return dict.fromkeys(SPANS, 0.0) | {"loading": loading, "views": views}


@pytest.mark.parametrize(
    ("loading", "views", "num_workers", "num_cores", "compiled", "expected"),
    [
        (0.1, 0.09, 0, 8, False, None),
        (0.0, 0.3, 0, 8, True, "30 % .*try --dataloader_num_workers 7 "),
        (0.5, 0.0, 7, 8, False, r"50 % .*try pip install hf-ssl\[fast\]"),
        (0.2, 0.2, 0, 2, False, r"40 % .*hf-ssl\[fast\].*, or --dataloader_num_workers 1 "),
        (0.5, 0.0, 7, 8, True, "50 % .*images stored at about the size of the views"),
    ],
)
def test_advice_names_what_can_be_changed(loading, views, num_workers, num_cores, compiled, expected):
    advice = loading_advice(shares(loading, views), num_workers, num_cores, compiled)
    if expected is None:
        assert advice is None
    else:
        assert advice is not None
        assert re.search(expected, advice)


def test_small_shares_are_left_out():
    assert describe_shares({"forward": 0.304, "saving": 0.001, "other": 0.695}) == "forward 30 %, other 70 %"


def test_a_run_says_where_its_time_went(make_trainer, caplog):
    trainer = make_trainer(profile=True)
    with caplog.at_level(logging.INFO, logger="hf_ssl"):
        trainer.train()
    report = json.loads(profile_of(trainer).read_text())
    assert sum(report["shares"].values()) == pytest.approx(1)
    assert all(
        report["seconds"][name] > 0 for name in ("views", "forward", "backward", "optimizer", "teacher")
    )
    assert any(message.startswith("time      ") for message in caplog.messages)


def test_a_run_that_waits_for_its_images_says_so(make_trainer, caplog, monkeypatch):
    trainer = make_trainer(max_steps=3)
    make = type(trainer.view_maker).make_batch
    monkeypatch.setattr(
        type(trainer.view_maker), "make_batch", lambda *args: (time.sleep(0.5), make(*args))[1]
    )
    with caplog.at_level(logging.INFO, logger="hf_ssl"):
        trainer.train()
    (advice,) = [message for message in caplog.messages if "waiting for images" in message]
    assert not profile_of(trainer).exists()
    assert int(advice.split(" %")[0]) > 50
