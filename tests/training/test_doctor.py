"""The doctor: fires on runs broken on purpose, is silent on healthy ones, says what to change."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForPreTraining

from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared import joint_embedding
from hf_ssl.modeling.shared.centering import PrototypeCenter
from hf_ssl.modeling.shared.codebook import Codebook
from hf_ssl.modeling.shared.teacher import relative_distance
from hf_ssl.training.doctor import PATIENCE, RULES, Case, Diagnosis, Doctor, diagnose
from hf_ssl.training.recipes import RecipeError
from hf_ssl.training.run import Run, train
from tests.conftest import ROOT
from tests.modeling.tiny import BY_NAME

LOG_K = math.log(64)
STEPS = 130
# Small models on the built-in emoji, a step in hundredths of a second.
SHORT: dict[str, Any] = {
    "max_steps": STEPS, "logging_steps": 10, "save_steps": STEPS, "eval_steps": STEPS,
    "global_batch_size": 32, "per_device_train_batch_size": 32, "bf16": False, "probe_limit": 60,
}  # fmt: skip
DINO: dict[str, Any] = {
    "num_prototypes": 64, "head_hidden_size": 64,
    "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
}  # fmt: skip
VIT: dict[str, Any] = {"patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

PATCHES = {"num_prototypes": 64, "head_hidden_size": 64, **VIT}
TOKENS = {**VIT, "num_codes": 64, "code_size": 8}


def entry(step: int, **values: float) -> dict[str, float]:
    """What a healthy run logs at a step, but for `values`."""
    healthy = {
        "loss": 3.5, "learning_rate": 1e-3, "target_entropy": 2.5, "mean_target_entropy": 3.8,
        "divergence": 0.6, "prototypes_in_use": 30.0, "center_norm": 0.8, "teacher_distance": 0.02,
        "patch_target_entropy": 2.5, "patch_mean_target_entropy": 3.8, "patch_divergence": 0.6,
        "patch_prototypes_in_use": 30.0, "loss_of_mean": 3.9, "token_entropy": 3.8, "perplexity": 45.0,
        "accuracy": 0.1, "target_std": 0.8, "positive_cosine": 0.5, "negative_cosine": 0.1,
    }  # fmt: skip
    return {"step": step, **healthy, **values}


def doctor(**fields: Any) -> Doctor:
    config = METHODS["dino"].config_class(num_prototypes=64, **fields)
    config.num_codes = 64

    class Arguments:
        learning_rate = 1e-3
        max_steps = 100

    names = ("uniform_entropy", "most_information", "patch_uniform_entropy", "patch_most_information")
    expectations = dict.fromkeys(names, LOG_K)
    return Doctor(Case(config, Arguments(), expectations))


DINO_RULES = ["one prototype", "uniform targets", "teacher = student", "runaway centre"]
PATCH_RULES = ["one prototype for patches", "uniform targets of patches"]
SIGNS = {
    "one prototype": {"mean_target_entropy": 0.1, "target_entropy": 0.1, "prototypes_in_use": 1.0},
    "uniform targets": {"mean_target_entropy": LOG_K, "target_entropy": LOG_K, "divergence": 0.0},
    "one prototype for patches": {
        "patch_mean_target_entropy": 0.1,
        "patch_target_entropy": 0.1,
        "patch_prototypes_in_use": 1.0,
    },
    "uniform targets of patches": {
        "patch_mean_target_entropy": LOG_K,
        "patch_target_entropy": LOG_K,
        "patch_divergence": 0.0,
    },
    "teacher = student": {"teacher_distance": 0.0},
    "runaway centre": {"center_norm": 7.9},
    "constant guess": {"loss_of_mean": 3.4},
    "frequent tokens": {"token_entropy": 3.4},
    "few tokens": {"token_entropy": 0.5, "perplexity": 1.6, "loss": 0.4},
    "collapsed targets": {"target_std": 0.01},
    "unmatched pairs": {"positive_cosine": 0.31, "negative_cosine": 0.3},
}


def test_every_rule_has_a_sign_in_these_tests():
    assert SIGNS.keys() == RULES.keys()


def test_every_rule_has_an_entry_in_the_docs():
    lines = (ROOT / "docs" / "alarms.md").read_text(encoding="utf-8").splitlines()
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == list(RULES)


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_that_lasts_is_an_alarm_once(name: str):
    reader = doctor()
    history = [entry(step, **(SIGNS[name] if step >= 50 else {})) for step in range(10, 500, 10)]
    (alarm,) = reader.read_all(history)
    assert (alarm.name, alarm.since, alarm.step) == (name, 50, 50 + PATIENCE)
    assert "\n" not in str(alarm)


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_that_goes_again_is_none(name: str):
    history = [entry(step, **(SIGNS[name] if step % 100 else {})) for step in range(10, 500, 10)]
    assert not doctor().read_all(history)


def test_evaluations_and_other_methods_entries_are_passed_over():
    history: list[dict[str, float]] = [{"step": step, "eval_knn": 0.1} for step in range(0, 500, 10)]
    history += [{"step": step, "loss": 5.0, "learning_rate": 1e-3} for step in range(0, 500, 10)]
    reader = doctor()
    assert not reader.read_all(history) and not reader.judged


def test_a_rule_has_judged_only_after_its_patience():
    reader = doctor()
    reader.read_all(entry(step) for step in range(10, 10 + PATIENCE, 10))
    assert not reader.judged
    reader.read(entry(10 + PATIENCE))
    assert reader.judged == RULES.keys()


@pytest.mark.parametrize("row", BY_NAME.values(), ids=BY_NAME)
def test_expectations_need_no_weights(row):
    config = row.build().config
    with torch.device("meta"):
        model = AutoModelForPreTraining.from_config(config)
    assert model.expectations(4) == row.build().expectations(4)


@pytest.mark.parametrize(
    ("name", "fields", "advice"),
    [
        ("one prototype", {"center_momentum": 1.0}, "lower center_momentum (now 1) to 0.9"),
        ("one prototype", {}, "set normalize_head to true"),
        ("one prototype", {"normalize_head": True}, "raise teacher_temperature (now 0.04)"),
        ("uniform targets", {}, "set normalize_head to true"),
        ("uniform targets", {"normalize_head": True}, "lower teacher_temperature (now 0.04)"),
        ("one prototype for patches", {"normalize_head": True}, "raise teacher_temperature (now 0.04)"),
        ("uniform targets of patches", {}, "set normalize_head to true"),
        ("teacher = student", {"teacher_momentum": 0.0}, "raise teacher_momentum (now 0) to 0.99"),
        ("teacher = student", {}, "raise learning_rate (now 0.001)"),
        ("runaway centre", {"train_prototype_scale": True}, "set train_prototype_scale to false"),
        ("runaway centre", {}, "lower learning_rate (now 0.001)"),
        ("cosines above 1", {}, "look at what moves it"),
    ],
)
def test_advice_names_one_value(name: str, fields: dict[str, Any], advice: str):
    sign = SIGNS.get(name, {"center_norm": 8.1})
    (alarm,) = doctor(**fields).read_all(entry(step, **sign) for step in range(0, 200, 10))
    assert alarm.text.endswith(advice)


def test_a_rate_of_zero_does_not_blame_the_teacher():
    history = [entry(step, teacher_distance=0.0, learning_rate=0.0) for step in range(0, 500, 10)]
    assert not doctor().read_all(history)


def test_distance_is_that_of_all_parameters():
    model = BY_NAME["dino-vit"].build()
    assert relative_distance(model.teacher, model.student) == 0
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.mul_(1.25)
    assert relative_distance(model.teacher, model.student) == pytest.approx(0.25)


# Whole runs


def short(folder: Path, method: str = "dino", **options: Any) -> Run:
    return train(method, output_dir=str(folder), **{**SHORT, **(DINO if method == "dino" else {}), **options})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that has learned a little."""
    return str(short(tmp_path_factory.mktemp("tokenizer") / "run", "beit_tokenizer", **TOKENS).folder)


