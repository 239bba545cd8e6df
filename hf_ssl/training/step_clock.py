"""Where the time of a run goes, and what to change when the images come too slowly."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ssl.data.views import can_compile

logger = logging.getLogger(__name__)

PROFILE_FILE = "profile.json"
# In the order of a step; "other" is what lies between them.
SPANS = ("loading", "views", "forward", "backward", "optimizer", "teacher", "evaluation", "saving")
TOO_LONG = 0.2  # share of the time that waiting for images may take before a line says what to change


class StepClock:
    """Seconds of the parts of a run in this process; a span inside another one is not counted twice.

    Reading a clock costs nothing to speak of. On a GPU, whose work goes on after a call returns, a span holds
    what the host waited for, unless `synchronize` is set. Under gradient caching both forwards count as
    backward.

    Attributes:
        seconds: by span; filled while the clock runs.
        synchronize: wait for the device at the borders of every span.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(SPANS, 0.0)
        self.synchronize = False
        self._inner: list[float] = []
        self._started: float | None = None
        self._total = 0.0

    def start(self) -> None:
        """Begin, with all spans at 0."""
        self.seconds = dict.fromkeys(SPANS, 0.0)
        self._started = self._now()

    def stop(self) -> None:
        """End."""
        if self._started is not None:
            self._total = self._now() - self._started
            self._started = None

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`, but for spans within it."""
        if self._started is None:
            yield
            return
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - start
            self.seconds[name] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds of one span as another one."""
        if self._started is not None:
            self.seconds[source] -= seconds
            self.seconds[target] += seconds

    def shares(self) -> dict[str, float]:
        """Parts of the time between start and stop, which sum to 1."""
        total = max(self._total, 1e-9)
        shares = {name: seconds / total for name, seconds in self.seconds.items()}
        return shares | {"other": max(1 - sum(shares.values()), 0.0)}

    def _now(self) -> float:
        if self.synchronize and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()


class Profile(TrainerCallback):
    """Runs the clock of a trainer and says at the end where the time went.

    Args:
        clock: the trainer's.
    """

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        self.clock.synchronize = bool(args.profile)  # type: ignore[attr-defined]
        self.clock.start()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One line, and the file that was asked for."""
        self.clock.stop()
        if not state.is_world_process_zero:
            return
        shares = self.clock.shares()
        advice = loading_advice(shares, args.dataloader_num_workers, cores_of_this_process(), can_compile())
        logger.info("time      " + describe_shares(shares))
        if advice:
            logger.warning(advice)
        if args.profile:  # type: ignore[attr-defined]
            report = {"seconds": self.clock.seconds, "shares": shares, "advice": advice}
            file = Path(str(args.output_dir)) / PROFILE_FILE
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def cores_of_this_process() -> int:
    """Cores that this process may use, shared with the others of a run on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def describe_shares(shares: dict[str, float]) -> str:
    """`forward 30 %, backward 41 %, ...`: spans of at least half a per cent."""
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items() if share >= 0.005)


def loading_advice(shares: dict[str, float], num_workers: int, num_cores: int, compiled: bool) -> str | None:
    """One line on what to change if a run waits for its images; None if it does not.

    Args:
        shares: of the time, by span; "views" counts only what this process did itself.
        num_workers: loader workers of this process.
        num_cores: that this process may use.
        compiled: whether compiled loops make the views.
    """
    waiting = shares["loading"] + shares["views"]
    if waiting < TOO_LONG:
        return None
    changes = []
    if not compiled:
        changes.append("pip install hf-ssl[fast], which makes views several times as fast")
    if num_workers < num_cores - 1:
        changes.append(f"--dataloader_num_workers {num_cores - 1} ({num_cores} cores are there for it)")
    if not changes:
        changes.append("images stored at about the size of the views, as decoding is most of the rest")
    return f"{100 * waiting:.0f} % of the time went into waiting for images; try " + ", or ".join(changes)
