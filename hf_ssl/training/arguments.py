"""Training arguments: transformers' own, with defaults for self-supervised training, and what it lacks."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_ssl.training.optimizers import LARS_VARIANTS, OPTIMIZERS
from hf_ssl.training.schedules import LEARNING_RATE_SCHEDULES, scaled_learning_rate


@dataclass
class SSLTrainingArguments(TrainingArguments):
    """Arguments of `SSLTrainer`.

    Changed defaults, since transformers' belong to fine-tuning: no gradient clipping, columns are kept, NaN
    is not filtered from the log, data are positioned instead of skipped on resume.
    """

    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images per optimizer step on all processes; accumulation follows from it."},
    )
    profile: bool = field(
        default=False,
        metadata={
            "help": "Write profile.json, the seconds of loading, views, forward and so on, into the run; on "
            "a GPU it waits for the device at every border, which slows the run a little."
        },
    )
    cached_microbatch_size: int | None = field(
        default=None,
        metadata={
            "help": "Gradient caching, for losses that contrast within the batch: images held in memory with "
            "their graph at a time, a divisor of per_device_train_batch_size. Two forwards instead of one."
        },
    )
    cached_batch_norm: str = field(
        default="refuse",
        metadata={"help": "ghost: accept that a backbone's BatchNorm normalises by cached micro-batches."},
    )
    base_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate per `learning_rate_reference_batch` images; sets `learning_rate`."},
    )
    learning_rate_reference_batch: int = field(
        default=256, metadata={"help": "Batch for which `base_learning_rate` is given."}
    )
    learning_rate_power: float = field(
        default=1.0, metadata={"help": "1: linear scaling with the batch, 0.5: square root, 0: none."}
    )
    learning_rate_schedule: str = field(
        default="cosine",
        metadata={"help": "cosine (per step), cosine_per_epoch, multistep_per_epoch or constant."},
    )
    learning_rate_end: float = field(
        default=0.0, metadata={"help": "Final share of the learning rate (cosine)."}
    )
    learning_rate_milestones: list[int] = field(
        default_factory=list,
        metadata={"help": "Epochs at which multistep_per_epoch divides the rate by 10."},
    )
    warmup_epochs: float | None = field(
        default=None, metadata={"help": "Linear warm-up; overrides warmup_steps."}
    )
    optimizer: str = field(default="adamw", metadata={"help": "adamw, sgd or lars; replaces `optim`."})
    optimizer_momentum: float = field(default=0.9, metadata={"help": "Of sgd and lars."})
    lars_variant: str = field(
        default="moco", metadata={"help": "tf (SimCLR), moco (MoCo v3, MAE probe) or larc."}
    )
    lars_trust_coefficient: float = field(default=0.001, metadata={"help": "Trust coefficient of LARS."})
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "Final weight decay on a half cosine; None keeps it constant."}
    )
    decay_norms_and_biases: bool = field(
        default=False, metadata={"help": "Decay every parameter, as the official MoCo recipes do."}
    )
    clip_mode: str = field(
        default="global",
        metadata={
            "help": "What max_grad_norm bounds: the global norm, each tensor's (per_tensor), or that of each "
            "part of the student, as backbone and head (per_module)."
        },
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate per layer below a ViT's last norm."}
    )
    patch_embedding_multiplier: float = field(
        default=1.0, metadata={"help": "Further factor on the learning rate of a ViT's patch projection."}
    )
    head_warmup_steps: float | None = field(
        default=None,
        metadata={
            "help": "Steps, or below 1 a share of them, in which the backbone stands still and only what is "
            "on it learns. None: a tenth of the run, at most 1,000, where heads start afresh on a trained "
            "encoder, else 0."
        },
    )
    max_knn_drop: float | None = field(
        default=None,
        metadata={
            "help": "The run stops and rolls back when the probe's kNN score is this much below the encoder "
            "that it started from. None: 0.02 where heads start afresh on a trained encoder, else off; 1: "
            "off."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of LoRA adapters on the attention of a ViT, whose own weights stand still; needs "
            "--init_from and the package peft. What the run leaves has them merged."
        },
    )
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Share of unreadable images above which the run stops."}
    )

    metric_for_best_model: str | None = field(
        default="knn",
        metadata={"help": "Score of the online probe that decides which checkpoint is kept as best."},
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Of metric_for_best_model."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 is off."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Show NaN losses."})
    ignore_data_skip: bool = field(default=True, metadata={"help": "Data are positioned, not skipped."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two lines of the log."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept beside the best one."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter is used."}
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Unused; see learning_rate_schedule."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses bf16 on a CPU unless told
        super().__post_init__()
        if self.use_cpu and (self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"):
            raise ValueError("fsdp on a CPU would be plain data parallelism without a word; leave fsdp out")
        if self.push_to_hub and self.hub_strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
            raise ValueError(
                f"hub_strategy {HubStrategy(self.hub_strategy).value} would publish pickles (optimizer.pt, "
                "rng_state.pth); use every_save or end"
            )
        choices = {
            "lars_variant": LARS_VARIANTS,
            "clip_mode": ("global", "per_tensor", "per_module"),
            "cached_batch_norm": ("refuse", "ghost"),
            "optimizer": tuple(OPTIMIZERS),
            "learning_rate_schedule": tuple(LEARNING_RATE_SCHEDULES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got '{getattr(self, name)}'")
        for name, least in (("head_warmup_steps", 0.0), ("max_knn_drop", 0.0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least:g}, got {value}")
        self._check_lora()
        self._set_accumulation()
        self._check_caching()
        self._set_learning_rate()

    def _set_accumulation(self) -> None:
        """Derive accumulation from the global batch.

        Raises:
            ValueError: the global batch is not a multiple of the images that all processes take at once.
        """
        for name in ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        at_once = self.per_device_train_batch_size * self.world_size
        if self.global_batch_size is None:
            self.global_batch_size = at_once * self.gradient_accumulation_steps
            return
        if self.global_batch_size < at_once and self.world_size == 1:
            self.per_device_train_batch_size = at_once = self.global_batch_size
        if self.global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"per_device_train_batch_size {self.per_device_train_batch_size} x {self.world_size} "
                f"processes; use {max(self.global_batch_size // at_once, 1) * at_once}"
            )
        self.gradient_accumulation_steps = self.global_batch_size // at_once

    def _check_caching(self) -> None:
        """Refuse a cached micro-batch that cannot be cut, or that something else would cut again.

        Raises:
            ValueError: it is no divisor of the batch, or comes with accumulation, fsdp or deepspeed.
        """
        size, batch = self.cached_microbatch_size, self.per_device_train_batch_size
        if size is None:
            if self.cached_batch_norm != "refuse":
                raise ValueError("cached_batch_norm has no effect without cached_microbatch_size")
            return
        if self.fsdp or self.deepspeed:
            raise ValueError("cached_microbatch_size takes no sharding: leave out fsdp or deepspeed")
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"cached_microbatch_size takes the place of accumulation: set per_device_train_batch_size to "
                f"{batch * self.gradient_accumulation_steps}; only cached_microbatch_size images are held in "
                "memory with their graph"
            )
        if size < 1 or batch % size:
            fitting = max(divisor for divisor in range(1, max(size, 1) + 1) if batch % divisor == 0)
            raise ValueError(
                f"cached_microbatch_size {size} does not divide per_device_train_batch_size {batch}; "
                f"use {fitting}"
            )

    def _check_lora(self) -> None:
        """Refuse adapters that would be sharded."""
        if self.lora_rank is None:
            return
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if self.fsdp or self.deepspeed:
            raise ValueError("lora_rank takes no sharding: leave out fsdp or deepspeed")

    def _set_learning_rate(self) -> None:
        if self.base_learning_rate is not None:
            self.learning_rate = scaled_learning_rate(
                self.base_learning_rate,
                int(self.global_batch_size or 1),
                self.learning_rate_reference_batch,
                self.learning_rate_power,
            )
