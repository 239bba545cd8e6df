"""The trainer: order of a step, accumulation, schedules, clipping, exact resume, evaluation, divergence."""

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import TrainerCallback

from hf_ssl.modeling import METHODS
from hf_ssl.training.checkpoints import CheckpointError
from hf_ssl.training.micro_batches import model_inputs, normalize_bytes
from hf_ssl.training.probes import OnlineProbe
from hf_ssl.training.trainer import SSLTrainer, TrainingDiverged
from tests.modeling.tiny import BY_NAME
from tests.training.conftest import FixedBatches, make_source, random_image

MakeTrainer = Callable[..., SSLTrainer]


def spy_on(trainer: SSLTrainer) -> list[tuple[Any, ...]]:
    """Record the calls of a step in their order."""
    events: list[tuple[Any, ...]] = []

    def record(owner: Any, name: str, describe: Callable[..., tuple[Any, ...]]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            events.append((name, *describe(*args, **kwargs)))
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    record(trainer, "get_batch_samples", lambda iterator, count, device: (count,))
    record(trainer.model, "begin_step", lambda step, total, seed: (step, total))
    record(trainer.model, "prepare_step", lambda batches: (len(batches),))
    record(trainer.model, "forward", lambda **inputs: tuple(inputs["row_index"].tolist()))
    record(trainer.model, "end_step", lambda updates: (len(updates),))
    trainer.create_optimizer().register_step_post_hook(lambda *args: events.append(("optimizer",)))
    return events


class AtEveryStep(TrainerCallback):
    """Calls a function when gradients are clipped and weights still old."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.look()


def state_of(trainer: SSLTrainer) -> dict[str, Tensor]:
    """Weights, queue, teacher and the optimizer's tensors."""
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    optimizer: Any = trainer.optimizer
    for index, entry in optimizer.state_dict()["state"].items():
        state |= {
            f"optimizer.{index}.{key}": value for key, value in entry.items() if isinstance(value, Tensor)
        }
    return state


def assert_equal_states(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


# The step


def test_order_of_two_accumulated_steps(make_trainer: MakeTrainer):
    trainer = make_trainer("mae", max_steps=2, gradient_accumulation_steps=2)
    events = spy_on(trainer)
    trainer.train()
    for step in range(2):
        assert events[7 * step : 7 * step + 7] == [
            ("get_batch_samples", 2),
            ("begin_step", step, 2),
            ("prepare_step", 2),
            ("forward", 0, 1, 2, 3),
            ("forward", 4, 5, 6, 7),
            ("optimizer",),
            ("end_step", 2),
        ]
    assert len(events) == 14


def test_rows_are_numbered_over_micro_batches_and_processes():
    batches = [{"pixel_values": torch.zeros(3, 1), "sample_id": torch.zeros(3)} for _ in range(2)]
    inputs = model_inputs(batches, rank=1, world_size=4)
    assert [batch["row_index"].tolist() for batch in inputs] == [[3, 4, 5], [15, 16, 17]]  # (j*4 + 1)*3 + i
    assert set(inputs[0]) == {"pixel_values", "row_index"}


def test_accumulated_batches_train_like_one_batch(make_trainer: MakeTrainer):
    """Weights, teacher and queue; plain SGD shows the scale of the gradient, which Adam would hide."""
    options = {"max_steps": 2, "optimizer": "sgd", "learning_rate": 0.1, "optimizer_momentum": 0.0}
    options["learning_rate_schedule"] = "constant"
    states = []
    for name, batch in (("one", 8), ("two", 4)):
        trainer = make_trainer(folder=name, global_batch_size=8, per_device_train_batch_size=batch, **options)
        assert trainer.args.gradient_accumulation_steps == 8 // batch
        trainer.get_train_dataloader = functools.partial(FixedBatches, 16, 2, batch)  # type: ignore
        before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.train()
        states.append(trainer.model.state_dict())
    assert not torch.equal(states[0]["student.head.layers.0.weight"], before["student.head.layers.0.weight"])
    assert int(states[1]["queue.position"]) == 16  # two steps of eight keys
    assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)


def test_bytes_become_what_the_processor_makes_of_them():
    processor = METHODS["mae"].processor_class.for_image_size(16)
    image = Image.open(io.BytesIO(random_image(0)))
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    pixels_CHW = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)
    )
    assert_close(
        normalize_bytes(pixels_CHW, processor.image_mean, processor.image_std), expected, rtol=0, atol=2e-6
    )


