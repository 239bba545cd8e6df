"""One global batch, cut in several ways: what a training step must not depend on.

A cell of the matrix is a row of `tests/modeling/tiny.py` and a `Layout`. `measure` trains it in float64 with
the real `SSLTrainer` (or, sharded, with the step protocol alone) and returns every loss, gradient, mask and
the final state, for `deviations` from another layout. `verdict` says where two layouts may differ, and by
which words the trainer must have said so. Used by `tests/modeling/test_invariance.py` and
`benchmarks/invariance.py`.
"""

import contextlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from hf_ssl.data.sources import ImageSource
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.batch_checks import has_batch_norm, has_own_statistics
from hf_ssl.training.step_protocol import keep_protocol
from hf_ssl.training.trainer import SSLTrainer
from tests.distributed import run_processes
from tests.modeling.tiny import BY_NAME, TinyMethod, run_step

NUM_IMAGES = 64
NUM_STEPS = 2
SEED = 3
LEARNING_RATE = 0.05


@dataclass(frozen=True)
class Layout:
    """How the images of a step are cut.

    Attributes:
        name: in tables.
        num_processes: data-parallel processes.
        num_micro_batches: accumulated by each process.
        cached_microbatch_size: see `SSLTrainingArguments`.
        sharded: by FSDP2, without the trainer, which accelerate gives no sharding on a CPU.
        frozen_norms: BatchNorm normalises by its running statistics, as those of a batch depend on its size.
    """

    name: str
    num_processes: int = 1
    num_micro_batches: int = 1
    cached_microbatch_size: int | None = None
    sharded: bool = False
    frozen_norms: bool = False

    @property
    def batch_size(self) -> int:
        """Images of one accumulated micro-batch of one process."""
        return NUM_IMAGES // self.num_processes // self.num_micro_batches


ONE = Layout("1 process x 64")
ONE_FROZEN = Layout("1 process x 64, frozen norms", frozen_norms=True)
IN_ONE_PROCESS = [
    Layout("4 accumulated x 16", num_micro_batches=4),
    Layout("4 accumulated x 16, frozen norms", num_micro_batches=4, frozen_norms=True),
    Layout("64 cached by 16", cached_microbatch_size=16),
]
IN_TWO_PROCESSES = [
    Layout("2 processes x 32", 2),
    Layout("2 processes x 2 accumulated x 16", 2, 2),
    Layout("2 processes x 2 accumulated x 16, frozen norms", 2, 2, frozen_norms=True),
    Layout("2 processes x 32 cached by 8", 2, cached_microbatch_size=8),
    Layout("2 sharded processes x 32", 2, sharded=True),
]
LAYOUTS = [*IN_ONE_PROCESS, *IN_TWO_PROCESSES]


@dataclass
class Measurement:
    """What one process saw.

    Attributes:
        values: by quantity (loss, gradients, masks, and the parts of the state), tensors by name.
        facts: the mode that it ran in.
        warnings: what was said.
    """

    values: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def applies(row: TinyMethod, layout: Layout) -> bool:
    """Frozen norms only where BatchNorm alone forbids the layout."""
    model = _network(row.name)
    return not layout.frozen_norms or (has_batch_norm(model) and not model.loss_couples_the_batch)


def verdict(row: TinyMethod, layout: Layout) -> tuple[str, str]:
    """What must come of a cell: ("equal", ""), or ("differs" or "refused", words of the trainer)."""
    model = _network(row.name)
    if layout.cached_microbatch_size:
        if not model.loss_couples_the_batch:
            return "refused", "has no use for cached_microbatch_size"
        if has_batch_norm(model.embedder):
            return "refused", "cached_batch_norm=ghost"
    if layout.num_micro_batches > 1 and model.loss_couples_the_batch:
        return "differs", "contrasts within a micro-batch"
    images = layout.batch_size * (1 if has_own_statistics(model) else layout.num_processes)
    if has_batch_norm(model) and not layout.frozen_norms and images != NUM_IMAGES:
        return "differs", f"BatchNorm normalises by {images} images, not by the {NUM_IMAGES} of a step"
    return "equal", ""


@cache
def _source() -> ImageSource:
    from tests.training.conftest import make_source

    return make_source(NUM_IMAGES)  # never read: batches are given


@cache
def _network(name: str) -> SSLForPreTraining:
    return BY_NAME[name].build()


