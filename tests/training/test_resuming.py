"""Resuming a trainer: torn checkpoints, the log, changed values, other processes, names, broken writes."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer

from hf_ssl.training.checkpoints import PARTIAL_FOLDER, CheckpointError
from hf_ssl.training.publishing import PublishingTrainer
from hf_ssl.training.trainer import SSLTrainer
from tests.distributed import run_processes
from tests.training.test_trainer import assert_equal_states, state_of

MakeTrainer = Callable[..., SSLTrainer]
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


def folder_of(trainer: SSLTrainer) -> Path:
    return Path(str(trainer.args.output_dir))


# Torn checkpoints


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "model.safetensors has 20,000 of"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    ],
)
def test_torn_checkpoint_costs_the_steps_since_the_one_before_and_no_bit(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, damage: Any, reason: str
):
    whole = make_trainer(**SAVES)
    whole.train()
    damage(folder_of(whole) / "checkpoint-4")
    resumed = make_trainer(**SAVES)
    resumed.train(resume_from_checkpoint=True)
    assert [message for message in caplog.messages if reason in message and "checkpoint-4" in message]
    assert_equal_states(state_of(resumed), state_of(whole))
    again = make_trainer(**SAVES)  # checkpoint-4 was written anew
    assert again.choose_checkpoint(True).name == "checkpoint-4"


@pytest.mark.parametrize("torn", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_torn_checkpoint_that_is_named_is_refused_in_one_line(make_trainer: MakeTrainer, torn: str):
    trainer = make_trainer(**SAVES)
    trainer.train()
    file = folder_of(trainer) / "checkpoint-4" / torn
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(
        CheckpointError, match=f"checkpoint-4.*{torn}.*(another|an earlier) checkpoint"
    ) as caught:
        make_trainer().train(resume_from_checkpoint=str(file.parent))
    assert "\n" not in str(caught.value)


def test_what_a_killed_write_left_is_removed_at_the_next_start(make_trainer: MakeTrainer):
    trainer = make_trainer(**SAVES)
    (folder_of(trainer) / PARTIAL_FOLDER / "checkpoint-2").mkdir(parents=True)
    trainer.train()
    assert {path.name for path in folder_of(trainer).iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_weights_without_optimizer_are_nothing_to_continue_from(make_trainer: MakeTrainer):
    make_trainer(**SAVES, save_only_model=True).train()
    with pytest.raises(CheckpointError, match=r"holds weights only \(save_only_model\)"):
        make_trainer(**SAVES).train(resume_from_checkpoint=True)


# What continues


@pytest.mark.parametrize("save_steps", [2, 3])
def test_log_entries_go_on_where_the_checkpoint_fell_into_one(make_trainer: MakeTrainer, save_steps: int):
    options = {"save_strategy": "steps", "max_steps": 8, "logging_steps": 4, "save_total_limit": 9}
    whole = make_trainer(**options, save_steps=save_steps)
    whole.train()
    for checkpoint in folder_of(whole).glob("checkpoint-*"):
        resumed = make_trainer(**options, save_steps=save_steps)
        if checkpoint.name == "checkpoint-8":
            continue
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.log_history[:2] == whole.state.log_history[:2]


def test_mean_loss_at_the_end_is_that_of_the_steps_done_since(make_trainer: MakeTrainer):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "logging_steps": 2}
    make_trainer(**options, folder="run").train()
    every = make_trainer(folder="other", max_steps=6, logging_steps=1)
    every.train()
    losses = [entry["loss"] for entry in every.state.log_history if "loss" in entry]
    resumed = make_trainer(**options, folder="run")
    result = resumed.train(resume_from_checkpoint=str(folder_of(resumed) / "checkpoint-3"))
    assert result.training_loss == pytest.approx(sum(losses[3:]) / 3, abs=1e-5)


def test_values_of_this_run_win_over_those_of_the_checkpoint(make_trainer: MakeTrainer):
    """LambdaLR and the optimizer would bring back the rate and the decay they were saved with."""
    make_trainer(**SAVES, learning_rate=0.1, weight_decay=0.5, max_steps=8).train()
    trainer = make_trainer(max_steps=8, learning_rate=0.02, weight_decay=0.25, adam_beta1=0.8)
    rates: list[float] = []
    original = trainer.start_step

    def look(step: int) -> None:
        groups: Any = trainer.optimizer
        rates.append(groups.param_groups[0]["lr"])
        original(step)

    trainer.start_step = look  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=str(folder_of(trainer) / "checkpoint-6"))
    factors = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) for step in (6, 7)]
    assert rates == pytest.approx([0.02 * factor for factor in factors], rel=1e-5)
    groups: Any = trainer.optimizer
    assert [group["weight_decay"] for group in groups.param_groups] == [0.25, 0]
    assert groups.param_groups[0]["betas"] == (0.8, 0.999)


# What must be the same


def test_another_global_batch_or_optimizer_or_shape_is_refused_in_one_line(make_trainer: MakeTrainer):
    make_trainer(**SAVES, global_batch_size=4).train()
    for options, message in (
        ({"global_batch_size": 8}, "global_batch_size 4, this run has 8.*give global_batch_size 4"),
        ({"optimizer": "sgd"}, "optimizer adamw, this run has sgd.*give optimizer adamw"),
        ({"method": "moco-v1"}, r"lacks|is \("),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            make_trainer(**options).train(resume_from_checkpoint=True)
        assert "\n" not in str(caught.value)


def test_another_cut_of_the_same_batch_continues_and_says_that_it_is_inexact(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
):
    make_trainer(**SAVES, global_batch_size=8, per_device_train_batch_size=8).train()
    options = {"max_steps": 5, "global_batch_size": 8, "per_device_train_batch_size": 2}
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._resume_step == 4 and resumed.state.global_step == 5
    assert resumed.state.epoch == pytest.approx(5 * 8 / 20)  # 20 images: 10 micro-batches of 2
    (message,) = [message for message in caplog.messages if "no longer bit for bit" in message]
    assert "8 per device x 1 processes x 1 accumulated, with 2 per device x 1 processes x 4" in message
    assert "from image 32 on" in message


def train_on(folder: str, max_steps: int, resume: bool) -> dict[str, Any]:
    """A run of 8 images a step, on as many processes as there are."""
    if "RANK" in os.environ:
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
    from hf_ssl.modeling import METHODS
    from hf_ssl.training.arguments import SSLTrainingArguments
    from hf_ssl.training.trainer import SSLTrainer
    from tests.modeling.tiny import BY_NAME
    from tests.training.conftest import make_source

    row = BY_NAME["moco-v2"]
    args = SSLTrainingArguments(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=4,
        global_batch_size=8,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
    )
    trainer = SSLTrainer(
        model=row.build(),
        args=args,
        train_dataset=make_source(40),
        processing_class=METHODS["moco"].processor_class.for_image_size(16),
    )
    seen: list[int] = []
    original = Trainer.get_batch_samples

    def recorded(self: Any, iterator: Any, count: int, device: Any) -> Any:
        batches, items = original(self, iterator, count, device)
        seen.extend(int(number) for batch in batches for number in batch["sample_id"])
        return batches, items

    Trainer.get_batch_samples = recorded  # type: ignore[method-assign]
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    finally:
        Trainer.get_batch_samples = original  # type: ignore[method-assign]
    return {"epoch": trainer.state.epoch, "step": trainer._resume_step, "seen": seen}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_continues_at_the_same_image(tmp_path: Path, before: int, after: int):
    """40 images, 5 steps an epoch; what comes after the epoch of the resume is whole epochs again."""
    folder = str(tmp_path / "run")
    for processes, max_steps, resume in ((before, 4, False), (after, 10, True)):
        arguments = (train_on, folder, max_steps, resume)
        results = run_processes(*arguments) if processes == 2 else [train_on(folder, max_steps, resume)]
    assert {result["step"] for result in results} == {4}
    assert [result["epoch"] for result in results] == [2.0] * after
    first_step = [number for result in results for number in result["seen"][: 8 // after]]
    second_epoch = [number for result in results for number in result["seen"][8 // after :]]
    assert len(set(first_step)) == 8
    assert sorted(second_epoch) == list(range(40))
    last = tmp_path / "run" / "checkpoint-10"
    names = {"rng_state.pth"} if after == 1 else {"rng_state_0.pth", "rng_state_1.pth"}
    assert {path.name for path in last.glob("rng*")} == names


# Writing


def test_state_names_the_best_checkpoint_by_its_final_name(make_trainer: MakeTrainer):
    scores = iter([0.1, 0.9, 0.2, 0.3])
    trainer = make_trainer(
        probe=lambda model: {"knn": next(scores)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    run = folder_of(trainer)
    for step in (2, 4):
        state = json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(run / "checkpoint-2")
        assert (state["best_metric"], state["best_global_step"]) == (0.9, 2)


def test_best_checkpoint_is_kept_by_a_resumed_run_whose_folder_was_moved(make_trainer: MakeTrainer):
    def options(scores: list[float]) -> dict[str, Any]:
        values = iter(scores)
        return {
            "probe": lambda model: {"knn": next(values)},
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_total_limit": 2,
            **SAVES,
        }

    first = make_trainer(**options([0.1, 0.9, 0.2, 0.3]), max_steps=4)
    first.train()
    shutil.move(folder_of(first), folder_of(first).with_name("moved"))
    second = make_trainer(**options([0.4] * 4), folder="moved", max_steps=8)
    second.train(resume_from_checkpoint=True)
    run = folder_of(second)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-8"}
    assert second.state.best_model_checkpoint == str(run / "checkpoint-2")


def test_checkpoint_is_pushed_when_it_has_its_name(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
):
    pushed: list[tuple[str, bool]] = []

    def push(self: Any, folder: str) -> None:
        pushed.append((folder, (Path(folder) / "checkpoint.json").is_file()))

    monkeypatch.setattr(PublishingTrainer, "_push_from_checkpoint", push)
    trainer = make_trainer(**SAVES)
    trainer.args.push_to_hub = True
    trainer.train()
    run = folder_of(trainer)
    assert pushed == [(str(run / "checkpoint-2"), True), (str(run / "checkpoint-4"), True)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("place", ["save_model", "_save_rng_state", "os.fsync"])
def test_write_that_is_broken_off_leaves_the_checkpoints_before(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, error: BaseException, place: str
):
    trainer = make_trainer(**SAVES)
    owner, name = (os, "fsync") if place == "os.fsync" else (trainer, place)
    original = getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 4:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        trainer.train()
    assert {path.name for path in folder_of(trainer).iterdir()} == {"checkpoint-2"}
    monkeypatch.undo()
    whole, resumed = make_trainer(folder="whole"), make_trainer(**SAVES)
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert_close(state_of(resumed), state_of(whole), rtol=0, atol=0)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names open files by Linux's /proc")
def test_every_checkpoint_is_flushed_before_it_has_its_name(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
):
    flushed: set[str] = set()
    fsync, rename = os.fsync, Path.rename

    def record(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def check(self: Path, target: Any) -> Any:
        if self.parent.name == PARTIAL_FOLDER:
            assert {str(path) for path in (self, *self.iterdir())} <= flushed
            renamed.append(Path(target).name)
        return rename(self, target)

    renamed: list[str] = []
    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", check)
    make_trainer(**SAVES).train()
    assert renamed == ["checkpoint-2", "checkpoint-4"]


def test_nothing_is_said_of_a_resume_that_is_exact(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
):
    make_trainer(**SAVES).train()
    with caplog.at_level(logging.WARNING, "hf_ssl"):
        make_trainer(max_steps=6).train(resume_from_checkpoint=True)
    assert caplog.messages == []
