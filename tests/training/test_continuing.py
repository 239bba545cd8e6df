"""Going on with a trained encoder: heads first, a guard over its score, and LoRA."""

import builtins
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_ssl.hub import export_encoder
from hf_ssl.modeling import METHODS
from hf_ssl.training.continuing import KnnGuard
from hf_ssl.training.recipes import RecipeError, load_recipe
from hf_ssl.training.run import train
from hf_ssl.training.trainer import SSLTrainer
from tests.modeling.tiny import BY_NAME
from tests.training.test_trainer import assert_equal_states, state_of

MakeTrainer = Callable[..., SSLTrainer]
ROWS = [
    "simclr-cnn",
    "moco-v2",
    "mocov3-vit",
    "mae",
    "dino-vit",
    "dino-cnn",
    "ibot",
    "dinov2",
    "ijepa",
]


def copy_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], module: Any) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


# Heads first


@pytest.mark.parametrize("method", ROWS)
def test_the_backbone_stands_still_until_the_heads_have_warmed_up(make_trainer: MakeTrainer, method: str):
    trainer = make_trainer(method, head_warmup_steps=2, max_grad_norm=1.0, learning_rate=1e-2)
    model: Any = trainer.model
    before = copy_of(model.student.backbone)
    teacher = copy_of(model.teacher.backbone) if model.has_teacher else {}
    heads = {name: value.detach().clone() for name, value in model.student.named_parameters()}
    seen: list[set[str]] = []
    finish = trainer.finish_step

    def look(step: int) -> None:
        seen.append(moved(before, model.student.backbone) - {"embeddings.mask_token"})
        finish(step)
        if step < 2 and model.has_teacher:
            kept = {name for name in moved(teacher, model.teacher.backbone) if "mask_token" not in name}
            assert not kept
            assert not model.teacher.backbone.training

    trainer.finish_step = look  # type: ignore[method-assign]
    trainer.train()
    assert seen[:2] == [set(), set()]  # with BatchNorm's statistics
    assert seen[2] or seen[3]
    outside = [name for name, value in model.student.named_parameters() if not name.startswith("backbone.")]
    changed = [name for name in outside if not torch.equal(heads[name], model.student.state_dict()[name])]
    assert changed or not outside


def test_the_gradients_of_a_held_backbone_are_not_clipped_with_the_heads(make_trainer: MakeTrainer):
    trainer = make_trainer("simclr-vit", head_warmup_steps=2, max_grad_norm=1.0)
    clip = trainer._clip_grad_norm

    def look(model: Any) -> Any:
        norm = clip(model)
        has_gradient = any(value.grad is not None for value in trainer.model.student.backbone.parameters())
        assert has_gradient == (trainer.state.global_step >= 2)
        return norm

    trainer._clip_grad_norm = look  # type: ignore[method-assign]
    trainer.train()


def test_a_run_resumed_within_its_warm_up_goes_on_bit_for_bit(make_trainer: MakeTrainer):
    options: dict[str, Any] = {"head_warmup_steps": 3, "max_steps": 5, "save_steps": 2}
    options |= {"save_strategy": "steps", "save_total_limit": 9}
    whole = make_trainer("dinov2", **options)
    whole.train()
    resumed = make_trainer("dinov2", **options)
    resumed.train(resume_from_checkpoint=str(Path(str(resumed.args.output_dir)) / "checkpoint-2"))
    assert_equal_states(state_of(resumed), state_of(whole))


def test_a_warm_up_as_long_as_the_run_is_refused(make_trainer: MakeTrainer):
    with pytest.raises(ValueError, match="head_warmup_steps 4 is no less than max_steps 4"):
        make_trainer(head_warmup_steps=4)
    with pytest.raises(ValueError, match="head_warmup_steps must be at least 0"):
        make_trainer(head_warmup_steps=-1)


def test_by_default_only_fresh_heads_on_a_trained_encoder_warm_up(make_trainer: MakeTrainer):
    assert make_trainer(max_steps=40).head_warmup_steps == 0
    assert make_trainer(max_steps=40, head_warmup_steps=0.5).head_warmup_steps == 20


# The guard


class Falling:
    """A probe with given scores; the first is that of the start."""

    def __init__(self, *scores: float) -> None:
        self.scores = iter(scores)

    def __call__(self, model: Any) -> dict[str, float]:
        return {"knn": next(self.scores)}


