"""Training arguments: batch and rate follow from each other, what makes no sense is refused."""

from pathlib import Path
from typing import Any

import pytest

from hf_ssl.training.arguments import SSLTrainingArguments


def arguments(**options: Any) -> SSLTrainingArguments:
    return SSLTrainingArguments(output_dir="unused", **options)


class TwoProcesses(SSLTrainingArguments):
    """As under torchrun."""

    @property
    def world_size(self) -> int:
        return 2


def test_accumulation_follows_from_the_global_batch():
    args = arguments(global_batch_size=64, per_device_train_batch_size=16)
    assert args.gradient_accumulation_steps == 4
    args = TwoProcesses(output_dir="unused", global_batch_size=64, per_device_train_batch_size=16)
    assert args.gradient_accumulation_steps == 2


def test_global_batch_follows_from_accumulation():
    assert arguments(per_device_train_batch_size=16, gradient_accumulation_steps=3).global_batch_size == 48


def test_batch_of_a_device_shrinks_to_a_smaller_global_batch():
    args = arguments(global_batch_size=8, per_device_train_batch_size=64)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"global_batch_size": 50, "per_device_train_batch_size": 16},
            "50 is not a multiple of .*16.*use 48",
        ),
        ({"global_batch_size": 0}, "global_batch_size must be at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"clip_mode": "local"}, "clip_mode must be one of global, per_tensor, per_module, got 'local'"),
        ({"optimizer": "adam"}, "optimizer must be one of .*adamw.*, got 'adam'"),
        ({"learning_rate_schedule": "linear"}, "learning_rate_schedule must be one of cosine"),
        ({"cached_batch_norm": "yes"}, "cached_batch_norm must be one of refuse, ghost, got 'yes'"),
        ({"cached_batch_norm": "ghost"}, "cached_batch_norm has no effect without cached_microbatch_size"),
        (
            {"cached_microbatch_size": 5, "per_device_train_batch_size": 16},
            "cached_microbatch_size 5 does not divide per_device_train_batch_size 16; use 4",
        ),
        ({"cached_microbatch_size": 0, "per_device_train_batch_size": 16}, "cached_microbatch_size 0"),
        (
            {"cached_microbatch_size": 4, "per_device_train_batch_size": 16, "global_batch_size": 64},
            "takes the place of accumulation: set per_device_train_batch_size to 64",
        ),
        ({"lars_variant": "x"}, "lars_variant must be one of tf, moco, larc"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        arguments(**options)


def test_two_processes_refuse_a_batch_smaller_than_they_take():
    with pytest.raises(ValueError, match="8 is not a multiple of .*16 x 2 processes; use 32"):
        TwoProcesses(output_dir="unused", global_batch_size=8, per_device_train_batch_size=16)


@pytest.mark.parametrize(("power", "rate"), [(1.0, 0.6), (0.5, 0.3 * 2**0.5), (0.0, 0.3)])
def test_learning_rate_scales_with_the_batch(power: float, rate: float):
    args = arguments(base_learning_rate=0.3, global_batch_size=512, learning_rate_power=power)
    assert args.learning_rate == pytest.approx(rate)


def test_learning_rate_counts_the_images_of_all_processes_and_micro_batches():
    """Mistake 24: the batch of one device would divide the rate by their number."""
    args = TwoProcesses(
        output_dir="unused",
        base_learning_rate=0.3,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,
    )
    assert args.learning_rate == pytest.approx(0.3 * 128 / 256)


def test_sharding_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    """accelerate would train data-parallel without a word, whether asked here or by `accelerate launch`."""
    with pytest.raises(ValueError, match="fsdp on a CPU"):
        arguments(use_cpu=True, fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp on a CPU"):
        arguments(use_cpu=True)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_gradient_caching_refuses_sharding(name: str):
    args = arguments(cached_microbatch_size=4, per_device_train_batch_size=8)
    setattr(args, name, True)  # asked for in the constructor, either needs what is not here
    with pytest.raises(ValueError, match="cached_microbatch_size takes no sharding"):
        args._check_caching()


def test_defaults_are_not_those_of_fine_tuning(tmp_path: Path):
    """Mistake 53: transformers clips at 1, lowers the rate linearly and decays the scale of norms."""
    args = arguments()
    assert (args.max_grad_norm, args.remove_unused_columns, args.logging_nan_inf_filter) == (0, False, False)
    assert args.ignore_data_skip
    assert (args.learning_rate_schedule, args.decay_norms_and_biases) == ("cosine", False)
