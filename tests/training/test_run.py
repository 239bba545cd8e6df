"""Runs from Python: on a folder of images, without labels, from an encoder; what a failed one leaves."""

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from hf_ssl.data.sources import DataError
from hf_ssl.training.checkpoints import CheckpointError
from hf_ssl.training.probe_data import probe_sources
from hf_ssl.training.recipes import DataArguments, RecipeError, load_recipe
from hf_ssl.training.run import Run, build_trainer, train
from tests.training.conftest import random_image

TINY: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "global_batch_size": 4,
    "max_steps": 2,
    "warmup_steps": 0,
    "save_steps": 2,
    "eval_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "probe_dataset": None,
    "probe_splits": None,
    "probe_config_names": None,
    "probe_label_column": None,
    "split": None,
}


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Two classes of ten images."""
    root = tmp_path / "classes"
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for index in range(10):
            (root / name / f"{index}.png").write_bytes(random_image(100 * label + index))
    return root


def mae(folder: Path, output: Path, **options: Any) -> Run:
    return train("mae", output_dir=str(output), dataset=str(folder), **{**TINY, **options})


def test_folder_without_labels_trains_and_says_that_nothing_is_probed(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "hf_ssl")
    run = mae(image_folder, tmp_path / "run")
    assert run.scores is None and run.verdict() == "no labels, no verdict"
    assert "probe     none: the data have no labels" in caplog.text
    names = {path.name for path in run.folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml"} < names
    assert {"trainer_state.json", "encoder", "checkpoint-2"} < names
    assert run.native_class == "ViTModel"


def test_saved_recipe_and_encoder_are_those_of_the_run(image_folder: Path, tmp_path: Path):
    run = mae(image_folder, tmp_path / "run", mask_ratio=0.5)
    recipe = load_recipe(str(run.folder / "recipe.yaml"))
    assert recipe.name == "mae_tiny"
    assert recipe.config().to_diff_dict().items() <= run.trainer.model.config.to_diff_dict().items()
    weights = load_file(run.folder / "model.safetensors")
    for name, value in run.trainer.model.state_dict().items():
        assert torch.equal(weights[name], value), name
    encoder = AutoModel.from_pretrained(run.folder / "encoder")
    pixels = torch.randn(2, 3, 16, 16)
    expected = run.trainer.model.published_branch().backbone.eval()(pixels).last_hidden_state
    torch.testing.assert_close(encoder(pixels).last_hidden_state, expected, rtol=0, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(run.folder).views == run.trainer.processing_class.views


def test_labelled_folder_is_probed_on_images_held_out_of_every_class(class_folder: Path, tmp_path: Path):
    run = mae(class_folder, tmp_path / "run", probe_num_neighbors=1, probe_linear=False)
    assert run.scores is not None
    assert {row.features for row in run.scores.rows} == {"pixels", "random init", "encoder"}
    assert run.scores.protocol["train_images"] == 16 and run.scores.protocol["test_images"] == 4
    assert "can be chance" in run.verdict()
    bank, query = probe_sources(DataArguments(dataset=str(class_folder), probe_limit=10))  # type: ignore
    assert {row["label"] for row in query} == {0, 1}
    assert len(bank) + len(query) == 12


def test_probe_on_named_images_without_labels_is_refused(image_folder: Path):
    with pytest.raises(DataError, match="the probe needs labels"):
        probe_sources(DataArguments(dataset="sample", probe_dataset=str(image_folder)))
    with pytest.raises(RecipeError, match="probe_splits must name two"):
        probe_sources(DataArguments(dataset="sample", probe_splits=["test"]))


def test_training_goes_on_from_another_run_and_from_its_encoder(image_folder: Path, tmp_path: Path):
    first = mae(image_folder, tmp_path / "first")
    name = "student.backbone.layers.0.mlp.fc1.weight"
    trained = first.trainer.model.state_dict()[name]
    for start in (first.folder, first.folder / "encoder"):
        output = tmp_path / f"from-{start.name}"
        run = mae(image_folder, output, init_from=str(start), learning_rate=0.0, weight_decay=0.0)
        assert torch.equal(run.trainer.model.state_dict()[name], trained)
        assert load_recipe(str(output / "recipe.yaml")).init_from == str(start)
    with pytest.raises(RecipeError, match="cannot start from '.*/nothing'"):
        mae(image_folder, tmp_path / "no", init_from=str(tmp_path / "nothing"))
    with pytest.raises(RecipeError, match=r"is \(1, 17, 16\) there and \(1, 5, 16\) here"):
        mae(image_folder, tmp_path / "no", init_from=str(first.folder / "encoder"), patch_size=8)


def test_training_goes_on_from_the_encoder_of_another_method(image_folder: Path, tmp_path: Path):
    first = mae(image_folder, tmp_path / "first")
    options = {name: value for name, value in TINY.items() if not name.startswith("decoder_")}
    second = train(
        "mocov3",
        output_dir=str(tmp_path / "second"),
        init_from=str(first.folder),
        dataset=str(image_folder),
        model_type="hf_ssl_vit",
        learning_rate=0.0,
        weight_decay=0.0,
        **options,
    )
    name = "backbone.layers.0.mlp.fc1.weight"
    trained = first.trainer.model.state_dict()[f"student.{name}"]
    for branch in ("student", "teacher"):
        assert torch.equal(second.trainer.model.state_dict()[f"{branch}.{name}"], trained)


def test_resumed_run_continues_with_more_steps_and_the_floors_of_its_start(
    class_folder: Path, tmp_path: Path
):
    options = {"probe_num_neighbors": 1, "probe_linear": False, "learning_rate_schedule": "constant"}
    first = mae(class_folder, tmp_path / "run", **options)
    floors = (first.folder / "floors.json").read_text()
    resumed = train(resume=str(first.folder), max_steps=4)
    assert resumed.trainer.state.global_step == 4
    assert resumed.trainer.floors == first.trainer.floors
    assert (first.folder / "floors.json").read_text() == floors
    assert load_recipe(str(first.folder / "recipe.yaml")).training["max_steps"] == 4
    whole = mae(class_folder, tmp_path / "whole", max_steps=4, **options)
    for name, value in whole.trainer.model.state_dict().items():
        assert torch.equal(resumed.trainer.model.state_dict()[name], value), name


def test_a_run_killed_before_its_first_checkpoint_starts_again(image_folder: Path, tmp_path: Path):
    run = mae(image_folder, tmp_path / "run")
    shutil.rmtree(run.folder / "checkpoint-2")
    again = train(resume=str(run.folder))
    for name, value in run.trainer.model.state_dict().items():
        assert torch.equal(again.trainer.model.state_dict()[name], value), name


def test_changes_that_lead_another_way_are_said_and_others_not(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = mae(image_folder, tmp_path / "run")
    train(resume=str(run.folder), logging_steps=2, dataloader_num_workers=1, save_total_limit=1)
    assert "changed by this resume" not in caplog.text
    train(resume=str(run.folder), max_steps=4, mask_ratio=0.5, eval_steps=4)
    (message,) = [message for message in caplog.messages if "changed by this resume" in message]
    assert message.endswith("so that the run goes another way: max_steps 2 -> 4, mask_ratio None -> 0.5")


def test_a_refused_resume_changes_nothing(image_folder: Path, tmp_path: Path):
    run = mae(image_folder, tmp_path / "run").folder
    recipe = (run / "recipe.yaml").read_text()
    for options in ({"global_batch_size": 2}, {"hidden_size": 32}, {"optimizer": "sgd"}):
        with pytest.raises(CheckpointError, match="start a new run with --init_from"):
            train(resume=str(run), max_steps=4, **options)
        assert (run / "recipe.yaml").read_text() == recipe
    assert train(resume=str(run), max_steps=3).trainer.state.global_step == 3


def test_a_run_continues_from_the_checkpoint_that_is_named(image_folder: Path, tmp_path: Path):
    run = mae(image_folder, tmp_path / "run", max_steps=4).folder
    expected = (run / "model.safetensors").read_bytes()
    resumed = train(resume=str(run / "checkpoint-2"))
    assert resumed.folder == run and resumed.trainer._resume_step == 2
    assert (run / "model.safetensors").read_bytes() == expected
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(
        CheckpointError, match="cannot continue from '.*checkpoint-2': optimizer.pt is missing"
    ):
        train(resume=str(run / "checkpoint-2"))
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint to resume from"):
        train(resume=str(run))


def test_a_finished_run_that_is_resumed_stays_as_it_is(class_folder: Path, tmp_path: Path):
    run = mae(class_folder, tmp_path / "run", probe_num_neighbors=1, probe_linear=False)
    weights = (run.folder / "model.safetensors").read_bytes()
    again = train(resume=str(run.folder))
    assert (run.folder / "model.safetensors").read_bytes() == weights
    assert again.scores is not None and run.scores is not None
    assert again.scores.to_dict() == run.scores.to_dict()
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_knn" in entry for entry in history) == 1
    assert sum("train_loss" in entry for entry in history) == 1


def test_a_folder_that_a_killed_run_had_just_made_is_taken(image_folder: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    for name in ("_lock", ".recipe.yaml.partial"):
        (tmp_path / "run" / name).write_text("process 1")
    run = mae(image_folder, tmp_path / "run")
    assert not (run.folder / "_lock").exists() and not (run.folder / ".recipe.yaml.partial").exists()


def test_nothing_is_left_of_a_run_that_fails_early(image_folder: Path, tmp_path: Path):
    for options in ({"patch_size": 5}, {"global_batch_size": 100}, {"warmup_steps": 9}, {"mask_rate": 1}):
        with pytest.raises((RecipeError, DataError)):
            mae(image_folder, tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError):
        mae(image_folder, tmp_path / "empty", patch_size=5)
    assert list((tmp_path / "empty").iterdir()) == []


def test_full_disk_at_the_end_leaves_the_checkpoint(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import transformers.modeling_utils as modeling_utils

    write = modeling_utils.safe_save_file

    def write_checkpoints_only(tensors: Any, file: str, **kwargs: Any) -> None:
        if "checkpoint-" not in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, file, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", write_checkpoints_only)
    with pytest.raises(CheckpointError, match="cannot write the trained model .*No space.*from checkpoint-2"):
        mae(image_folder, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-2", "recipe.yaml"}
    monkeypatch.undo()
    assert (train(resume=str(tmp_path / "run")).folder / "encoder").is_dir()


def test_some_broken_images_are_skipped_and_counted(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (image_folder / "05.png").write_bytes(b"no picture")
    mae(image_folder, tmp_path / "run", max_steps=6)
    assert "1 images could not be read and were skipped, e.g." in caplog.text and "05.png" in caplog.text


def test_too_many_broken_images_stop_the_run(image_folder: Path, tmp_path: Path):
    for index in range(6):
        (image_folder / f"{index:02}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="max_bad_fraction"):
        mae(image_folder, tmp_path / "run", max_bad_fraction=0.0)
    assert not (tmp_path / "run").exists()


def test_new_runs_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_folder: Path
):
    monkeypatch.chdir(tmp_path)
    folders = [train("mae", dataset=str(image_folder), **TINY).folder for _ in range(2)]
    assert folders == [Path("runs/mae_tiny"), Path("runs/mae_tiny-2")]


def test_a_resumed_run_takes_no_other_recipe(tmp_path: Path):
    for options in ({"method": "mae"}, {"recipe": "mae_tiny"}, {"output_dir": "x"}, {"init_from": "x"}):
        with pytest.raises(RecipeError, match="has its"):
            train(resume=str(tmp_path), **options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="is no run: it has no recipe.yaml"):
        train(resume=str(tmp_path))


def test_methods_and_recipes_must_fit():
    with pytest.raises(RecipeError, match="recipe mae_tiny is for mae, not moco"):
        train("moco", recipe="mae_tiny")
    with pytest.raises(RecipeError, match="name a method or a recipe"):
        train()
    with pytest.raises(RecipeError, match="did you mean 'simclr'"):
        train("simcrl")


def test_building_a_trainer_writes_nothing_and_is_repeatable(tmp_path: Path):
    recipe = load_recipe("mae_tiny")
    recipe.data.probe_limit = 40
    states = []
    for _ in range(2):
        random.random()
        torch.rand(3)
        states.append(build_trainer(recipe, tmp_path / "run").model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