# Optimizer and schedules


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rates_and_decays_of_every_step(make_trainer: MakeTrainer, accumulation: int):
    """Mistake 25: schedules run by optimizer steps, not by epochs or micro-batches."""
    trainer = make_trainer(
        "mae",
        max_steps=6,
        warmup_steps=2,
        learning_rate=1.0e-3,
        weight_decay=0.1,
        weight_decay_end=0.3,
        gradient_accumulation_steps=accumulation,
    )
    rates: list[float] = []
    decays: list[list[float]] = []

    def look() -> None:
        groups = trainer.optimizer.param_groups  # type: ignore[union-attr]
        rates.append(groups[0]["lr"])
        decays.append([group["weight_decay"] for group in groups])

    trainer.add_callback(AtEveryStep(look))
    trainer.train()
    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx([0, 0.5e-3, *(1e-3 * factor for factor in cosine)])
    rising = [0.3 - 0.2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert [decay[0] for decay in decays] == pytest.approx(rising)
    assert [decay[1] for decay in decays] == [0] * 6  # norms and biases


def test_warmup_in_epochs_follows_from_the_length_of_the_data(make_trainer: MakeTrainer):
    trainer = make_trainer(max_steps=20, warmup_epochs=2)  # 20 images in batches of 4: 5 steps an epoch
    assert trainer.args.warmup_steps == 10
    trainer = make_trainer(max_steps=-1, num_train_epochs=3, warmup_epochs=1)
    assert trainer.args.max_steps == 15


def test_warmup_that_does_not_fit_is_refused_at_once(make_trainer: MakeTrainer):
    with pytest.raises(ValueError, match="warmup_steps 10 must be less than total_steps 4"):
        make_trainer(max_steps=4, warmup_epochs=2)


@pytest.mark.parametrize("mode", ["global", "per_tensor", "per_module"])
def test_clipping_bounds_what_its_mode_names(make_trainer: MakeTrainer, mode: str):
    trainer = make_trainer(max_steps=1, max_grad_norm=1e-3, clip_mode=mode)
    norms: list[Tensor] = []

    def look() -> None:
        parts = [list(trainer.model.student.parameters())]
        if mode == "per_tensor":
            parts = [[parameter] for parameter in parts[0]]
        elif mode == "per_module":
            parts = [list(part.parameters()) for part in trainer.model.student.children()]
        norms.append(
            torch.stack([torch.stack([p.grad.norm() for p in part]).norm() for part in parts])  # type: ignore
        )

    trainer.add_callback(AtEveryStep(look))
    trainer.train()
    assert norms[0].max() == pytest.approx(1e-3, rel=1e-2)
    assert len(norms[0]) == {"global": 1, "per_module": 2}.get(mode, len(norms[0]))


def test_held_parameters_are_skipped_by_the_optimizer_after_clipping(make_trainer: MakeTrainer):
    """Their gradient is gone when it steps, so neither decay nor moments; they train again once let go."""
    trainer = make_trainer(max_steps=3, weight_decay=0.5, optimizer="adamw", learning_rate=0.1)
    held = trainer.model.student.head.layers[0].weight
    start, seen = held.detach().clone(), []
    trainer.model.held_parameters = lambda: [held] if trainer.state.global_step < 2 else []  # type: ignore

    class Look(TrainerCallback):
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append(held.detach().equal(start))

    trainer.add_callback(Look())
    trainer.train()
    optimizer: Any = trainer.optimizer
    assert seen == [True, True, False] and held.requires_grad
    assert float(optimizer.state[held]["step"]) == 1


def test_optimizer_has_the_groups_of_the_model_and_no_teacher(make_trainer: MakeTrainer):
    trainer = make_trainer(weight_decay=0.1, optimizer="lars")
    trainer.model.requires_grad_(True)  # as from_pretrained leaves it
    decayed, plain = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0)
    assert (decayed["exclude_from_adaptation"], plain["exclude_from_adaptation"]) == (False, True)
    assert all(value.ndim > 1 for value in decayed["params"])
    ours = {id(value) for group in (decayed, plain) for value in group["params"]}
    expected = {id(value) for name, value in trainer.model.named_parameters() if value.requires_grad}
    teacher = {id(value) for name, value in trainer.model.named_parameters() if name.startswith("teacher.")}
    assert ours == expected and teacher and not ours & teacher


