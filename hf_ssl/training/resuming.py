"""A Trainer whose checkpoints are whole or not there, and that continues exactly where one was written.

transformers' Trainer writes a checkpoint file by file under its final name, rotates by time stamps, forgets
the log entry in progress, and lets the rates of a checkpoint win over those of the run. What it writes and
loads stays its own; this adds the order of things around it.
"""

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from hf_ssl.modeling.shared.distributed import wait_for_all
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.checkpoints import (
    STATE_FILE,
    CheckpointError,
    StepLayout,
    check_layout,
    check_tensors,
    last_checkpoint,
    layout_of,
    remove_leftovers,
    rotate,
    step_of,
    whole_checkpoint,
    why_torn,
    write_contents,
)
from hf_ssl.training.processes import on_first_process
from hf_ssl.training.run_lock import run_lock

logger = logging.getLogger(__name__)


class ResumingTrainer(Trainer):
    """Trainer with whole checkpoints and exact resume; the positioned data are its subclass's part."""

    args: SSLTrainingArguments
    _resume_step = 0  # optimizer steps that the checkpoint had done
    _parts: dict[str, list[Tensor]]  # of the loss, since the last log entry
    _staging: str | None = None  # stands for the run folder while a checkpoint is written

    # Starting

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or continue from a checkpoint exactly where it stopped.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last whole one in `output_dir`.
            *args: as in transformers.
            **kwargs: as in transformers.

        Raises:
            CheckpointError: there is no checkpoint to resume from, it lacks something or does not suit this
                run, or another run writes into `output_dir`.
            TrainingDiverged: the loss is no longer a number.
        """
        run = Path(str(self.args.output_dir))
        with run_lock(run) if self.args.should_save else contextlib.nullcontext():
            if self.args.should_save:
                remove_leftovers(run)
            self._resume_step = 0
            if not resume_from_checkpoint:
                return super().train(None, *args, **kwargs)
            folder = self.choose_checkpoint(resume_from_checkpoint)
            self._resume_step = step_of(folder)
            if self._resume_step >= self.args.max_steps:  # Trainer would train one step more
                return self._load_finished(folder)
            self._say_whether_exact(folder)
            return super().train(str(folder), *args, **kwargs)

    def choose_checkpoint(self, wanted: str | bool) -> Path:
        """The checkpoint to continue from, the same in all processes.

        Args:
            wanted: a checkpoint folder, or True for the last whole one in `output_dir`.

        Raises:
            CheckpointError: there is none, it is torn, or it does not suit this run.
        """

        def choose() -> str:
            run = Path(str(self.args.output_dir))
            folder = last_checkpoint(run) if wanted is True else Path(str(wanted))
            model: Any = self.model
            check_tensors(folder, model)
            if reason := why_torn(folder):
                raise CheckpointError(
                    f"cannot continue from '{folder}': {reason}; give an earlier checkpoint, or the run to "
                    "continue from its last whole one"
                )
            check_layout(folder, StepLayout.of(self.args))
            return str(folder)

        return Path(on_first_process(self.args, choose))

    def _say_whether_exact(self, folder: Path) -> None:
        written, layout = layout_of(folder), StepLayout.of(self.args)
        if written != layout and self.is_world_process_zero():
            logger.warning(
                "continuing %s, written with %s, with %s: from image %d on as before, but no longer bit for "
                "bit; in this epoch some images come twice and others not",
                folder.name,
                written,
                layout,
                self._resume_step * layout.global_batch,
            )

    def _load_finished(self, folder: Path) -> TrainOutput:
        self._load_from_checkpoint(str(folder))
        for file in (Path(str(self.args.output_dir)) / STATE_FILE, folder / STATE_FILE):
            with contextlib.suppress(OSError, ValueError, TypeError):  # a run killed at its very end
                self.state = TrainerState.load_from_json(str(file))
                if self.state.global_step == self._resume_step:
                    break
        self.state.is_world_process_zero = self.is_world_process_zero()
        return TrainOutput(self.state.global_step, math.nan, {})

    # Writing

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint or nothing: Trainer writes it elsewhere, then it is completed and renamed.

        Raises:
            CheckpointError: it could not be written; what was written of it is removed.
        """
        run = Path(super()._get_output_dir(trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        with whole_checkpoint(folder, renames=self.args.should_save) as partial:
            wait_for_all()  # the folder is there, and empty
            self._staging = str(partial.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._name_best(folder)
            wait_for_all()  # all have written
            if self.args.should_save:
                self.state.save_to_json(str(partial / STATE_FILE))
                write_contents(partial, StepLayout.of(self.args), self.args.save_only_model)
        wait_for_all()  # it has its name
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run, self.args.save_total_limit, folder, Path(best) if best else None)

    def _get_output_dir(self, trial: Any) -> str:
        """The folder that Trainer writes `checkpoint-N` into and rotates in."""
        return self._staging or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before the checkpoint has its name: the upload goes on in the background."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _name_best(self, current: Path) -> None:
        """Name the best checkpoint in the run folder; Trainer looked for it where this one was written."""
        best = current.with_name(f"checkpoint-{self.state.best_global_step}")
        if best == current or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _save_rng_state(self, output_dir: str) -> None:
        """What a process holds beside the model: its random state, and the log entry in progress."""
        super()._save_rng_state(output_dir)
        entry = {"loss": self._tr_loss, "last_step": self._globalstep_last_logged, "parts": self._parts}
        torch.save(entry, self._log_file(output_dir))

    # Loading

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or layout_of(Path(checkpoint)).processes != self.args.world_size:
            return
        entry = torch.load(self._log_file(checkpoint), map_location="cpu", weights_only=True)
        device = self.args.device
        self._tr_loss, self._globalstep_last_logged = entry["loss"].to(device), entry["last_step"]
        self._parts = {name: [value.to(device) for value in part] for name, part in entry["parts"].items()}
        # The mean loss at the end is that of the steps done here.
        mean: Any = self.accelerator.reduce(self._tr_loss.clone(), reduction="mean")
        self._total_loss_scalar = -mean.item()

    def _log_file(self, folder: str) -> Path:
        return Path(folder) / f"log_entry_{self.args.process_index}.pt"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what the optimizer has gathered; rates and decays stay those of this run."""
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        rates = list(scheduler.base_lrs)
        super()._load_optimizer_and_scheduler(checkpoint)
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler.base_lrs = rates
        scheduler._last_lr = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
        for group, own, rate in zip(optimizer.param_groups, options, scheduler._last_lr, strict=True):
            group.update(own | {"lr": rate})
