"""Schedules as pure functions of the 0-based optimizer step.

A learning-rate schedule gives the factor on the rate; warm-up is step / warm-up steps, so the first step has
rate 0, as in the published code. The schedules of the teacher's momentum are in `modeling.shared.teacher`.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from hf_ssl.modeling.shared.names import unknown_name_message


@dataclass(frozen=True)
class ScheduleSpan:
    """What schedules know of a run.

    Args:
        total_steps: optimizer steps of the whole run, >= 1.
        warmup_steps: steps of linear warm-up from 0, less than `total_steps`.
        steps_per_epoch: optimizer steps of an epoch; what changes per epoch reads it.
        final_factor: factor that a cosine ends at.
        milestones: epochs at which a multi-step schedule falls.
        milestone_factor: factor by which it falls at each.

    Raises:
        ValueError: a number out of its range.
    """

    total_steps: int
    warmup_steps: int = 0
    steps_per_epoch: int = 1
    final_factor: float = 0.0
    milestones: tuple[int, ...] = ()
    milestone_factor: float = 0.1

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.steps_per_epoch < 1:
            raise ValueError(
                "total_steps and steps_per_epoch must be at least 1, "
                f"got {self.total_steps} and {self.steps_per_epoch}"
            )
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be less than total_steps {self.total_steps}; "
                "shorten the warm-up or train longer"
            )
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones must rise, got {list(self.milestones)}")


def cosine(step: int, span: ScheduleSpan) -> float:
    """Linear warm-up from 0, then half a cosine to `final_factor`, every step."""
    if step < span.warmup_steps:
        return step / span.warmup_steps
    progress = (step - span.warmup_steps) / (span.total_steps - span.warmup_steps)
    return _half_cosine(progress, 1.0, span.final_factor)


def cosine_per_epoch(step: int, span: ScheduleSpan) -> float:
    """Half a cosine to `final_factor` that changes between epochs only; the last epoch is still above it."""
    _refuse_warmup("cosine_per_epoch", span)
    num_epochs = math.ceil(span.total_steps / span.steps_per_epoch)
    return _half_cosine((step // span.steps_per_epoch) / num_epochs, 1.0, span.final_factor)


def multistep_per_epoch(step: int, span: ScheduleSpan) -> float:
    """Falls by `milestone_factor` at the start of every epoch in `milestones`."""
    _refuse_warmup("multistep_per_epoch", span)
    num_passed = bisect_right(span.milestones, step // span.steps_per_epoch)
    return math.pow(span.milestone_factor, num_passed)


def constant(step: int, span: ScheduleSpan) -> float:
    """Linear warm-up from 0, then 1."""
    return step / span.warmup_steps if step < span.warmup_steps else 1.0


LEARNING_RATE_SCHEDULES: dict[str, Callable[[int, ScheduleSpan], float]] = {
    "cosine": cosine,
    "cosine_per_epoch": cosine_per_epoch,
    "multistep_per_epoch": multistep_per_epoch,
    "constant": constant,
}


def learning_rate_schedule(name: str) -> Callable[[int, ScheduleSpan], float]:
    """Schedule of that name: a function (step, span) -> factor on the learning rate.

    Raises:
        ValueError: unknown `name`; the text holds the nearest known one.
    """
    if name not in LEARNING_RATE_SCHEDULES:
        raise ValueError(unknown_name_message("learning-rate schedule", name, LEARNING_RATE_SCHEDULES))
    return LEARNING_RATE_SCHEDULES[name]


def scaled_learning_rate(
    base_learning_rate: float, global_batch_size: int, reference_batch: int = 256, power: float = 1.0
) -> float:
    """Rate for a batch: base x (images per optimizer step / reference)^power; views are not counted."""
    return base_learning_rate * math.pow(global_batch_size / reference_batch, power)


def cosine_weight_decay(step: int, total_steps: int, initial: float, final: float) -> float:
    """Weight decay on half a cosine from `initial` (step 0) to `final` (step `total_steps`), no warm-up."""
    return _half_cosine(step / total_steps, initial, final)


def _half_cosine(progress: float, start: float, end: float) -> float:
    # Clamped: a resumed run with fewer total steps must not climb up the other half.
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _refuse_warmup(name: str, span: ScheduleSpan) -> None:
    if span.warmup_steps:
        raise ValueError(f"schedule {name} has no warm-up, got warmup_steps {span.warmup_steps}; use cosine")
