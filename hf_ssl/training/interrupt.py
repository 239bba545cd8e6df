"""Ctrl-C that loses nothing."""

import logging
import signal
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class Interrupted(RuntimeError):  # noqa: N818  (nothing went wrong)
    """The user stopped the run; a checkpoint was written."""


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C: finish the step, write a checkpoint, stop; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False

    def __enter__(self) -> "StopOnInterrupt":
        try:
            self._previous = signal.signal(signal.SIGINT, self._request)
        except ValueError:  # only the main thread may; elsewhere Ctrl-C stays what it was
            self._previous = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, signum: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        logger.warning("stopping after this step; press Ctrl-C again to stop at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask Trainer for a checkpoint and the end."""
        if args.world_size > 1:
            # The signal reaches processes in different steps; they must stop after the same one.
            requested = torch.tensor(float(self.interrupted), device=args.device)
            torch.distributed.all_reduce(requested, op=torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(requested.item())
        if self.interrupted:
            control.should_save = control.should_training_stop = True