WATCHED: dict[str, Any] = {
    "max_knn_drop": 0.05, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
    "save_steps": 100, "save_total_limit": 9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "stops_at", "back_to"),
    [
        ((0.5, 0.46, 0.44, 0.5), 2, "the encoder it started from"),
        ((0.5, 0.52, 0.40, 0.52), 2, "checkpoint-1 with 52.0%"),
        ((0.5, 0.46, 0.47, 0.455, 0.46), 4, None),
    ],
)
def test_a_score_that_falls_too_far_brings_the_best_encoder_back(
    make_trainer: MakeTrainer, caplog: Any, scores: tuple[float, ...], stops_at: int, back_to: str | None
):
    trainer = make_trainer(probe=Falling(*scores), learning_rate=1e-2, **WATCHED)
    start = copy_of(trainer.model)
    trainer.train()
    assert trainer.state.global_step == stops_at
    stopped = [message for message in caplog.messages if message.startswith("stopped at step")]
    if back_to is None:
        assert not stopped
        return
    assert len(stopped) == 1 and back_to in stopped[0] and "\n" not in stopped[0]
    assert f"the kNN score is {100 * scores[2]:.1f}% and was 50.0% at the start" in stopped[0]
    expected = start
    if back_to.startswith("checkpoint"):
        expected = load_file(Path(str(trainer.args.output_dir)) / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    scored = [entry["eval_knn"] for entry in trainer.state.log_history if "eval_knn" in entry]
    assert scored[-1] == scores[3]  # of what is left


def test_a_resumed_run_is_measured_against_the_start_of_all(make_trainer: MakeTrainer):
    first = make_trainer(probe=Falling(0.5, 0.5, 0.5, 0.5, 0.5), **{**WATCHED, "save_steps": 2})
    start = copy_of(first.model)
    first.train()
    second = make_trainer(probe=Falling(0.5, 0.4, 0.5), **{**WATCHED, "save_steps": 2})
    scored: list[bool] = []
    probe = second.probe
    assert probe is not None

    def look(model: Any) -> dict[str, float]:
        scored.append(not moved(start, model))
        return probe(model)

    second.probe = look
    second.train(resume_from_checkpoint=str(Path(str(first.args.output_dir)) / "checkpoint-2"))
    assert scored == [True, False, False]  # the third: the best one, brought back
    assert second.state.global_step == 3


def test_a_guard_without_anything_to_watch_is_refused(make_trainer: MakeTrainer):
    with pytest.raises(ValueError, match="max_knn_drop needs a probe with labelled images"):
        make_trainer(max_knn_drop=0.1)
    with pytest.raises(ValueError, match="give eval_strategy steps"):
        make_trainer(max_knn_drop=0.1, probe=Falling(), eval_strategy="no")


def test_by_default_only_fresh_heads_on_a_trained_encoder_are_watched(make_trainer: MakeTrainer):
    trainer = make_trainer(probe=Falling(), eval_strategy="steps", eval_steps=1)
    assert not [call for call in trainer.callback_handler.callbacks if isinstance(call, KnnGuard)]


# A whole run, with LoRA


def small_run(folder: Path, image_folder: Path, method: str = "dinov2", **options: Any) -> Any:
    shared: dict[str, Any] = {
        "dataset": str(image_folder), "split": None, "probe_dataset": None, "probe_splits": None,
        "probe_config_names": None, "probe_label_column": None, "max_steps": 4, "warmup_steps": 0,
        "global_batch_size": 4, "save_steps": 2, "bf16": False, "learning_rate": 1e-2,
    }  # fmt: skip
    return train(method, output_dir=str(folder), **shared, **options)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A native ViT."""
    row = BY_NAME["mocov3-vit"]
    row.build(seed=5).save_pretrained(tmp_path / "source")
    METHODS["mocov3"].processor_class.for_image_size(16).save_pretrained(tmp_path / "source")
    export_encoder(tmp_path / "source", tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize("method", ["dinov2", "simclr"])
def test_lora_leaves_a_plain_model_whose_attention_alone_has_moved(
    encoder: Path, image_folder: Path, tmp_path: Path, method: str
):
    run = small_run(tmp_path / "run", image_folder, method, init_from=str(encoder), lora_rank=2)
    model = METHODS[method].pretraining_class.from_pretrained(run.folder)
    native, start = AutoModel.from_pretrained(run.folder / "encoder"), AutoModel.from_pretrained(encoder)
    changed = moved(copy_of(start), native)
    assert {".".join(name.rsplit(".", 2)[-2:]) for name in changed} == {
        f"{part}_proj.weight" for part in "qkvo"
    }
    pixels = torch.rand(2, 3, 16, 16)
    expected = run.trainer.model.eval().published_branch().backbone(pixels).last_hidden_state
    for found in (native.eval(), model.eval().published_branch().backbone):
        torch.testing.assert_close(found(pixels).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_a_run_with_lora_resumes_bit_for_bit(encoder: Path, image_folder: Path, tmp_path: Path):
    whole = small_run(tmp_path / "run", image_folder, init_from=str(encoder), lora_rank=2)
    expected = state_of(whole.trainer)
    merged = load_file(whole.folder / "model.safetensors")
    checkpoint = whole.folder / "checkpoint-2"
    # A checkpoint is a model as any other, its adapters merged.
    METHODS["dinov2"].pretraining_class.from_pretrained(checkpoint)
    report = export_encoder(checkpoint, tmp_path / "halfway")
    assert report.max_abs_difference < 1e-5
    start, halfway = (AutoModel.from_pretrained(folder) for folder in (encoder, tmp_path / "halfway"))
    assert moved(copy_of(start), halfway)
    resumed = train(resume=str(checkpoint))
    assert_equal_states(state_of(resumed.trainer), expected)
    assert all(torch.equal(value, merged[name]) for name, value in load_file(
        resumed.folder / "model.safetensors").items())  # fmt: skip


def test_the_teacher_s_adapters_follow_the_student_s(make_trainer: MakeTrainer):
    trainer = make_trainer("dinov2", lora_rank=2, learning_rate=1e-1)
    model: Any = trainer.model
    trained = {name for name, _ in model.trainable_parameters() if name.startswith("student.backbone.")}
    assert trained and all("lora_" in name or name.endswith("mask_token") for name in trained)
    trainer.train()
    name = "layers.0.attention.q_proj.lora_B.default.weight"
    student, teacher = (branch.backbone.state_dict()[name] for branch in (model.student, model.teacher))
    assert teacher.abs().sum() > 0 and not torch.equal(student, teacher)
    base = "layers.0.attention.q_proj.base_layer.weight"
    assert torch.equal(model.student.backbone.state_dict()[base], model.teacher.backbone.state_dict()[base])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("simclr-cnn", {"lora_rank": 2}, "needs a ViT backbone"),
        ("simclr-vit", {"lora_rank": 0}, "lora_rank must be at least 1"),
    ],
)
def test_lora_where_it_cannot_be_is_refused(
    make_trainer: MakeTrainer, method: str, options: Any, message: str
):
    with pytest.raises(ValueError, match=message):
        make_trainer(method, **options)


def test_lora_without_peft_says_how_to_get_it(make_trainer: MakeTrainer, monkeypatch: Any):
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"lora_rank needs peft: pip install 'hf-ssl\[lora\]'"):
        make_trainer("simclr-vit", lora_rank=2)


def test_lora_on_fresh_weights_is_refused(image_folder: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="lora_rank needs trained weights"):
        small_run(tmp_path / "run", image_folder, lora_rank=2)


def test_a_run_from_an_encoder_says_so_and_warms_its_heads_up(
    encoder: Path, image_folder: Path, tmp_path: Path, caplog: Any
):
    caplog.set_level(logging.INFO, "hf_ssl")
    run = small_run(tmp_path / "run", image_folder, init_from=str(encoder), logging_steps=1)
    assert "backbone  as" in caplog.text and "features equal to" in caplog.text
    assert run.trainer.head_warmup_steps == 0  # a tenth of four steps
    assert load_recipe(str(run.folder / "recipe.yaml")).config().backbone_config.hidden_size == 16


# A smaller student of a frozen teacher


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A trained DINOv2 with its heads."""
    row = BY_NAME["dinov2"]
    model = row.build(seed=9, backbone_config={"hidden_size": 24, "num_hidden_layers": 3})
    model.save_pretrained(tmp_path / "large")
    METHODS["dinov2"].processor_class.for_image_size(16).save_pretrained(tmp_path / "large")
    return tmp_path / "large"


SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "head_hidden_size": 16, "head_bottleneck_size": 8,
}  # fmt: skip


