"""The Trainer that runs every method's step protocol.

The order of one optimizer step stands here and nowhere else:
    get_batch_samples   all micro-batches of the step arrive, rows are numbered
    begin_step          schedules; teachers that move before their forward      (on_step_begin)
    prepare_step        targets that couple the micro-batches                    (on_step_begin)
    forward, backward   once per micro-batch; of a whole batch by gradient caching
    clip, hold          what stands still in this step loses its gradient (on_pre_optimizer_step)
    optimizer
    end_step            teacher, queue, centre                                   (on_optimizer_step)
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_ssl.data.clips import ClipMaker, make_view_maker
from hf_ssl.data.loader import TrainLoader
from hf_ssl.data.sources import ImageSource
from hf_ssl.data.views import ViewMaker
from hf_ssl.evaluation.health import effective_rank
from hf_ssl.modeling.shared.backbone import SSLTimmBackbone
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.modeling.shared.teacher import relative_distance
from hf_ssl.modeling.shared.text_processing import SSLImageTextProcessor, save_tokenizer
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.batch_checks import check_batch
from hf_ssl.training.continuing import build_guard, head_warmup_steps
from hf_ssl.training.divergence import DivergenceGuard, TrainingDiverged
from hf_ssl.training.doctor import Case, LiveDoctor
from hf_ssl.training.gradient_caching import backward_through_cache, cut
from hf_ssl.training.lora import add_lora, load_apart, merged_state, save_apart
from hf_ssl.training.micro_batches import PreparedOnAccess, model_inputs, normalize_bytes
from hf_ssl.training.optimizers import build_optimizer, clip_each_gradient
from hf_ssl.training.processes import on_first_process
from hf_ssl.training.progress import ReadableLog
from hf_ssl.training.publishing import PublishingTrainer
from hf_ssl.training.resuming import ResumingTrainer
from hf_ssl.training.schedules import ScheduleSpan, cosine_weight_decay, learning_rate_schedule
from hf_ssl.training.step_clock import Profile, StepClock
from hf_ssl.training.step_protocol import StepProtocol

__all__ = ["SSLTrainer", "TrainingDiverged"]

logger = logging.getLogger(__name__)

IMAGES_OF_RANK = 256  # a decomposition of more features would take as long as a step


class SSLTrainer(ResumingTrainer, PublishingTrainer):
    """Trainer for self-supervised models.

    Args:
        model: any `<M>ForPreTraining`.
        args: an `SSLTrainingArguments`.
        train_dataset: an `ImageSource` (from `hf_ssl.data.open_images`), or several.
        processing_class: the method's image processor; its `views` are the training augmentations.
        weights: sampling weights of several sources; None weighs by size.
        probe: called with the model at every evaluation, returns named scores (see `hf_ssl.training.probes`);
            `floors`, set by whoever has measured them, are logged beside. None: there are no evaluations.
        text_processor: of methods that learn from texts: makes tokens of the captions that the sources give.
        **kwargs: as in transformers.

    Raises:
        ValueError: the batch does not suit the method, the schedule does not fit, or neither `max_steps` nor
            the length of the data is known.
    """

    loss_is_scaled_for_ga = False  # our losses are means, so Trainer divides by the number of micro-batches
    model: SSLForPreTraining
    args: SSLTrainingArguments

    def __init__(
        self,
        model: SSLForPreTraining,
        args: SSLTrainingArguments,
        train_dataset: ImageSource | list[ImageSource],
        processing_class: SSLImageProcessor,
        weights: list[float] | None = None,
        probe: Callable[[SSLForPreTraining], dict[str, float]] | None = None,
        text_processor: SSLImageTextProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        self.sources = train_dataset if isinstance(train_dataset, list) else [train_dataset]
        self.weights = weights
        self.view_maker = make_view_maker(processing_class.views)
        _check_frames(model, self.view_maker)
        self.probe = probe
        self.text_processor = text_processor
        self.floors: dict[str, float] = {}
        self._step_batches: list[dict[str, Tensor]] = []
        self._updates: list[dict[str, Tensor]] = []
        self._guard = DivergenceGuard(args)
        self.clock = StepClock()
        self._optimizing = contextlib.ExitStack()
        self._parts: dict[str, list[Tensor]] = {}
        self._features: Tensor | None = None
        check_batch(model, args)
        if args.lora_rank is not None:
            add_lora(model, args.lora_rank)
        self.take_token(args)
        if probe is None:
            args.eval_strategy, args.metric_for_best_model = IntervalStrategy.NO, None
        self.loader = self._build_loader(args, start_batch=0)
        if args.max_steps <= 0:
            args.max_steps = math.ceil(args.num_train_epochs * self._steps_per_epoch(args))
        if args.warmup_epochs is not None:
            args.warmup_steps = round(args.warmup_epochs * self._steps_per_epoch(args))
        self._learning_rate_factor = self._build_schedule(args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Unsized(),
            eval_dataset=_Unsized(),
            processing_class=processing_class,
            **kwargs,
        )
        self._suit_device()
        self.head_warmup_steps = head_warmup_steps(args, model)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(ReadableLog())
        self.add_callback(Profile(self.clock))
        self.add_callback(StepProtocol(self))
        self.add_callback(
            LiveDoctor(Case(model.config, args, model.expectations(args.per_device_train_batch_size)))
        )
        if (guard := build_guard(self)) is not None:
            self.add_callback(guard)

    # Data

    def _build_loader(self, args: SSLTrainingArguments, start_batch: int) -> TrainLoader:
        return TrainLoader(
            self.sources,
            self.view_maker,
            batch_size=args.per_device_train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            weights=self.weights,
            rank=args.process_index,
            world_size=args.world_size,
            num_workers=args.dataloader_num_workers,
            start_batch=start_batch,
            max_bad_fraction=args.max_bad_fraction,
        )

    def _steps_per_epoch(self, args: SSLTrainingArguments) -> int:
        if self.loader.batches_per_epoch is None:
            raise ValueError(
                "the length of the data is unknown; give max_steps instead of num_train_epochs, and "
                "warmup_steps instead of warmup_epochs"
            )
        return max(self.loader.batches_per_epoch // args.gradient_accumulation_steps, 1)

    def get_train_dataloader(self) -> TrainLoader:  # type: ignore[override]
        """The loader, positioned behind the steps that a resumed run has done."""
        self.loader = self._build_loader(self.args, self._resume_step * self.args.gradient_accumulation_steps)
        return self.loader

    def epoch_at(self, step: int) -> float:
        """Passes over the data after `step` optimizer steps."""
        return self.loader.epoch_at(step * self.args.gradient_accumulation_steps)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], None]:
        """All micro-batches of one step, each row numbered in the global batch: (j * W + r) * B + i."""
        made = self.loader.seconds_of_making
        with self.clock.span("loading"):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.args.dataloader_num_workers:
            self.clock.move(self.loader.seconds_of_making - made, "loading", "views")
        tokenize = None if self.text_processor is None else self.text_processor.tokenize
        self._step_batches = model_inputs(batches, self.args.process_index, self.args.world_size, tokenize)
        return self._step_batches, None

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move to the device; bytes become normalised floats there, a quarter of the transfer."""
        inputs = super()._prepare_inputs(inputs)
        processor: Any = self.processing_class
        for name, value in inputs.items():
            if value.dtype == torch.uint8:
                inputs[name] = normalize_bytes(value, processor.image_mean, processor.image_std)
        return inputs

    # The step

    def models(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The method, and what its forwards go through: the same, or a wrapper for several processes."""
        return self.model, self.model_wrapped

    def start_step(self, step: int) -> None:
        """Schedules and targets; called with the 0-based step before its first forward."""
        with self.clock.span("teacher"):
            self._start_step(step)

    def _start_step(self, step: int) -> None:
        self._updates = []
        self._set_weight_decay(step)
        self.model.hold_backbone(step < self.head_warmup_steps)
        self.model.begin_step(step, self.args.max_steps, seed=self.args.seed)
        batches: Any = self._step_batches
        if len(batches) == 1 and self.args.cached_microbatch_size is None:
            self._step_batches[0].update(self._prepare_inputs(self._step_batches[0]))
        else:
            batches = PreparedOnAccess(self._step_batches, self._prepare_inputs)
        with self.accelerator.autocast():
            self.model.prepare_step(batches)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch; keeps what `end_step` and the log need."""
        with self.clock.span("forward"):
            outputs: SSLOutput = model(**inputs)
        loss = self._keep(outputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch, or of a whole batch by gradient caching."""
        with self.clock.span("backward"):  # all that is not forward
            if self.args.cached_microbatch_size is None:
                return super().training_step(model, inputs, num_items_in_batch)
            return self._cached_training_step(model, inputs, self.args.cached_microbatch_size)

    def _cached_training_step(self, model: torch.nn.Module, inputs: dict[str, Any], size: int) -> Tensor:
        model.train()
        scaler = self.accelerator.scaler
        outputs = backward_through_cache(
            model,
            self.model,
            PreparedOnAccess(cut(inputs, size), self._prepare_inputs),
            autocast=self.accelerator.autocast,
            no_sync=functools.partial(self.accelerator.no_sync, model),
            scale=(lambda loss: loss) if scaler is None else scaler.scale,
        )
        return self._keep(outputs).detach()

    def _keep(self, outputs: SSLOutput) -> Tensor:
        assert outputs.loss is not None
        self._updates.append(outputs.updates or {})
        self._guard.add(outputs.loss)
        self._features = outputs.features
        for name, value in (outputs.parts or {}).items():
            self._parts.setdefault(name, []).append(value.detach())
        return outputs.loss

    def finish_step(self, step: int) -> None:
        """After the optimizer; a step that a loss scaler skipped counts too, as in the official code.

        Raises:
            TrainingDiverged: a loss of the step was NaN or infinite. Looked at here only where that costs no
                waiting for a device; elsewhere before every log entry and checkpoint.
        """
        self._optimizing.close()
        if self.args.device.type == "cpu":
            self._guard.check_losses(step + 1)
        with torch.no_grad(), self.clock.span("teacher"):
            self.model.end_step(self._updates)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor | float:
        self._drop_gradients(self.model.held_backbone_parameters())
        with self.clock.span("optimizer"):
            return self._clip(model)

    def _clip(self, model: torch.nn.Module) -> Tensor | float:
        if self.args.clip_mode == "global":
            return super()._clip_grad_norm(model)
        if self.args.clip_mode == "per_tensor":
            return clip_each_gradient(model.parameters(), self.args.max_grad_norm)
        norms = [
            torch.nn.utils.clip_grad_norm_(list(part.parameters()), self.args.max_grad_norm)
            for part in self.model.student.children()
            if any(parameter.grad is not None for parameter in part.parameters())
        ]
        return torch.stack(norms).norm()

    def hold_parameters(self) -> None:
        """What stands still in this step gets no gradient; after clipping, which official code does first.

        A backbone that is held has lost its own before: heads alone are clipped. The optimizer follows, until
        `finish_step`.
        """
        self._optimizing.enter_context(self.clock.span("optimizer"))
        self._drop_gradients(self.model.held_parameters())
        self._drop_gradients(self.model.held_backbone_parameters())

    @staticmethod
    def _drop_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None

    # Optimizer and schedules

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        """The recipe's optimizer over the method's own parameter groups."""
        if self.optimizer is None:
            self.model.freeze_targets()
            groups = self.model.parameter_groups(
                self.args.weight_decay,
                self.args.decay_norms_and_biases,
                self.args.layer_decay,
                self.args.patch_embedding_multiplier,
            )
            self.optimizer = build_optimizer(
                self.args.optimizer,
                groups,
                learning_rate=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                epsilon=self.args.adam_epsilon,
                momentum=self.args.optimizer_momentum,
                trust_coefficient=self.args.lars_trust_coefficient,
                lars_variant=self.args.lars_variant,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """The recipe's learning-rate schedule, in optimizer steps."""
        if self.lr_scheduler is None:
            scheduled: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(scheduled, self._learning_rate_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _build_schedule(self, args: SSLTrainingArguments) -> Callable[[int], float]:
        """Built before anything long, so that a warm-up that does not fit is refused early."""
        known = self.loader.batches_per_epoch is not None
        span = ScheduleSpan(
            total_steps=args.max_steps,
            warmup_steps=args.get_warmup_steps(args.max_steps),
            steps_per_epoch=self._steps_per_epoch(args) if known else args.max_steps,
            final_factor=args.learning_rate_end,
            milestones=tuple(args.learning_rate_milestones),
        )
        schedule = learning_rate_schedule(args.learning_rate_schedule)
        schedule(0, span)
        return lambda step: schedule(step, span)

    def _set_weight_decay(self, step: int) -> None:
        if self.args.weight_decay_end is None:
            return
        value = cosine_weight_decay(
            step, self.args.max_steps, self.args.weight_decay, self.args.weight_decay_end
        )
        optimizer: Any = self.optimizer
        for group in optimizer.param_groups:
            if group["weight_decay"] != 0:
                group["weight_decay"] = value

    def _suit_device(self) -> None:
        """What changes speed alone: attention by device and precision, memory layout of CNNs."""
        if self.args.bf16 and self.args.device.type == "cpu":
            # There two matrix products beat the fused kernel, which emulates bf16, by 1.7 to 4.5 times.
            self.model.set_attn_implementation("eager")
        if isinstance(self.model.published_branch().backbone, SSLTimmBackbone):
            # 1.1 times as fast in wide ResNets, 1.5 times in narrow ones; 4-D tensors only.
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]

    # Evaluation, log, checkpoints

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Probe the encoder; there is no evaluation loss, as it says nothing about what was learned."""
        if self.probe is None:
            return {}
        # Of the first process in all: BatchNorm statistics differ a little between them.
        with self.clock.span("evaluation"):
            named = on_first_process(self.args, self._probe) | self.floors
        scores = {f"{metric_key_prefix}_{name}": value for name, value in named.items()}
        self.log(scores)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return scores

    def _probe(self) -> dict[str, float]:
        assert self.probe is not None
        return self.probe(self.model)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's decision; the best encoder so far is saved even where no checkpoint is due."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.save_strategy != SaveStrategy.NO:
            self.control.should_save = True
        return is_best

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the named parts of the loss; stop when the loss is not a number.

        Raises:
            TrainingDiverged: the loss is NaN or infinite.
        """
        self._guard.check_losses(self.state.global_step)
        if "loss" in logs:
            figures = {name: torch.stack(values).mean().item() for name, values in self._parts.items()}
            figures |= self._state_figures()
            logs.update({name: float(f"{value:.5g}") for name, value in figures.items()})
            self._parts = {}
        super().log(logs, start_time)

    def _state_figures(self) -> dict[str, float]:
        """Of the last micro-batch's features and of the branches, as they are now."""
        figures = {}
        if self._features is not None:
            figures["effective_rank"] = effective_rank(self._features[:IMAGES_OF_RANK])
        if self.model.has_teacher and not self.args.fsdp:  # whole parameters are nowhere when sharded
            figures["teacher_distance"] = relative_distance(self.model.teacher, self.model.student)
        return figures

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the model, LoRA adapters merged, and the tokenizer; a checkpoint has adapters apart too."""
        if self.text_processor is not None:
            save_tokenizer(self.text_processor.tokenizer, Path(output_dir or str(self.args.output_dir)))
        if self.args.lora_rank is None:
            super()._save(output_dir, state_dict)
            return
        super()._save(output_dir, merged_state(self.model))
        if self._staging is not None and self.args.should_save:
            save_apart(self.model, Path(str(output_dir)))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        if self.args.lora_rank is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_apart(self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint or nothing.

        Raises:
            CheckpointError: it could not be written; what was written of it is removed.
            TrainingDiverged: there is nothing worth writing.
        """
        self._guard.check_losses(self.state.global_step)
        self._guard.check_weights(self.model, self.state.global_step)
        with self.clock.span("saving"):
            super()._save_checkpoint(model, trial)


class _Unsized(torch.utils.data.IterableDataset[Any]):
    """Stands for the data in Trainer's own checks; the loader reads the sources themselves."""

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("SSLTrainer reads its sources through its loader")


def _check_frames(model: SSLForPreTraining, view_maker: ViewMaker | ClipMaker) -> None:
    takes_clips = getattr(model.config.backbone_config, "is_video", False)
    if takes_clips and not isinstance(view_maker, ClipMaker):
        raise ValueError("the model takes clips: give its view frames, such as {count: 16, step: 4}")
    if isinstance(view_maker, ClipMaker) and not takes_clips:
        raise ValueError("the model takes images: leave out the view's frames")