def test_a_healthy_run_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = short(tmp_path / "run")
    assert "alarm" not in caplog.text
    assert diagnose(str(run.folder)) == Diagnosis([], DINO_RULES)
    logged = [found for found in run.trainer.state.log_history if "loss" in found]
    assert all(found["effective_rank"] > 1 and found["teacher_distance"] > 0 for found in logged)


def test_a_healthy_run_with_patches_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = short(tmp_path / "run", "ibot", **PATCHES)
    assert "alarm" not in caplog.text
    assert diagnose(str(run.folder)) == Diagnosis(
        [], sorted([*DINO_RULES, *PATCH_RULES], key=list(RULES).index)
    )


@pytest.mark.slow
def test_healthy_runs_without_prototypes_are_silent(
    tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    runs = [Path(tokenizer)]
    runs.append(short(tmp_path / "mae", "mae", **VIT, learning_rate=3e-3).folder)
    runs.append(short(tmp_path / "beit", "beit", **VIT, tokenizer=tokenizer, learning_rate=3e-3).folder)
    runs.append(short(tmp_path / "clip", "clip").folder)
    assert "alarm" not in caplog.text
    looked_for = [diagnose(str(run)) for run in runs]
    assert not any(diagnosis.alarms for diagnosis in looked_for)
    assert [diagnosis.judged for diagnosis in looked_for] == [
        ["constant guess", "few tokens"], ["constant guess"], ["frequent tokens", "few tokens"],
        ["unmatched pairs"],
    ]  # fmt: skip


BROKEN: dict[str, dict[str, Any]] = {
    "one prototype": {"center_momentum": 1.0, "normalize_head": False, "koleo_weight": 0.0},
    "uniform targets": {"normalize_head": False, "teacher_temperature": 0.09, "koleo_weight": 0.0},
    "one prototype for patches": {
        **PATCHES,
        "normalize_head": False,
        "center_momentum": 1.0,
        "koleo_weight": 0.0,
    },
    "uniform targets of patches": {
        **PATCHES,
        "normalize_head": False,
        "teacher_temperature": 0.09,
        "patch_teacher_temperature": 0.09,
        "koleo_weight": 0.0,
    },
    "teacher = student": {"teacher_momentum": 0.0, "teacher_momentum_end": 0.0},
    "runaway centre": {},  # sums up, see below
    "constant guess": {**VIT, "learning_rate": 1e-9, "max_steps": 220},
    "frequent tokens": {**VIT, "learning_rate": 1e-9, "max_steps": 220},
    "few tokens": TOKENS,  # one for all, see below
    "collapsed targets": VIT,  # a teacher that shrinks, see below
    "unmatched pairs": {"learning_rate": 1e-9, "max_steps": 220},
}
METHOD_OF = {
    "one prototype for patches": "ibot", "uniform targets of patches": "ibot", "constant guess": "mae",
    "frequent tokens": "beit", "few tokens": "beit_tokenizer", "collapsed targets": "ijepa",
    "unmatched pairs": "clip",
}  # fmt: skip


def shrink(teacher: torch.nn.Module, student: torch.nn.Module, momentum: float) -> None:
    for parameter in teacher.parameters():
        parameter.mul_(0.5)


def test_every_rule_has_a_broken_run():
    assert BROKEN.keys() == RULES.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in METHOD_OF else ()) for name in BROKEN]
)
def test_a_broken_run_is_told_while_it_goes_on_and_afterwards(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    if name == "runaway centre":
        monkeypatch.setattr(PrototypeCenter, "update", lambda self, mean, momentum: self.value.add_(mean))
    if name == "few tokens":
        monkeypatch.setattr(
            Codebook, "nearest", lambda self, vectors: torch.zeros(len(vectors), dtype=torch.long)
        )
    if name == "collapsed targets":
        monkeypatch.setattr(joint_embedding, "update_teacher", shrink)
    method = METHOD_OF.get(name, "dino")
    options = {"tokenizer": request.getfixturevalue("tokenizer")} if method == "beit" else {}
    run = short(tmp_path / "run", method, **BROKEN[name], **options)
    assert name in [alarm.name for alarm in diagnose(str(run.folder)).alarms]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text for text in warnings if text.startswith(f"alarm     {name} since step ")]


def test_temperatures_in_the_wrong_order_never_start(tmp_path: Path):
    with pytest.raises(
        RecipeError, match=r"teacher's temperature 0\.2 must be below student_temperature 0\.1"
    ):
        short(tmp_path / "run", teacher_temperature=0.2)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_is_not_told_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = short(tmp_path / "run", **BROKEN["teacher = student"], max_steps=120, save_steps=120)
    assert caplog.text.count("alarm     teacher = student") == 1
    train(resume=str(run.folder), max_steps=140)
    assert caplog.text.count("alarm     teacher = student") == 1


def test_a_run_without_a_log_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"is no run: it has no recipe\.yaml"):
        diagnose(str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(json.dumps({"method": "dino"}))
    with pytest.raises(RecipeError, match="has no log yet"):
        diagnose(str(tmp_path))