def test_a_small_student_learns_from_a_frozen_run_and_lands_alone(
    large: Path, image_folder: Path, tmp_path: Path
):
    run = small_run(tmp_path / "run", image_folder, distill_from=str(large), **SMALL)
    there = load_file(large / "model.safetensors")
    model = METHODS["dinov2"].pretraining_class.from_pretrained(run.folder)
    for name, value in model.distiller.state_dict().items():
        assert torch.equal(value, there[f"teacher.{name}"]), name
    assert AutoModel.from_pretrained(run.folder / "encoder").config.hidden_size == 16
    assert model.config.num_prototypes == 24 and model.config.backbone_config.drop_path_rate == 0
    assert load_recipe(str(run.folder / "recipe.yaml")).distill_from == str(large)
    expected = state_of(run.trainer)
    resumed = train(resume=str(run.folder / "checkpoint-2"))
    assert_equal_states(state_of(resumed.trainer), expected)
    went_on = small_run(tmp_path / "second", image_folder, init_from=str(run.folder))
    assert went_on.trainer.model.distiller is not None


def test_what_has_no_heads_teaches_nobody(encoder: Path, large: Path, image_folder: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="cannot distill from .* without the heads of dinov2"):
        small_run(tmp_path / "run", image_folder, distill_from=str(encoder))
    with pytest.raises(RecipeError, match="is for beit_tokenizer, dinov2; simclr has no frozen teacher"):
        small_run(tmp_path / "run", image_folder, "simclr", distill_from=str(large))