def test_bf16_on_a_cpu_takes_plain_attention(make_trainer: MakeTrainer):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator here")
    trainer = make_trainer("mae", bf16=True)
    trainer.train()
    assert trainer.model.config._attn_implementation == "eager"
    assert all(value.dtype == torch.float32 for value in trainer.model.parameters())


# Batches


def test_batch_of_one_is_refused_where_other_images_are_needed(make_trainer: MakeTrainer):
    for method, reason in (("simclr-vit", "negatives"), ("moco-v2-splits", "BatchNorm")):
        with pytest.raises(ValueError, match=reason):
            make_trainer(method, global_batch_size=2, per_device_train_batch_size=1)
    make_trainer("mae", per_device_train_batch_size=1)


def test_in_batch_negatives_under_accumulation_are_said_aloud(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
):
    make_trainer("simclr-vit", gradient_accumulation_steps=2)
    assert "4 images of negatives, not 8" in caplog.text


def test_mixture_follows_its_weights(make_trainer: MakeTrainer):
    sources = [make_source(30), make_source(30, first_seed=100)]
    trainer = make_trainer(sources=sources, weights=[3, 1])
    numbers = []
    for _, batch in zip(range(10), trainer.get_train_dataloader(), strict=False):
        numbers += (batch["sample_id"] >> 48).tolist()
    assert numbers.count(0) == pytest.approx(30, abs=2)


# Resume


@pytest.mark.parametrize(
    ("method", "num_workers", "accumulation"), [("moco-v2", 0, 2), ("moco-v2-splits", 2, 2), ("mae", 0, 1)]
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    make_trainer: MakeTrainer, method: str, num_workers: int, accumulation: int
):
    options = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 6,
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": num_workers,
        "logging_steps": 1,
        "weight_decay": 0.1,
        "weight_decay_end": 0.2,
    }
    whole = make_trainer(method, **options)
    whole.train()
    checkpoint = Path(str(whole.args.output_dir)) / "checkpoint-6"
    resumed = make_trainer(method, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal_states(state_of(resumed), state_of(whole))
    epochs = 8 * accumulation * 4 / 20
    assert resumed.state.epoch == whole.state.epoch == pytest.approx(epochs)
    assert resumed.state.log_history[:7] == whole.state.log_history[:7]  # step 7 is after the checkpoint
    assert resumed.state.log_history[6]["epoch"] == pytest.approx(7 * accumulation * 4 / 20)


def test_finished_run_is_not_trained_further(make_trainer: MakeTrainer):
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(**options)
    trainer.train()
    again = make_trainer(**options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert_equal_states(again.model.state_dict(), trainer.model.state_dict())


@pytest.mark.parametrize("lost", ["teacher.", "queue.keys"])
def test_checkpoint_without_teacher_or_queue_is_refused(make_trainer: MakeTrainer, lost: str):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    file = Path(str(trainer.args.output_dir)) / "checkpoint-2" / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.startswith(lost)}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks \d+ tensors of MoCoForPreTraining, e.g. '{lost}"):
        make_trainer().train(resume_from_checkpoint=str(file.parent))


def test_half_written_checkpoint_is_passed_over(make_trainer: MakeTrainer):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    run = Path(str(trainer.args.output_dir))
    (run / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed._resume_step == 2


def test_nothing_to_resume_is_one_line(make_trainer: MakeTrainer):
    with pytest.raises(CheckpointError, match="no checkpoint to resume from in"):
        make_trainer().train(resume_from_checkpoint=True)


@pytest.mark.parametrize("failing", ["torch.save", "safetensors"])
def test_full_disk_leaves_whole_checkpoints_only(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, failing: str
):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    run = Path(str(trainer.args.output_dir))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill_disk(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 3:
            target = "torch.save" if failing == "torch.save" else "transformers.modeling_utils.safe_save_file"
            monkeypatch.setattr(target, fail)

    trainer.add_callback(AtEveryStep(fill_disk))
    with pytest.raises(CheckpointError, match="cannot write checkpoint-4 .*No space left.*from checkpoint-2"):
        trainer.train()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]


# Evaluation


def labelled_rows(count: int) -> list[dict[str, Any]]:
    return [{"image": random_image(index), "label": index % 2} for index in range(count)]


def test_probing_leaves_training_as_it_was(make_trainer: MakeTrainer):
    """Weights, BatchNorm statistics, queue, optimizer and the global random state, bit for bit."""
    states = []
    for name, is_probed in (("without", False), ("with", True)):
        processor = METHODS["moco"].processor_class.for_image_size(16)
        probe = OnlineProbe(labelled_rows(8), labelled_rows(4), processor, num_neighbors=1)
        options = {"probe": probe, "eval_strategy": "steps", "eval_steps": 1} if is_probed else {}
        trainer = make_trainer("moco-v2-splits", folder=name, **options)
        if is_probed:
            probe.measure_floors(trainer.model)
        trainer.train()
        states.append(state_of(trainer) | {"random": torch.get_rng_state()})
    assert probe.scores is not None
    assert_equal_states(states[1], states[0])


def test_checkpoint_of_the_best_score_is_kept(make_trainer: MakeTrainer):
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.3, 0.3])
    trainer = make_trainer(
        probe=lambda model: {"knn": next(scores)},
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
    )
    trainer.train()
    run = Path(str(trainer.args.output_dir))
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    assert trainer.state.best_metric == 0.9 and trainer.state.best_global_step == 2


