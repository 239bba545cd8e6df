"""The momentum (EMA) teacher: how it follows the student; schedules of its momentum and temperature."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum x teacher + (1 - momentum) x student, for parameters; buffers are not touched.

    Args:
        teacher: module in float32 or float64.
        student: module with (at least) all parameters of the teacher, by name.
        momentum: share of the old teacher, in [0, 1].

    Raises:
        ValueError: `momentum` outside [0, 1], a teacher parameter that the student lacks, or a teacher in
            half precision.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"teacher momentum must lie in [0, 1], got {momentum}")
    student_parameters = dict(student.named_parameters())
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name, parameter in teacher.named_parameters():
        if name not in student_parameters:
            raise ValueError(f"teacher parameter {name} has no counterpart in the student")
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"teacher parameter {name} is {parameter.dtype}, in which small updates vanish; "
                "keep the teacher in float32"
            )
        targets.append(parameter)
        sources.append(student_parameters[name].to(parameter.dtype))
    if targets:
        torch._foreach_lerp_(targets, sources, 1 - momentum)


@torch.no_grad()
def relative_distance(teacher: nn.Module, student: nn.Module) -> float:
    """|teacher - student| / |teacher| over all parameters of the teacher; 0 where they are the same."""
    student_parameters = dict(student.named_parameters())
    norms = [  # tensor by tensor, so that no copy of all weights exists
        torch.stack([(value - student_parameters[name]).float().norm(), value.float().norm()])
        for name, value in teacher.named_parameters()
    ]
    gap, length = torch.stack(norms).norm(dim=0).tolist()
    return gap / length if length else 0.0


def cosine_momentum(step: int, total_steps: int, base: float, final: float = 1.0) -> float:
    """Momentum of a 0-based step on half a cosine from `base` (step 0) to `final` (step `total_steps`)."""
    return final - (final - base) * 0.5 * (1 + math.cos(math.pi * _progress(step, total_steps)))


def linear_momentum(step: int, total_steps: int, base: float, final: float = 1.0) -> float:
    """Momentum of a 0-based step on a line from `base` (step 0) to `final` (step `total_steps`)."""
    return base + (final - base) * _progress(step, total_steps)


def num_steps(duration: float, total_steps: int) -> int:
    """Optimizer steps of a duration: a share of the run below 1, otherwise a number of steps."""
    return round(duration * total_steps) if duration < 1 else int(duration)


def linear_warmup(step: int, warmup_steps: int, start: float, end: float) -> float:
    """From `start` (step 0) on a line to `end` (the last step of the warm-up), then `end`."""
    if step >= warmup_steps:
        return end
    return start + (end - start) * step / max(warmup_steps - 1, 1)


def _progress(step: int, total_steps: int) -> float:
    # Clamped: a resumed run with fewer total steps must not push the momentum beyond its end value.
    return min(step / total_steps, 1.0)
