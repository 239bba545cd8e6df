"""The momentum teacher against the authors' updates, and the ways in which it silently does not follow."""

import copy

import pytest
import torch
from torch import nn

from hf_ssl.modeling.shared.teacher import cosine_momentum, linear_momentum, update_teacher
from tests.closeness import near, precision


def holder(values: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(values.clone())
    return module


@precision
def test_scheduled_updates_match_the_authors_code(golden, dtype, tolerance):
    case = golden("mocov3")
    teacher = holder(case["ema_init"].to(dtype))
    for update, (epoch, momentum) in enumerate(case["ema_epoch_and_m"].tolist()):
        assert cosine_momentum(epoch, 300, 0.99) == pytest.approx(momentum, abs=1e-12)
        update_teacher(teacher, holder(case[f"ema_online{update}"].to(dtype)), momentum)
        near(teacher.weight.detach(), case[f"ema_target{update}"], tolerance)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_key_encoder_with_its_head_follows_the_authors_over_three_steps(golden, version):
    case = golden("moco")

    def encoder(prefix: str) -> nn.Module:
        layers = {"lin": nn.Linear(5, 7, bias=False), "bn": nn.BatchNorm1d(7)}
        linear = nn.Linear(7, 6)
        layers["fc"] = linear if version == "v1" else nn.Sequential(nn.Linear(7, 7), nn.ReLU(), linear)
        module = nn.ModuleDict(layers).double()
        module.load_state_dict({k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)})
        return module

    teacher, student = encoder(f"{version}_init."), encoder(f"{version}_init.")
    for step in range(3):
        update_teacher(teacher, student, case["momentum"].item())  # with the student of the step before
        for name, parameter in teacher.named_parameters():
            near(parameter.detach(), case[f"{version}_step{step}.encoder_k.{name}"])
        student = encoder(f"{version}_step{step}.encoder_q.")


@pytest.mark.parametrize("schedule", ["mocov3", "byol"])
def test_cosine_momentum_matches_the_authors_schedules(golden, schedule):
    case = golden("schedules")
    if schedule == "mocov3":
        iterations_per_epoch, _, epochs, _, base = case["mocov3.const"].tolist()
        steps, total, expected = case["mocov3.iters"], iterations_per_epoch * epochs, case["mocov3.m"]
    else:
        steps, total, expected, base = (
            case["byol.steps"],
            case["byol.total_and_warmup"][0],
            case["byol.tau"],
            0.99,
        )
    near(
        torch.tensor([cosine_momentum(s, int(total), base) for s in steps.tolist()], dtype=torch.float64),
        expected,
    )


def test_momentum_is_the_share_of_the_old_teacher():
    teacher = holder(torch.zeros(2))
    update_teacher(teacher, holder(torch.ones(2)), 0.9)
    near(teacher.weight.detach(), torch.full((2,), 0.1), 1e-6)


def test_buffers_stay_the_teachers_own():
    teacher, student = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    student(torch.randn(8, 2) + 5)
    update_teacher(teacher, student, 0.0)
    assert teacher.running_mean.eq(0).all() and teacher.num_batches_tracked == 0


def test_parameters_of_the_student_alone_are_ignored():
    student = nn.ModuleDict({"backbone": nn.Linear(2, 2), "predictor": nn.Linear(2, 2)})
    teacher = nn.ModuleDict({"backbone": nn.Linear(2, 2)})
    update_teacher(teacher, student, 0.0)
    assert torch.equal(teacher["backbone"].weight, student["backbone"].weight)


def test_a_teacher_parameter_without_counterpart_is_refused_by_name():
    student, teacher = nn.ModuleDict({"a": nn.Linear(1, 1)}), nn.ModuleDict({"head": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="teacher parameter head.weight has no counterpart"):
        update_teacher(teacher, student, 0.9)


def test_a_half_precision_teacher_is_refused_because_it_would_stand_still():
    student = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="keep the teacher in float32"):
        update_teacher(copy.deepcopy(student).bfloat16(), student, 0.999)


def test_a_half_precision_student_is_followed_in_float32():
    teacher = holder(torch.ones(1))
    update_teacher(teacher, holder(torch.zeros(1, dtype=torch.bfloat16)), 0.9999)
    near(teacher.weight.detach(), torch.tensor([0.9999]), 1e-6)


def test_the_student_is_not_changed_and_no_graph_is_built():
    teacher, student = holder(torch.zeros(1)), holder(torch.ones(1))
    update_teacher(teacher, student, 0.5)
    assert student.weight.item() == 1 and teacher.weight.grad_fn is None


def test_momentum_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1.2"):
        update_teacher(nn.Linear(1, 1), nn.Linear(1, 1), 1.2)


def test_linear_momentum_reaches_its_end_in_equal_steps():
    assert [linear_momentum(step, 4, 0.996) for step in range(5)] == pytest.approx(
        [0.996, 0.997, 0.998, 0.999, 1]
    )


@pytest.mark.parametrize("schedule", [cosine_momentum, linear_momentum])
def test_momentum_does_not_overshoot_its_end_after_a_resume(schedule):
    assert schedule(150, 100, 0.99) == 1.0