def measure(name: str, layout: Layout) -> Measurement:
    """Train a cell in this process, or its part of it.

    Raises:
        ValueError: the trainer refuses it.
    """
    model = _double_precision(BY_NAME[name], layout)
    with _recorded_warnings() as warnings:
        result = _train_sharded(name, model, layout) if layout.sharded else _train(name, model, layout)
    result.warnings = warnings
    return result


def measure_in_processes(cells: Sequence[tuple[str, Layout]], num_processes: int = 2) -> list[list[Any]]:
    """For every process in rank order: for every cell a `Measurement`, or the words of the refusal."""
    return run_processes(_measure_cells, list(cells), num_processes=num_processes)


def _measure_cells(cells: list[tuple[str, Layout]]) -> list[Any]:
    from tests.invariance import measure  # under its own name, so that results can be read elsewhere

    results: list[Any] = []
    for name, layout in cells:
        try:
            results.append(measure(name, layout))
        except ValueError as error:
            results.append(str(error))
    return results


def deviations(result: Measurement, expected: Measurement) -> dict[str, float]:
    """Largest absolute difference of every quantity; infinite where something is missing."""
    found = {}
    for quantity, values in expected.values.items():
        others = result.values.get(quantity, {})
        found[quantity] = max(
            (_difference(others.get(name), value) for name, value in values.items()), default=0.0
        )
        if others.keys() != values.keys():
            found[quantity] = float("inf")
    return found


def _difference(value: Tensor | None, expected: Tensor) -> float:
    if value is None or value.shape != expected.shape:
        return float("inf")
    return float((value.double() - expected.double()).abs().max()) if expected.numel() else 0.0


# The model and the images


def _double_precision(row: TinyMethod, layout: Layout) -> SSLForPreTraining:
    # A queue that a step does not fill, so that its pointer and order show.
    changes = {"queue_length": 3 * NUM_IMAGES} if "queue_length" in row.options else {}
    model = row.build(**changes).double()
    generator = torch.Generator().manual_seed(9)
    if model.has_teacher:  # unlike the student, so that a teacher that moves too often shows
        for parameter in model.teacher.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if layout.frozen_norms:
        _freeze_norms(model)
    return model


def _freeze_norms(model: SSLForPreTraining) -> None:
    def train(mode: bool = True) -> SSLForPreTraining:
        type(model).train(model, mode)
        for module in model.modules():
            module.training &= "BatchNorm" not in type(module).__name__
        return model

    model.train = train  # type: ignore[method-assign]
    model.train()


def _start_wrong_elsewhere(model: SSLForPreTraining) -> None:
    """All processes must begin as the first one, whatever they held: weights, teacher and queue."""
    if _rank() != 0:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data.add_(1.0)


class _Batches:
    """The same images in the same global order however they are cut."""

    def __init__(self, row: TinyMethod, layout: Layout) -> None:
        batch = row.batch(NUM_STEPS * NUM_IMAGES, dtype=torch.float64)
        pieces = zip(*(value.split(layout.batch_size) for value in batch.values()), strict=True)
        own = list(pieces)[_rank() :: layout.num_processes]
        self._batches = [dict(zip(batch, values, strict=True)) for values in own]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (dict(batch) for batch in self._batches)


# With the trainer


def _train(name: str, model: SSLForPreTraining, layout: Layout) -> Measurement:
    row = BY_NAME[name]
    _start_wrong_elsewhere(model)
    with tempfile.TemporaryDirectory() as folder:
        args = SSLTrainingArguments(
            output_dir=folder,
            max_steps=NUM_STEPS,
            per_device_train_batch_size=layout.batch_size,
            global_batch_size=NUM_IMAGES,
            cached_microbatch_size=layout.cached_microbatch_size,
            learning_rate=LEARNING_RATE,
            optimizer="sgd",
            learning_rate_schedule="constant",
            save_strategy="no",
            report_to="none",
            seed=SEED,
            use_cpu=True,
        )
        trainer = SSLTrainer(
            model=model,
            args=args,
            train_dataset=_source(),
            processing_class=METHODS[row.method].processor_class.for_image_size(row.image_size),
        )
        trainer.get_train_dataloader = lambda: _Batches(row, layout)  # type: ignore
        recorder = _Recorder(trainer)
        trainer.add_callback(recorder)
        torch.manual_seed(100 + _rank())  # nothing may depend on the random state of a process
        trainer.train()
    return recorder.measurement()


