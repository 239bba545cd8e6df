"""Repositories of two parts: what they hold, and that a push is whole or not at all."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForPreTraining

from hf_ssl.hub import PublishError, prepare_repository, publish
from hf_ssl.training.frozen_parts import build_model
from hf_ssl.training.recipes import load_recipe
from hf_ssl.training.run import Run
from tests.clean_process import run_python
from tests.hub_protocol import READ_TOKEN, TOKEN
from tests.hub_server import HubServer
from tests.modeling.tiny import BY_NAME

ROOT_FILES = {"config.json", "model.safetensors", "export.json", "README.md", "figures/curves.png"}
PRETRAINING_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml",
                     "trainer_state.json"}  # fmt: skip

USER_CODE = """
import json, sys, timm, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
                          AutoModelForPreTraining, pipeline)
commits = json.loads(sys.argv[1])
results = {}
for name, commit in commits.items():
    image = Image.open("image.png")
    pixel_values = AutoImageProcessor.from_pretrained(name)(image, return_tensors="pt")["pixel_values"]
    for how, revision in (("model", "main"), ("pinned", commit)):
        encoder = AutoModel.from_pretrained(name, revision=revision).eval()
        with torch.no_grad():
            results[f"{name} {how}"] = encoder(pixel_values).pooler_output
    extract = pipeline("image-feature-extraction", model=name)
    results[f"{name} pipeline"] = torch.tensor(extract("image.png", pool=True))
    classifier = AutoModelForImageClassification.from_pretrained(name, num_labels=3)
    assert classifier(pixel_values).logits.shape == (1, 3)
    options = {"subfolder": "pretraining", "trust_remote_code": True, "revision": commit}
    config = AutoConfig.from_pretrained(name, **options)
    assert AutoImageProcessor.from_pretrained(name, **options).views
    model = AutoModelForPreTraining.from_pretrained(name, **options)
    assert isinstance(config, type(model.config))
    assert type(model).__module__.startswith("transformers_modules")
    batch = load_file(f"{config.model_type}.safetensors")["pixel_values"]
    model.begin_step(5, 10, seed=3)
    model.prepare_step([{"pixel_values": batch}])
    results[f"{name} loss"] = model(batch, row_index=torch.arange(len(batch))).loss.detach()
