"""What a person reads while a run goes on: a bar on a terminal, one line for every logged step."""

import logging
import sys
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

SHORT_NAMES = {"learning_rate": "lr", "grad_norm": "grad"}
HIDDEN = {"epoch", "total_flos", "step", "train_loss", "train_steps_per_second"}


class ReadableLog(TrainerCallback):
    """A progress bar on a terminal; log entries as lines for people everywhere."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar where somebody looks."""
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", leave=False, dynamic_ncols=True
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line, above the bar."""
        if not state.is_world_process_zero or not logs:
            return
        if self._bar is not None:
            self._bar.clear()
        logger.info(format_entry(logs, state.global_step, state.max_steps))
        if self._bar is not None:
            self._bar.refresh()


FLOORS = ("pixels_", "random_init_", "start_")


def format_entry(logs: dict[str, Any], step: int, max_steps: int) -> str:
    """One log entry as a line; scores in per cent, each beside its floors.

    Args:
        logs: an entry of Trainer's log.
        step: optimizer steps done.
        max_steps: optimizer steps of the run.
    """
    place = f"step {step}/{max_steps}"
    if any(name.startswith("eval_") for name in logs):
        return f"{place}  {format_scores({name.removeprefix('eval_'): v for name, v in logs.items()})}"
    if "train_runtime" in logs:
        return (
            f"{place}  {_duration(logs['train_runtime'])}, "
            f"{logs['train_samples_per_second']:.0f} images/s, mean loss {logs['train_loss']:.3f}"
        )
    shown = {name: value for name, value in logs.items() if name not in HIDDEN}
    parts = [f"{SHORT_NAMES.get(name, name)} {_number(value)}" for name, value in shown.items()]
    if "epoch" in logs:
        parts.append(f"epoch {logs['epoch']:.2f}")
    return "  ".join([place, *parts])


def format_scores(scores: dict[str, float]) -> str:
    """`knn 61.2 % (pixels 40.1, random init 43.0)`, for every score beside its floors."""
    floors = {name: value for name, value in scores.items() if name.startswith(FLOORS)}
    parts = []
    for name, value in scores.items():
        if name in floors or name in HIDDEN or not isinstance(value, (int, float)):
            continue
        beside = ", ".join(
            f"{floor.removesuffix(f'_{name}').replace('_', ' ')} {100 * floor_value:.1f}"
            for floor, floor_value in floors.items()
            if floor.endswith(f"_{name}")
        )
        parts.append(f"{name} {100 * value:.1f} %" + (f" ({beside})" if beside else ""))
    return "  ".join(parts)


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if value and abs(value) < 1e-2 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