class _Recorder(TrainerCallback):
    """Losses, gradients, masks and facts of a training."""

    def __init__(self, trainer: SSLTrainer) -> None:
        self.trainer = trainer
        self.losses: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {"rows of a forward": set(), "forwards": 0, "averages": 0}
        original = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            self.losses.append(original(*args, **kwargs))
            return self.losses[-1]

        trainer.training_step = training_step  # type: ignore[method-assign]
        trainer.model.register_forward_hook(self._look_at_forward, with_kwargs=True)

    def _look_at_forward(self, model: nn.Module, args: Any, inputs: dict[str, Any], outputs: Any) -> None:
        self.facts["forwards"] += 1
        self.facts["rows of a forward"].add(len(inputs["row_index"]))
        if outputs.is_masked is not None:
            for row, mask in zip(inputs["row_index"].tolist(), outputs.is_masked, strict=True):
                self.masks[f"step {self.trainer.state.global_step} row {row}"] = mask

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped.register_comm_hook(None, self._count_average)  # a tiny model is one bucket

    def _count_average(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.facts["averages"] += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.grad is not None:
                self.gradients[f"step {state.global_step} {name}"] = parameter.grad.clone()
        wrapped: Any = self.trainer.model_wrapped
        self.facts |= {
            "wrapper": type(wrapped).__name__,
            "finds unused parameters": getattr(wrapped, "find_unused_parameters", None),
            "broadcasts buffers": getattr(wrapped, "broadcast_buffers", None),
        }

    def measurement(self) -> Measurement:
        args = self.trainer.args
        micro_batches = args.gradient_accumulation_steps
        losses = torch.stack(self.losses).view(NUM_STEPS, micro_batches).sum(dim=1)
        self.facts |= {
            "processes": args.world_size,
            "micro-batches": micro_batches,
            "distributed type": self.trainer.accelerator.distributed_type.name,
            "dtype": str(next(self.trainer.model.parameters()).dtype),
        }
        state = self.trainer.model.state_dict()
        return Measurement(_values(losses, self.gradients, state, self.masks), self.facts)


def _values(
    losses: Tensor, gradients: dict[str, Tensor], state: dict[str, Tensor], masks: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    values = {"loss": {"of every step": _mean_of_processes(losses)}, "gradients": gradients}
    for name, value in state.items():
        is_statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        quantity = "BatchNorm statistics" if is_statistic else name.split(".")[0]
        values.setdefault(quantity, {})[name] = value.clone()
    if masks:
        values["masks"] = _masks_of_processes(masks)
    return values


def _mean_of_processes(x: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def _masks_of_processes(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    parts: list[Any] = [masks]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, masks)
    return {name: mask for part in parts for name, mask in part.items()}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# Sharded, without the trainer


def shard(model: SSLForPreTraining) -> None:
    """Student and teacher by the same rule: every layer by itself, as accelerate does, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module)
    fully_shard(model)
    keep_protocol(model, model)


def _train_sharded(name: str, model: SSLForPreTraining, layout: Layout) -> Measurement:
    row = BY_NAME[name]
    shard(model)
    optimizer = torch.optim.SGD(
        [value for _, value in model.trainable_parameters()], lr=LEARNING_RATE, momentum=0.9
    )
    losses, gradients, masks = [], {}, {}
    step = 0

    def look_at_forward(model: nn.Module, args: Any, inputs: dict[str, Any], outputs: Any) -> None:
        if outputs.is_masked is not None:
            for row, mask in zip(inputs["row_index"].tolist(), outputs.is_masked, strict=True):
                masks[f"step {step} row {row}"] = mask

    def optimize() -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[f"step {step} {name}"] = _whole(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()

    model.register_forward_hook(look_at_forward, with_kwargs=True)
    for step, batch in enumerate(_Batches(row, layout)):
        pixels = batch[row.input_name]
        losses.append(run_step(model, [pixels], step, NUM_STEPS, optimize, _rank(), layout.num_processes))
    state = {name: _whole(value) for name, value in model.state_dict().items()}
    facts = {
        "processes": dist.get_world_size(),
        "sharded branches": {
            name.split(".")[0] for name, value in model.named_parameters() if hasattr(value, "full_tensor")
        },
        "whole parameters": [n for n, value in model.named_parameters() if not hasattr(value, "full_tensor")],
    }
    loss = torch.tensor(losses, dtype=torch.float64)
    return Measurement(_values(loss, gradients, state, masks), facts)


def _whole(x: Tensor) -> Tensor:
    full: Callable[[], Tensor] = getattr(x, "full_tensor", x.clone)
    return full()


# What was said


@contextlib.contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_ssl")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def was_said(words: str, warnings: Sequence[str]) -> bool:
    """Whether one of the warnings matches."""
    return any(re.search(words, warning) for warning in warnings)