def test_without_a_probe_there_is_no_evaluation(make_trainer: MakeTrainer):
    trainer = make_trainer(eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert not any(key.startswith("eval") for entry in trainer.state.log_history for key in entry)


def test_floors_are_logged_beside_every_score(make_trainer: MakeTrainer):
    trainer = make_trainer(probe=lambda model: {"knn": 0.5}, eval_strategy="steps", eval_steps=4)
    trainer.floors = {"pixels_knn": 0.25}
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "eval_knn" in entry)
    assert (entry["eval_knn"], entry["eval_pixels_knn"]) == (0.5, 0.25)


# Divergence


def test_a_loss_that_is_no_number_stops_the_run(make_trainer: MakeTrainer):
    trainer = make_trainer(max_steps=6, save_strategy="steps", save_steps=2, logging_steps=6)
    original = trainer.model.forward

    @functools.wraps(original)
    def broken(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        if trainer.state.global_step == 3:
            outputs.loss = outputs.loss * math.inf
        return outputs

    trainer.model.forward = broken  # type: ignore[method-assign]
    with pytest.raises(
        TrainingDiverged, match="the loss is inf at step 4; lower learning_rate.*checkpoint-2"
    ):
        trainer.train()
    assert not any("loss" in entry for entry in trainer.state.log_history)
    run = Path(str(trainer.args.output_dir))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]


def test_broken_weights_are_not_saved(make_trainer: MakeTrainer):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    name, parameter = next(trainer.model.trainable_parameters())

    def break_weights() -> None:
        if trainer.state.global_step == 1:
            parameter.grad[0] = math.nan  # type: ignore[index]

    trainer.add_callback(AtEveryStep(break_weights))
    with pytest.raises(TrainingDiverged, match=f"'{name}' is not finite after step 2"):
        trainer.train()
    assert not list(Path(str(trainer.args.output_dir)).glob("checkpoint-*"))


def test_parts_of_the_loss_are_logged(make_trainer: MakeTrainer):
    trainer = make_trainer(logging_steps=2)
    trainer.train()
    parts = BY_NAME["moco-v2"].build()(pixel_values=BY_NAME["moco-v2"].images(4)).parts
    assert parts and set(parts) <= set(trainer.state.log_history[0])