network = timm.create_model("hf-hub:tester/cnn", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
with torch.no_grad():
    results["timm"] = network(transform(Image.open("image.png"))[None])
save_file({key: value.contiguous() for key, value in results.items()}, "results.safetensors")
"""


def heads(hub: HubServer, name: str) -> list[str]:
    """Titles of the commits of main, newest first."""
    return [commit.title for commit in HfApi().list_repo_commits(name)]


def test_a_push_is_one_commit_that_holds_both_parts_and_no_pickle(
    hub: HubServer, moco_run: Run, mae_run: Run
):
    for run, name, native in (
        (moco_run, "tester/cnn", set()),
        (mae_run, "tester/vit", {"preprocessor_config.json"}),
    ):
        commit = publish(run.folder, name)
        files = hub.files("models", name)
        assert commit.oid == HfApi().repo_info(name).sha and len(heads(hub, name)) == 2  # the first is empty
        code = {path for path in files if path.endswith(".py")}
        method = run.trainer.model.config.model_type.removeprefix("hf_ssl_")
        assert {f"modeling_{method}.py", f"configuration_{method}.py", "pretraining.py"} <= code
        scores = {"pretraining/scores.json"} if run.scores else set()
        expected = ROOT_FILES | native | scores | {f"pretraining/{path}" for path in PRETRAINING_FILES}
        assert set(files) - code == expected
        assert files["pretraining/model.safetensors"] == (run.folder / "model.safetensors").read_bytes()
        assert files["model.safetensors"] == (run.folder / "encoder" / "model.safetensors").read_bytes()


def pretraining_model(folder: Path) -> Any:
    return AutoModelForPreTraining.from_pretrained(folder)


def a_batch(model: Any) -> torch.Tensor:
    """Images as a method of the two runs takes them."""
    views = () if model.config.model_type == "hf_ssl_mae" else (2,)
    return torch.rand(4, *views, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_a_process_without_this_package_gets_every_part(
    hub: HubServer, moco_run: Run, mae_run: Run, tmp_path: Path
):
    commits, expected = {}, {}
    image_file = tmp_path / "image.png"
    shutil.copy(moco_run.trainer.sources[0].row_name(0), image_file)
    for run, name in ((moco_run, "tester/cnn"), (mae_run, "tester/vit")):
        commits[name] = publish(run.folder, name).oid
        model, processor = pretraining_model(run.folder), AutoImageProcessor.from_pretrained(run.folder)
        batch = a_batch(model)
        save_file({"pixel_values": batch}, tmp_path / f"{model.config.model_type}.safetensors")
        pixels = processor(Image.open(image_file), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = model.published_branch().backbone(pixels).pooler_output
            model.begin_step(5, 10, seed=3)
            model.prepare_step([{"pixel_values": batch}])
            expected[f"{name} loss"] = model(batch, row_index=torch.arange(4)).loss
        expected |= {f"{name} {how}": features for how in ("model", "pinned", "pipeline")}
        # Main goes on; who pins the commit must not see it.
        hub.commit("models", name, {"pretraining/config.json": "{}"}, message="breaks the pre-training part")
    expected["timm"] = expected["tester/cnn model"]
    run_python(
        USER_CODE, json.dumps(commits), with_package=False, cwd=tmp_path, HF_HOME=str(tmp_path / "home")
    )
    results = load_file(tmp_path / "results.safetensors")
    assert set(results) == set(expected)
    for name, value in expected.items():
        tolerance = 0 if name.endswith("loss") else 1e-5
        torch.testing.assert_close(
            results[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def one_step(model: Any, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    """Loss, gradients and the state after one step of the protocol, without an optimizer."""
    model.train()
    model.begin_step(step, 10, seed=3)
    model.prepare_step([{"pixel_values": batch}])
    outputs = model(batch, row_index=torch.arange(len(batch)))
    outputs.loss.backward()
    gradients = {f"gradient of {name}": value.grad for name, value in model.trainable_parameters()}
    model.end_step([outputs.updates or {}])
    return {"loss": outputs.loss.detach(), **gradients, **model.state_dict()}


@pytest.mark.parametrize("name", ["moco", "mae"])
def test_a_run_started_from_a_repository_makes_the_step_that_the_published_run_would_make(
    hub: HubServer, request: pytest.FixtureRequest, name: str
):
    run = request.getfixturevalue(f"{name}_run")
    publish(run.folder, "tester/start")
    recipe = replace(load_recipe(str(run.folder / "recipe.yaml")), init_from="tester/start")
    pulled, own = build_model(recipe, recipe.config()), pretraining_model(run.folder)
    batch = a_batch(own)
    expected, found = one_step(own, batch, step=3), one_step(pulled, batch, step=3)
    assert set(found) == set(expected)
    assert name == "mae" or {"queue.keys", "teacher.head.layers.0.weight"} & set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_the_next_push_removes_what_it_no_longer_has_and_nothing_of_others(hub: HubServer, moco_run: Run):
    publish(moco_run.folder, "tester/cnn")
    hub.commit("models", "tester/cnn", {
        "figures/old.png": b"old", "pretraining/optimizer.pt": b"old", "modeling_mae.py": "old",
        "handler.py": "theirs", "notes/README.md": "theirs",
    })  # fmt: skip
    publish(BY_NAME["mae"].build(), "tester/cnn")
    files = hub.files("models", "tester/cnn")
    assert files["handler.py"] == files["notes/README.md"] == b"theirs"
    assert not {"figures/old.png", "pretraining/optimizer.pt", "pretraining/recipe.yaml"} & set(files)
    assert "modeling_moco.py" not in files and files["modeling_mae.py"] != b"old"
    assert len(heads(hub, "tester/cnn")) == 4


def test_models_push_themselves_and_an_encoder_has_one_part_only(hub: HubServer):
    row = BY_NAME["moco-v2"]
    row.build().push_to_hub("whole", commit_message="first", private=True)  # in the own namespace
    files = hub.files("models", "tester/whole")
    assert {"config.json", "pretraining/config.json", "pretraining/preprocessor_config.json"} <= set(files)
    assert heads(hub, "tester/whole")[0] == "first" and hub.repositories["models", "tester/whole"].private
    row.build_encoder().push_to_hub("tester/encoder")
    files = hub.files("models", "tester/encoder")
    assert set(files) == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "export.json",
        "README.md",
    }
    assert b"trust_remote_code" not in files["README.md"]


def test_a_push_goes_to_a_branch_of_its_own(hub: HubServer, mae_run: Run):
    publish(mae_run.folder, "tester/vit")
    main = HfApi().repo_info("tester/vit").sha
    publish(BY_NAME["mae"].build(), "tester/vit", revision="tiny")
    assert HfApi().repo_info("tester/vit").sha == main
    assert "pretraining/recipe.yaml" not in hub.files("models", "tester/vit", "tiny")


# What goes wrong


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"pattern": "POST .*/commit/", "times": 20, "status": 500},
            r"the Hub fails \(500\); push again later",
        ),
        ({"pattern": "POST .*/commit/", "times": 20, "status": 429, "retry_after": 0}, r"slow down \(429\)"),
        ({"pattern": "POST .*/commit/", "times": 20, "status": 412}, "changed meanwhile; push again"),
        ({"pattern": "PUT /lfs/", "times": 50, "status": 503}, r"the Hub fails \(503\)"),
        (
            {"pattern": "POST .*/git-lfs|POST .*/objects/batch", "times": 20, "cut_after": 0},
            "cannot be reached",
        ),
        ({"pattern": "POST .*/preupload/", "times": 20, "status": 403}, "may not write there"),
    ],
)
def test_a_push_that_fails_changes_nothing_and_can_be_repeated(
    hub: HubServer, mae_run: Run, no_waiting: None, fault: dict[str, Any], message: str
):
    hub.commit("models", "tester/vit", {"README.md": "before"})
    before = HfApi().repo_info("tester/vit").sha
    hub.fail(**fault)
    with pytest.raises(PublishError, match=message) as error:
        publish(mae_run.folder, "tester/vit")
    assert "\n" not in str(error.value) and str(error.value).startswith("cannot push to tester/vit: ")
    assert hub.asked(fault["pattern"])
    assert HfApi().repo_info("tester/vit").sha == before
    assert hub.files("models", "tester/vit") == {"README.md": b"before"}
    hub.faults.clear()
    publish(mae_run.folder, "tester/vit")
    assert "pretraining/model.safetensors" in hub.files("models", "tester/vit")


def test_a_push_whose_answer_is_lost_is_there_whole_and_repeating_it_adds_nothing(
    hub: HubServer, mae_run: Run, no_waiting: None
):
    hub.fail("POST .*/commit/", times=20, cut_after=0)
    with pytest.raises(PublishError, match="it is there whole or not at all"):
        publish(mae_run.folder, "tester/vit")
    hub.faults.clear()
    files = hub.files("models", "tester/vit")
    commit = publish(mae_run.folder, "tester/vit")
    assert hub.files("models", "tester/vit") == files and "pretraining/model.safetensors" in files
    assert commit.oid == HfApi().repo_info("tester/vit").sha and len(heads(hub, "tester/vit")) == 2


def test_a_hub_that_is_gone_is_one_line(hub: HubServer, mae_run: Run, monkeypatch: pytest.MonkeyPatch):
    hub.stop()
    with pytest.raises(PublishError, match="the Hub cannot be reached .* push again"):
        publish(mae_run.folder, "tester/vit")


def test_a_slow_hub_gets_the_whole_push(hub: HubServer, mae_run: Run):
    hub.fail("PUT /lfs/", times=2, delay=0.5)
    hub.fail("POST .*/commit/", delay=1.0)
    publish(mae_run.folder, "tester/vit")
    assert "pretraining/model.safetensors" in hub.files("models", "tester/vit")


def test_an_invalid_card_is_refused_before_anything_is_sent(hub: HubServer, mae_run: Run):
    hub.fail("POST /api/validate-yaml", status=400)
    with pytest.raises(PublishError, match="cannot push to tester/vit"):
        publish(mae_run.folder, "tester/vit")
    assert not hub.asked("PUT /lfs/")


@pytest.fixture
def unfinished(mae_run: Run, tmp_path: Path) -> Path:
    """A run that was stopped after its first checkpoint."""
    folder = tmp_path / "unfinished"
    shutil.copytree(mae_run.folder / "checkpoint-2", folder / "checkpoint-2")
    shutil.copy(mae_run.folder / "recipe.yaml", folder)
    return folder


def test_what_is_no_finished_run_is_refused_with_the_way_out(
    hub: HubServer, mae_run: Run, unfinished: Path, tmp_path: Path
):
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "nowhere": "there is no folder",
        tmp_path / "empty": "is no run: it has no config.json",
        unfinished: "has not finished; continue it with hf-ssl train --resume .*checkpoint-2",
        mae_run.folder / "encoder": "holds a native model and no pre-training checkpoint; give the run",
    }
    for folder, message in cases.items():
        with pytest.raises(PublishError, match=message):
            publish(folder, "tester/no")
    assert not hub.repositories


def test_a_run_trained_on_after_it_finished_is_unfinished_again(mae_run: Run, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(mae_run.folder, folder)
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-9")
    with pytest.raises(PublishError, match="has not finished.*checkpoint-9"):
        prepare_repository(folder, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_checkpoint_is_published_with_the_recipe_of_its_run(unfinished: Path, tmp_path: Path):
    prepare_repository(unfinished / "checkpoint-2", tmp_path / "repository", "tester/vit")
    files = {path.name for path in (tmp_path / "repository" / "pretraining").iterdir()}
    assert files == PRETRAINING_FILES  # and neither optimizer.pt, rng_state.pth nor training_args.bin
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError):
        prepare_repository(unfinished / "checkpoint-2", foreign)


# Secrets


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("tester/vit", "", "no Hugging Face token: log in with `hf auth login`"),
        ("tester/vit", "hf_wrong", "does not accept the token; log in with `hf auth login`"),
        ("tester/vit", READ_TOKEN, "may not write there"),
        ("someone/vit", TOKEN, "may not write there"),
        ("not a/name", TOKEN, "cannot push to not a/name"),
    ],
)
def test_who_may_not_write_reads_one_line_without_the_token(
    hub: HubServer, mae_run: Run, monkeypatch: pytest.MonkeyPatch, name: str, token: str, message: str
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=re.escape(message)) as error:
        publish(mae_run.folder, name)
    assert "\n" not in str(error.value) and (not token or token not in str(error.value))
    assert not hub.repositories
