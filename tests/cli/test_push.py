"""`hf-ssl push`, and commands on names of the Hub: what they print, and one line where they cannot go on."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModel

from hf_ssl.training.recipes import load_recipe
from tests.cli.conftest import Outcome, TinyRun
from tests.hub_server import HubServer

Cli = Callable[..., Outcome]
DOCUMENTED = (Path(__file__).resolve().parents[2] / "docs" / "publishing.md").read_text(encoding="utf-8")
SMALLER = ("--max_steps", "1", "--warmup_steps", "0", "--global_batch_size", "8", "--probe_limit", "40",
           "--eval_steps", "1", "--save_steps", "1", "--bf16", "false")  # fmt: skip


def test_push_says_where_it_is_and_the_dry_run_sends_nothing(
    cli: Cli, hub: HubServer, tiny_run: TinyRun, tmp_path: Path
):
    dry = cli("push", str(tiny_run.folder), "tester/mae", "--dry_run", str(tmp_path / "preview"))
    assert dry.code == 0 and dry.out == f"ViTModel in {tmp_path / 'preview'}; nothing was pushed\n"
    assert (
        not hub.asked("POST")
        and 'from_pretrained("tester/mae")' in (tmp_path / "preview" / "README.md").read_text()
    )
    done = cli("push", str(tiny_run.folder), "tester/mae", "--private", "--license", "apache-2.0")
    assert done.code == 0, done.err
    assert re.fullmatch(rf"published {hub.address}/tester/mae/commit/[0-9a-f]{{40}}\n", done.out)
    assert hub.repositories["models", "tester/mae"].private
    pushed = hub.files("models", "tester/mae")
    assert set(pushed) == {
        path.relative_to(tmp_path / "preview").as_posix()
        for path in (tmp_path / "preview").rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("run", "name", "token", "message"),
    [
        ("{tmp}/nowhere", "tester/x", "hf_write", "there is no folder"),
        ("{tmp}", "tester/x", "hf_write", "is no run: it has no config.json"),
        ("{run}/encoder", "tester/x", "hf_write", "holds a native model and no pre-training checkpoint"),
        ("{run}", "tester/x", "", "no Hugging Face token: log in with `hf auth login`"),
        ("{run}", "someone/x", "hf_write", "this account or token may not write there"),
        ("{run}", "tester/x", "hf_unknown", "the Hub does not accept the token"),
    ],
)
def test_what_cannot_be_pushed_is_one_line_and_exit_code_2(
    cli: Cli, hub: HubServer, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    run: str, name: str, token: str, message: str,
):  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    outcome = cli("push", run.format(tmp=tmp_path, run=tiny_run.folder), name)
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("hf-ssl: ") and message in outcome.err
    assert not token or token not in outcome.err
    assert not hub.repositories


def test_a_hub_that_fails_is_one_line_and_exit_code_2(
    cli: Cli, hub: HubServer, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail("POST .*/commit/", times=20, status=500)
    outcome = cli("push", str(tiny_run.folder), "tester/mae")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "cannot push to tester/mae: the Hub fails (500); push again later" in outcome.err


def test_commands_read_a_published_run_by_its_name(
    cli: Cli, hub: HubServer, tiny_run: TinyRun, tmp_path: Path
):
    assert cli("push", str(tiny_run.folder), "tester/mae").code == 0
    options = ("--dataset", "sample", "--limit", "20")
    features = cli("embed", "tester/mae", *options, "--output", str(tmp_path / "features.parquet"))
    assert features.code == 0, features.err
    scored = cli("evaluate", "tester/mae@main", *options, "--probe", "none")
    assert scored.code == 0 and "encoder" in scored.out, scored.err
    exported = cli("export", "tester/mae", str(tmp_path / "native"))
    assert exported.code == 0 and "ViTModel" in exported.out, exported.err
    assert (tmp_path / "native" / "model.safetensors").read_bytes() == hub.files("models", "tester/mae")[
        "model.safetensors"
    ]


@pytest.mark.parametrize(
    "command",
    [
        "embed someone/foreign --dataset sample --output {tmp}/x.parquet",
        "evaluate someone/foreign --dataset sample",
        "export someone/foreign {tmp}/native",
        "train mae --init_from someone/foreign --output_dir {tmp}/run",
    ],
)
def test_code_of_others_is_never_run_and_never_asked_for(
    cli: Cli, hub: HubServer, tmp_path: Path, command: str
):
    marker = tmp_path / "it-ran"
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    code = f"open({str(marker)!r}, 'w')\n"
    hub.commit("models", "someone/foreign", {"config.json": json.dumps(config), "code.py": code})
    outcome = cli(*command.format(tmp=tmp_path).split())
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert (
        "'someone/foreign" in outcome.err
        and "brings Python code of its own, which hf-ssl never runs" in outcome.err
    )
    assert "trust_remote_code=True" in outcome.err and not marker.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_documented_commands_run_in_their_order(cli: Cli, hub: HubServer, tiny_run: TinyRun, tmp_path: Path):
    commands = re.findall(r"^hf-ssl (.*)$", DOCUMENTED, re.MULTILINE)
    assert len(commands) == 5
    images = tmp_path / "images"
    images.mkdir()
    from tests.training.conftest import random_image

    for index in range(12):
        (images / f"{index}.png").write_bytes(random_image(index))
    for number, command in enumerate(commands):
        names = {"RUN": str(tiny_run.folder), "user/": "tester/", "preview": str(tmp_path / "preview")}
        for written, meant in {**names, "path/to/images": str(images)}.items():
            command = command.replace(written, meant)
        if "@v1.0" in command:
            from huggingface_hub import HfApi

            HfApi().create_tag("tester/name", tag="v1.0")
        arguments = command.split()
        if arguments[0] == "train":
            probe = ("--probe_dataset", "null", "--probe_splits", "null", "--probe_config_names", "null",
                     "--probe_label_column", "null", "--split", "null")  # fmt: skip
            arguments += [*SMALLER, *probe, "--output_dir", str(tmp_path / f"run-{number}")]
        outcome = cli(*arguments)
        assert outcome.code == 0, (command, outcome.err)
        assert ("published " in outcome.out) == (
            "push_to_hub" in command or command.startswith("push") and "dry" not in command
        )
    assert "@" in str(load_recipe(str(tmp_path / "run-4" / "recipe.yaml")).init_from)
    assert AutoModel.from_pretrained("tester/name").config.model_type == "vit"
