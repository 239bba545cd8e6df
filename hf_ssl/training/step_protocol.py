"""Where in Trainer's loop the parts of a step run; `trainer.py` says in which order."""

from typing import Any, Protocol

from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class HasSteps(Protocol):
    """What the callback needs of `SSLTrainer`."""

    def models(self) -> tuple[nn.Module, nn.Module]: ...

    def start_step(self, step: int) -> None: ...

    def hold_parameters(self) -> None: ...

    def finish_step(self, step: int) -> None: ...

    def epoch_at(self, step: int) -> float: ...


class StepProtocol(TrainerCallback):
    """Calls the model's step protocol at its places in Trainer's loop."""

    def __init__(self, trainer: HasSteps) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        keep_protocol(*self.trainer.models())
        state.compute_steps(args, state.max_steps)  # a resumed state has those of the earlier call

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.start_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.hold_parameters()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.finish_step(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.epoch = self.trainer.epoch_at(state.global_step)


def keep_protocol(model: nn.Module, wrapped: nn.Module) -> None:
    """Make wrappers for several processes do as the step protocol takes for granted.

    Args:
        model: the method; `prepare_step` may run its branches, for which FSDP2 must gather their parameters.
        wrapped: what forwards go through. DDP would overwrite all buffers by the first process's before every
            forward: a queue's 33 MB a step for nothing, as processes begin equal and stay so.
    """
    for module in wrapped.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module.broadcast_buffers = False
    register_fsdp_forward_method(model, "prepare_step")  # nothing for models that are not sharded
