"""Schedules against values of the official scripts; what changes per step and what per epoch."""

import pytest
import torch

from hf_ssl.training.schedules import (
    LEARNING_RATE_SCHEDULES,
    ScheduleSpan,
    cosine,
    cosine_per_epoch,
    cosine_weight_decay,
    learning_rate_schedule,
    multistep_per_epoch,
    scaled_learning_rate,
)
from tests.closeness import near


def rates(schedule, steps, span: ScheduleSpan, rate: float) -> torch.Tensor:
    return torch.tensor([rate * schedule(step, span) for step in steps], dtype=torch.float64)


def near_exactly(actual: torch.Tensor, expected: torch.Tensor) -> None:
    near(actual, expected, 1e-12)


def test_step_cosine_matches_the_tensorflow_script(golden):
    case = golden("schedules")
    total, warmup = case["simclr.total_and_warmup"].tolist()
    batch = int(case["simclr.n_batch_epochs_warmupepochs"][1])
    span, steps = ScheduleSpan(total, warmup), case["simclr.steps"].tolist()
    near_exactly(rates(cosine, steps, span, scaled_learning_rate(0.3, batch)), case["simclr.lr_linear"])
    root = scaled_learning_rate(0.075, batch, reference_batch=1, power=0.5)
    near_exactly(rates(cosine, steps, span, root), case["simclr.lr_sqrt"])


def test_step_cosine_matches_the_script_with_float_epochs(golden):
    case = golden("schedules")
    per_epoch, rate, epochs, warmup, _ = case["mocov3.const"].tolist()
    span = ScheduleSpan(int(epochs * per_epoch), int(warmup * per_epoch))
    near_exactly(rates(cosine, case["mocov3.iters"].tolist(), span, rate), case["mocov3.lr"])


def test_step_cosine_matches_the_jax_script(golden):
    case = golden("schedules")
    span = ScheduleSpan(*case["byol.total_and_warmup"].tolist())
    near_exactly(rates(cosine, case["byol.steps"].tolist(), span, 4.8), case["byol.lr"])


@pytest.mark.parametrize(
    ("name", "rate"), [("barlow.lr_weights", 1.6), ("barlow.lr_biases", 0.0384), ("vicreg.lr", 1.6)]
)
def test_cosine_with_an_end_above_zero_matches_the_scripts(golden, name, rate):
    case = golden("schedules")
    length, epochs, _ = case["barlow.loaderlen_epochs_batch"].tolist()
    span = ScheduleSpan(length * epochs, 10 * length, final_factor=0.001)
    near_exactly(rates(cosine, case["barlow.steps"].tolist(), span, rate), case[name])


def test_masked_modelling_script_matches(golden):
    case = golden("mae")
    per_epoch = 10_000  # fine enough for the stored epochs, which are fractions of 1 / 10000
    span = ScheduleSpan(800 * per_epoch, 40 * per_epoch)
    steps = [round(epoch * per_epoch) for epoch in case["lr.epoch"].tolist()]
    near_exactly(rates(cosine, steps, span, 2.4e-3), case["lr.value"])


@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_per_epoch_schedules_match_the_scripts_at_every_step_of_an_epoch(golden, steps_per_epoch):
    case = golden("schedules")
    span = ScheduleSpan(200 * steps_per_epoch, steps_per_epoch=steps_per_epoch, milestones=(120, 160))
    for offset in (0, steps_per_epoch - 1):
        steps = [epoch * steps_per_epoch + offset for epoch in case["moco.epochs"].tolist()]
        near_exactly(rates(cosine_per_epoch, steps, span, 0.03), case["moco.lr_cos"])
        near_exactly(rates(multistep_per_epoch, steps, span, 0.03), case["moco.lr_step"])


def test_another_per_epoch_cosine_matches_its_script(golden):
    case = golden("schedules")
    span = ScheduleSpan(100 * 5, steps_per_epoch=5)
    steps = [epoch * 5 for epoch in case["simsiam.epochs"].tolist()]
    rate = scaled_learning_rate(0.05, 512)
    near_exactly(rates(cosine_per_epoch, steps, span, rate), case["simsiam.lr"])
    near_exactly(rates(LEARNING_RATE_SCHEDULES["constant"], steps, span, rate), case["simsiam.lr_predictor"])


def test_first_step_of_a_warm_up_has_rate_zero_and_its_end_the_full_rate():
    span = ScheduleSpan(100, 10)
    for name in ("cosine", "constant"):
        schedule = learning_rate_schedule(name)
        assert [schedule(step, span) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]


def test_a_per_step_cosine_moves_within_an_epoch():
    span = ScheduleSpan(100, steps_per_epoch=10)
    assert cosine(15, span) < cosine(14, span) and cosine_per_epoch(15, span) == cosine_per_epoch(14, span)


def test_steps_beyond_the_end_stay_at_the_final_factor():
    span = ScheduleSpan(100, 10, final_factor=0.01)
    assert cosine(100, span) == pytest.approx(0.01) and cosine(150, span) == pytest.approx(0.01)


def test_an_unfinished_last_epoch_counts_as_an_epoch():
    assert cosine_per_epoch(20, ScheduleSpan(25, steps_per_epoch=10)) == pytest.approx(0.25)


@pytest.mark.parametrize("schedule", [cosine_per_epoch, multistep_per_epoch])
def test_per_epoch_schedules_refuse_a_warm_up(schedule):
    with pytest.raises(ValueError, match="has no warm-up, got warmup_steps 3"):
        schedule(0, ScheduleSpan(10, 3))


def test_rate_scales_with_the_global_number_of_images():
    assert scaled_learning_rate(0.3, 4096) == pytest.approx(4.8)
    assert scaled_learning_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert scaled_learning_rate(0.03, 128) == pytest.approx(0.015)


def test_weight_decay_runs_on_half_a_cosine_between_its_ends():
    values = [cosine_weight_decay(step, 100, 0.04, 0.4) for step in (0, 50, 100, 120)]
    assert values == pytest.approx([0.04, 0.22, 0.4, 0.4])


def test_unknown_schedule_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown learning-rate schedule 'cosin'; did you mean 'cosine'"):
        learning_rate_schedule("cosin")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "must be at least 1"),
        ({"total_steps": 10, "warmup_steps": 10}, "warmup_steps 10 must be less than total_steps 10"),
        ({"total_steps": 10, "milestones": (8, 5)}, "milestones must rise"),
    ],
)
def test_impossible_spans_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScheduleSpan(**settings)
