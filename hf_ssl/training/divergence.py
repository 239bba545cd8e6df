"""A run whose numbers are no numbers stops, before anything broken is written over something good."""

from pathlib import Path

import torch
from torch import Tensor, nn

from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.checkpoints import checkpoints


class TrainingDiverged(RuntimeError):  # noqa: N818  (says what happened)
    """The loss or a weight is no longer a number."""


class DivergenceGuard:
    """Keeps losses until it costs nothing to look at them.

    Args:
        args: of the run, for the advice.
    """

    def __init__(self, args: SSLTrainingArguments) -> None:
        self.args = args
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Remember the loss of a micro-batch."""
        self._losses.append(loss.detach())

    def check_losses(self, steps_done: int) -> None:
        """Look at all losses since the last look.

        Raises:
            TrainingDiverged: one is NaN or infinite.
        """
        losses, self._losses = self._losses, []
        if losses and not (values := torch.stack(losses)).isfinite().all():
            first = values[~values.isfinite()][0].item()
            raise self._diverged(f"the loss is {first} at step {steps_done}")

    @torch.no_grad()
    def check_weights(self, model: nn.Module, steps_done: int) -> None:
        """Look at all parameters.

        Raises:
            TrainingDiverged: one holds NaN or infinity.
        """
        named = [(name, value) for name, value in model.named_parameters() if value.is_floating_point()]
        # Summed in float64, which cannot overflow, and read at once: a single wait for the device.
        sums = torch.stack([value.sum(dtype=torch.float64) for _, value in named])
        broken = (~sums.isfinite()).nonzero()
        if len(broken):
            raise self._diverged(f"'{named[int(broken[0])][0]}' is not finite after step {steps_done}")

    def _diverged(self, problem: str) -> TrainingDiverged:
        left = checkpoints(Path(str(self.args.output_dir)))
        return TrainingDiverged(
            f"{problem}; lower learning_rate (now {self.args.learning_rate:g}) or raise warmup_steps"
            + (f"; the last good checkpoint is {left[-1]}" if left else "")
        )
