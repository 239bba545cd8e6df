"""Pushes of the trainer: while it trains and at the end, whole, without pickles and without a token."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load, load_file

from hf_ssl.hub import PublishError, publish
from hf_ssl.training.run import train
from tests.hub_protocol import TOKEN
from tests.hub_server import HubServer
from tests.training.conftest import random_image
from tests.training.test_run import TINY


def titles(name: str) -> list[str]:
    """Titles of the commits of main, newest first."""
    return [commit.title for commit in HfApi().list_repo_commits(name)]


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client repeats at once what it would repeat after some seconds."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def test_a_token_is_used_and_written_nowhere(
    hub: HubServer, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    monkeypatch.delenv("HF_TOKEN")
    options = {**TINY, "push_to_hub": True, "hub_model_id": "tester/vit", "hub_strategy": "every_save"}
    caplog.set_level("DEBUG")
    run = train(
        "mae",
        output_dir=str(tmp_path / "run"),
        dataset=str(image_folder),
        hub_token=TOKEN,
        **options,
    )
    assert run.url is not None and titles("tester/vit")[:2] == [
        "End of training",
        "Training in progress, step 2",
    ]
    written = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "training_args.bin", "README.md"} <= {path.name for path in written}
    for path in written:
        assert TOKEN.encode() not in path.read_bytes(), path
    for path, content in hub.files("models", "tester/vit").items():
        assert TOKEN.encode() not in content, path
        assert str(image_folder.parent).encode() not in content, path  # nor where the images are
        assert b"hub_model_id" not in content, path
    assert TOKEN not in caplog.text
    with pytest.raises(PublishError, match="no Hugging Face token: log in with `hf auth login`"):
        train(resume=str(run.folder), max_steps=4)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    train(resume=str(run.folder), max_steps=4)
    assert titles("tester/vit")[:2] == ["End of training", "Training in progress, step 4"]


def test_the_trainer_publishes_while_it_trains_and_goes_on_when_that_fails(
    hub: HubServer, make_trainer: Any, caplog: Any, no_waiting: None
):
    trainer = make_trainer(
        "moco-v2", push_to_hub=True, hub_model_id="tester/moco", save_strategy="steps", save_steps=2
    )
    hub.fail("POST .*/commit/", times=20, status=500)
    trainer.train()
    trainer._finish_current_push()
    assert "the Hub fails (500)" in caplog.text and "training goes on" in caplog.text
    assert trainer.state.global_step == 4 and len(titles("tester/moco")) == 1
    hub.faults.clear()
    commit = trainer.push_to_hub(license="apache-2.0")
    files = hub.files("models", "tester/moco")
    assert (
        titles("tester/moco")[0] == "End of training" and commit.oid == HfApi().repo_info("tester/moco").sha
    )
    assert b"license: apache-2.0" in files["README.md"]
    assert {"pretraining/model.safetensors", "modeling_moco.py", "model.safetensors"} <= set(files)
    assert not [path for path in files if path.endswith((".bin", ".pt", ".pth"))]


def test_checkpoints_with_lora_are_published_merged(hub: HubServer, image_folder: Path, tmp_path: Path):
    pytest.importorskip("peft")
    start = train("mae", output_dir=str(tmp_path / "start"), dataset=str(image_folder), **TINY)
    options = {**TINY, "push_to_hub": True, "hub_model_id": "tester/lora", "hub_always_push": True}
    options |= {"init_from": str(start.folder / "encoder"), "lora_rank": 2, "save_steps": 1, "max_steps": 2}
    train("mae", output_dir=str(tmp_path / "run"), dataset=str(image_folder), **options)
    halfway = next(c for c in HfApi().list_repo_commits("tester/lora") if c.title.endswith("step 1"))
    files = hub.files("models", "tester/lora", halfway.commit_id)
    names = set(load(files["pretraining/model.safetensors"]))
    assert names == set(load_file(start.folder / "model.safetensors"))
    assert "model.safetensors" in files and not any("lora" in path for path in files)


@pytest.mark.slow
def test_a_checkpoint_is_published_with_the_scores_it_had(hub: HubServer, tmp_path: Path):
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for index in range(10):
            (tmp_path / "pets" / label / f"{index}.png").write_bytes(random_image(len(label) * index))
    options = {**TINY, "max_steps": 4, "probe_num_neighbors": 1, "probe_linear": False}
    options |= {"push_to_hub": True, "hub_model_id": "tester/vit", "hub_always_push": True}
    options |= {"eval_steps": 2, "save_steps": 1}
    train("mae", output_dir=str(tmp_path / "run"), dataset=str(tmp_path / "pets"), **options)
    found = {}
    for commit in HfApi().list_repo_commits("tester/vit"):
        files = hub.files("models", "tester/vit", commit.commit_id)
        found[commit.title] = (len(files) > 20, "pretraining/scores.json" in files)
    assert found == {
        "End of training": (True, True),
        "Training in progress, step 4": (True, True),
        "Training in progress, step 3": (True, False),
        "Training in progress, step 2": (True, True),
        "Training in progress, step 1": (True, False),
        "initial commit": (False, False),
    }


def test_strategy_end_publishes_nothing_while_training(hub: HubServer, make_trainer: Any):
    options = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": "end", "hub_private_repo": True}
    trainer = make_trainer(push_to_hub=True, hub_model_id="tester/moco", **options)
    trainer.train()
    assert len(titles("tester/moco")) == 1 and hub.repositories["models", "tester/moco"].private


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_would_publish_pickles_are_refused(make_trainer: Any, strategy: str):
    with pytest.raises(
        ValueError, match=f"hub_strategy {strategy} would publish pickles .* use every_save or end"
    ):
        make_trainer(push_to_hub=True, hub_strategy=strategy)


def test_a_failed_push_at_the_end_leaves_the_run_whole(
    hub: HubServer, image_folder: Path, tmp_path: Path, no_waiting: None
):
    hub.fail("POST .*/commit/", times=20, status=500)
    options = {**TINY, "save_strategy": "no", "push_to_hub": True, "hub_model_id": "tester/vit"}
    with pytest.raises(
        PublishError, match="the run is whole, push it again with: hf-ssl push .*/run tester/vit"
    ):
        train("mae", output_dir=str(tmp_path / "run"), dataset=str(image_folder), **options)
    hub.faults.clear()
    publish(tmp_path / "run", "tester/vit")
