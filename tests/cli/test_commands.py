"""Every command on one tiny run, and what wrong input shows: one line, exit code 2, nothing left behind."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.cli.conftest import TINY_OPTIONS, Outcome, TinyRun
from tests.training.conftest import random_image

Cli = Callable[..., Outcome]


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['hf-ssl', '--help']\n"
        "from hf_ssl.cli.main import main\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.rstrip().endswith("[]"), result
    assert result.returncode == 0
    for command in ("methods", "train", "evaluate", "embed", "export", "push", "show", "doctor", "segment"):
        assert re.search(rf"^\s+{command}\s", result.stdout, re.MULTILINE)


def test_training_reads_well(tiny_run: TinyRun):
    lines = tiny_run.outcome.err.splitlines()
    heads = [line.split()[0] for line in lines]
    assert heads[:6] == ["method", "data", "views", "backbone", "training", "folder"]
    assert re.fullmatch(r"step 2/4  loss \S+  grad \S+  lr \S+.*  epoch \S+", lines[heads.index("step")])
    scored = [line for line in lines if " knn " in line and line.startswith("step")]
    assert len(scored) == 2
    assert re.fullmatch(r"step 4/4  knn \S+ % \(pixels \S+, random init \S+\)", scored[1])
    assert "shards" not in tiny_run.outcome.err and "Loading weights" not in tiny_run.outcome.err
    assert "{" not in tiny_run.outcome.err + tiny_run.outcome.out
    assert "random init" in tiny_run.outcome.out and "points against the best of" in tiny_run.outcome.out
    assert f"hf-ssl show {tiny_run.folder}" in tiny_run.outcome.out


def test_methods_lists_what_there_is(cli: Cli):
    outcome = cli("methods")
    assert outcome.code == 0
    for name in ("simclr", "moco", "mocov3", "mae", "recipes:", "mae_tiny"):
        assert name in outcome.out
    assert "mask_ratio" in cli("methods", "mae").out
    assert "did you mean 'mae'" in cli("methods", "maee").err


def test_evaluate_scores_a_run_on_its_own_probe_and_its_encoder_on_named_data(
    cli: Cli, tiny_run: TinyRun, tmp_path: Path
):
    own = cli("evaluate", str(tiny_run.folder), "--limit", "60", "--output", str(tmp_path / "own.json"))
    assert own.code == 0, own.err
    rows = json.loads((tmp_path / "own.json").read_text())["rows"]
    stored = json.loads((tiny_run.folder / "scores.json").read_text())["rows"]
    encoder, expected = (next(row for row in part if row["features"] == "encoder") for part in (rows, stored))
    assert encoder["knn"] == pytest.approx(expected["knn"], abs=0.04)
    native = cli("evaluate", str(tiny_run.folder / "encoder"), "--dataset", "sample", "--limit", "60",
                 "--splits", "train", "--splits", "test", "--probe", "none")  # fmt: skip
    assert native.code == 0, native.err
    assert "encoder" in native.out and "pixels" in native.out


def test_options_of_evaluate_hold_for_the_runs_own_probe(cli: Cli, tiny_run: TinyRun, tmp_path: Path):
    output = tmp_path / "scores.json"
    done = cli("evaluate", str(tiny_run.folder), "--limit", "60", "--probe", "none",
               "--num_neighbors", "3", "--attentive", "1", "--output", str(output))  # fmt: skip
    assert done.code == 0, done.err
    attentive = json.loads(output.read_text())["attentive_top1"]
    assert set(attentive) == {"random init", "encoder"} and "attentive probe, 1 epochs" in done.out
    protocol = json.loads(output.read_text())["protocol"]
    assert (protocol["num_neighbors"], protocol["probe"]) == (3, "none")
    refused = cli("evaluate", str(tiny_run.folder), "--label_column", "category")
    assert refused.code == 2 and "belong to a --dataset" in refused.err


def test_embed_continues_where_it_stopped(cli: Cli, tiny_run: TinyRun, tmp_path: Path):
    file = tmp_path / "features.parquet"
    options = ("--dataset", "sample", "--output", str(file), "--limit", "50", "--batch_size", "16")
    outcome = cli("embed", str(tiny_run.folder), *options)
    assert outcome.code == 0, outcome.err
    table = pq.read_table(file)
    assert table.num_rows == 50
    assert cli("embed", str(tiny_run.folder), *options).code == 0
    assert pq.read_table(file).equals(table)


def test_export_writes_a_native_encoder(cli: Cli, tiny_run: TinyRun, tmp_path: Path):
    outcome = cli("export", str(tiny_run.folder), str(tmp_path / "native"))
    assert outcome.code == 0, outcome.err
    assert "ViTModel" in outcome.out
    assert json.loads((tmp_path / "native" / "config.json").read_text())["model_type"] == "vit"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    refused = cli("export", str(tiny_run.folder), str(tmp_path / "full"))
    assert refused.code == 2 and (tmp_path / "full" / "thesis.txt").exists()


def test_show_takes_other_images_and_a_larger_size(cli: Cli, tiny_run: TinyRun, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for number, size in enumerate([(60, 40), (40, 90)]):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "photos" / f"{number}.png")
    arguments = ["--images", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "drawn")]
    outcome = cli("show", str(tiny_run.folder), *arguments, "--size", "32")
    assert outcome.code == 0, outcome.err
    names = {"reconstructions", "patch_features", "attention"}
    assert {path.stem for path in (tmp_path / "drawn").glob("*.png")} == names
    for size in ("33", "0", "-4"):
        refused = cli("show", str(tiny_run.folder), *arguments, "--size", size)
        assert refused.code == 2 and f"size {size} is no multiple of the patch size 4" in refused.err


def test_segment_scores_patches_beside_their_floors(cli: Cli, tiny_run: TinyRun, tmp_path: Path):
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(6):
        classes = generator.integers(0, 2, (4, 4), np.uint8).repeat(4, 0).repeat(4, 1)
        picture = Image.fromarray(np.stack([200 * classes + 20] * 3, axis=2))
        rows.append({"image": picture, "annotation": Image.fromarray(classes)})
    (tmp_path / "scenes").mkdir()
    for split in ("train", "test"):
        dataset = datasets.Dataset.from_list(rows, features=features)
        dataset.to_parquet(str(tmp_path / "scenes" / f"{split}-0.parquet"))
    arguments = ["segment", str(tiny_run.folder), "--dataset", str(tmp_path / "scenes"), "--num_classes", "2"]
    outcome = cli(*arguments, "--output", str(tmp_path / "scores.json"))
    assert outcome.code == 0, outcome.err
    assert [line.split()[0] for line in outcome.out.splitlines()[:2]] == ["features", "pixels"]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [score["features"] for score in scores] == ["pixels", "random init", "encoder"]
    assert scores[0]["linear_miou"] > 0.9  # brightness is the class
    for wrong, message in [
        (
            ["--annotation_column", "mask"],
            "no column 'mask' of pictures; its columns are image, annotation",
        ),
        (["--splits", "train", "--splits", "nowhere"], "cannot open split 'nowhere' of"),
        (["--splits", "train"], "got 1 splits; give --splits twice"),
    ]:
        refused = cli(*arguments, *wrong)
        assert refused.code == 2 and message in refused.err and len(refused.err.splitlines()) == 1


def test_doctor_calls_nothing_healthy_that_it_could_not_judge(cli: Cli, tiny_run: TinyRun):
    outcome = cli("doctor", str(tiny_run.folder))
    assert outcome.code == 0 and outcome.out.startswith(
        "unknown   the log is shorter than 100 steps, or this"
    )


def test_doctor_of_a_broken_run_has_an_exit_code_for_scripts(cli: Cli, tiny_run: TinyRun, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "config.json"):
        (run / name).write_bytes((tiny_run.folder / name).read_bytes())
    state = json.loads((tiny_run.folder / "trainer_state.json").read_text())
    entry = {"loss": 1.0, "learning_rate": 1e-3, "teacher_distance": 0.0}
    state["log_history"] = [entry | {"step": step} for step in (10, 60, 120)]
    (run / "trainer_state.json").write_text(json.dumps(state))
    outcome = cli("doctor", str(run))
    assert outcome.code == 1
    assert outcome.out.startswith("teacher = student since step 10: their weights differ by 0.0e+00")
    assert len(outcome.out.splitlines()) == 1


def test_show_draws_every_picture_of_mae(cli: Cli, tiny_run: TinyRun, tmp_path: Path):
    outcome = cli("show", str(tiny_run.folder), "--output_dir", str(tmp_path))
    assert outcome.code == 0, outcome.err
    names = {"views", "reconstructions", "patch_features", "attention", "neighbors", "curves"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert outcome.out.split() == [
        str(tmp_path / f"{path.stem}.png") for path in map(Path, outcome.out.split())
    ]
    for path in tmp_path.glob("*.png"):
        assert min(Image.open(path).size) > 50


def test_resume_of_a_finished_run_ends_well(cli: Cli, tiny_run: TinyRun, tmp_path: Path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_run.folder, copy)
    outcome = cli("train", "--resume", str(copy))
    assert outcome.code == 0, outcome.err
    assert (copy / "encoder" / "model.safetensors").read_bytes() == (
        tiny_run.folder / "encoder" / "model.safetensors"
    ).read_bytes()


@pytest.fixture
def broken_data(tmp_path: Path) -> Path:
    """Folders that cannot be trained on."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "few").mkdir()
    for index in range(12):
        (tmp_path / "corrupt" / f"{index}.png").write_bytes(b"no image")
    for index in range(3):
        (tmp_path / "few" / f"{index}.png").write_bytes(random_image(index))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset {data}/missing", "missing"),
        ("--dataset {data}/texts", "holds no images"),
        ("--dataset {data}/empty", "holds no images"),
        ("--dataset {data}/corrupt", "can be read|are broken"),
        ("--dataset {data}/few", "3"),
        ("--image_column picture", 'no column "picture"'),
        ("--image_size 18", "image_size 18 is not a multiple of patch_size 4; use 16 or 20"),
        ("--mask_ration 0.5", "unknown key 'mask_ration'; did you mean 'mask_ratio'"),
        ("--max_steps many", "max_steps must be a whole number, got 'many'"),
        ("--global_batch_size 0", "global_batch_size must be at least 1, got 0"),
        ("--warmup_steps 9", "warmup_steps 9 must be less than total_steps 4"),
        ("--recipe nonsense", "unknown recipe 'nonsense'"),
        ("--init_from {data}/empty", "cannot start from"),
        ("--metric_for_best_model linear", "linear"),
        ("stray", "belongs to no key"),
    ],
)
def test_wrong_input_is_one_line(cli: Cli, broken_data: Path, tmp_path: Path, arguments: str, message: str):
    run = tmp_path / "run"
    words = arguments.format(data=broken_data).split()
    options = dict(zip(TINY_OPTIONS[::2], TINY_OPTIONS[1::2], strict=True)) | {"--probe_dataset": "sample"}
    options.pop(words[0], None)
    given = [word for pair in options.items() for word in pair]
    outcome = cli("train", "mae", "--output_dir", str(run), *given, *words)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith("hf-ssl: ") and re.search(message, last), outcome.err
    assert "Traceback" not in outcome.err
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train nonsense", "unknown method 'nonsense'"),
        ("train maee", "did you mean 'mae'"),
        ("train", "name a method or a recipe"),
        ("train --recipe simclr_tiny --no_such_key 3 --max_steps 2", "no_such_key"),
        ("train --resume {tmp}", "is no run: it has no recipe.yaml"),
        ("train mae --resume {tmp}", "leave method out"),
        ("train simclr --global_batch_size 2 --per_device_train_batch_size 1", "need other images"),
        ("train mae --output_dir {tmp}/full", "is not empty; choose another, or continue it with --resume"),
        ("evaluate {tmp}/nothing", "nothing"),
        ("evaluate {tmp} --dataset sample", "it has no config.json"),
        ("show {tmp}", "is no run: it has no recipe.yaml"),
        ("doctor {tmp}", "is no run: it has no recipe.yaml"),
        ("export {tmp} {tmp}/x", ""),
        ("embed {tmp} --dataset sample --output {tmp}/x.parquet", "it has no config.json"),
    ],
)
def test_wrong_commands_are_one_line(
    cli: Cli, tmp_path: Path, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    outcome = cli(*arguments.format(tmp=tmp_path).split())
    assert outcome.code == 2, outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("hf-ssl: ") and message in last, outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"full"}
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_debug_shows_where(cli: Cli, tmp_path: Path):
    from hf_ssl.training.recipes import RecipeError

    with pytest.raises(RecipeError):
        cli("train", "nonsense", "--debug")


def test_unforeseen_errors_say_their_type(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    import hf_ssl.training.run as run

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr(run, "train", fail)
    outcome = cli("train", "mae")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == "hf-ssl: KeyError: 'x' (--debug shows where)"
