"""Runs on a dataset of the Hub: one commit from the first step to the last, failures end them in one line."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_ssl.data import readers
from hf_ssl.training.recipes import load_recipe
from tests.cli.conftest import TINY_OPTIONS, Outcome, TinyRun
from tests.hub_client import without_waits
from tests.hub_server import HubServer

Cli = Callable[..., Outcome]

NAME = "lab/noise"
OPTIONS = " ".join(TINY_OPTIONS).replace("--max_steps 4", "--max_steps 8").split()


def shard(seed: int) -> bytes:
    """A parquet file of 32 images of 16 x 16 pixels in 4 row groups."""
    images = np.random.default_rng(seed).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in images]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    file = io.BytesIO()
    rows.to_parquet(file, batch_size=8)
    return file.getvalue()


@pytest.fixture
def noise(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub with 64 images in 2 parquet files, read 16 at a time."""
    without_waits(monkeypatch, tries=2)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 16)
    files = {f"data/train-0000{number}-of-00002.parquet": shard(number) for number in range(2)}
    hub.commit("datasets", NAME, files)
    return hub


def train(cli: Cli, folder: Path) -> Outcome:
    return cli("train", "mae", "--output_dir", str(folder), "--dataset", NAME, *OPTIONS)


def same_weights(first: Path, second: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    return all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_that_lost_a_shard_is_resumed_as_though_nothing_had_happened(
    noise: HubServer, cli: Cli, tmp_path: Path
):
    whole, broken = tmp_path / "whole", tmp_path / "broken run"
    outcome = train(cli, whole)
    assert outcome.code == 0, outcome.err
    reads = len(noise.asked(r"GET .*\.parquet"))
    (commit,) = (commit.oid for commit in noise.repositories["datasets", NAME].branches["main"].history()[:1])
    assert load_recipe(str(whole / "recipe.yaml")).data.dataset == f"{NAME}@{commit}"

    # Of the row groups, those of the last block are read last: for steps 7 and 8.
    lost = noise.fail(r"GET .*\.parquet", status=404, times=1000, skip=reads - 2)
    outcome = train(cli, broken)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1].startswith("hf-ssl: cannot read hf://datasets/lab/noise@" + commit)
    way_on = rf"continue from checkpoint-\d with: hf-ssl train --resume '{re.escape(str(broken))}'"
    assert re.search(
        rf"data/train-0000\d-of-00002.parquet: the server answers 404 Not Found; {way_on}$",
        outcome.err.strip(),
    )

    noise.faults.remove(lost)
    noise.commit("datasets", NAME, {"data/train-00000-of-00002.parquet": shard(7)})
    outcome = cli("train", "--resume", str(broken))
    assert outcome.code == 0, outcome.err
    assert same_weights(whole, broken)


def test_a_dataset_that_cannot_be_reached_leaves_no_run(noise: HubServer, cli: Cli, tmp_path: Path):
    noise.stop()
    outcome = train(cli, tmp_path / "run")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(
        rf"^hf-ssl: cannot open {NAME}: ConnectError: .*, still after \d+ s and 2 tries$",
        outcome.err,
        re.MULTILINE,
    )
    assert not (tmp_path / "run").exists()


def test_a_start_from_weights_that_cannot_be_had_is_said_in_one_line(
    noise: HubServer, cli: Cli, tmp_path: Path, tiny_run: TinyRun
):
    encoder = {path.name: path.read_bytes() for path in (tiny_run.folder / "encoder").iterdir()}
    cut = {**encoder, "model.safetensors": encoder["model.safetensors"][:-100]}
    noise.commit("models", "lab/cut", cut)
    noise.commit("models", "lab/silent", encoder)
    noise.fail("(HEAD|GET) .*/lab/silent/resolve/.*/model.safetensors", status=503, times=1000)
    noise.fail("(HEAD|GET) .*/lab/away", status=503, times=1000)
    for name, message in (
        ("lab/away", "cannot load lab/away: the server answers 503 Service Unavailable"),
        ("lab/cut", "the weights of 'lab/cut@[0-9a-f]{7}' are damaged or cut short"),
        ("lab/silent", "cannot load lab/silent@[0-9a-f]{7}: the server answers 503 Service Unavailable"),
    ):
        outcome = cli("train", "mae", "--init_from", name, "--output_dir", str(tmp_path / "run"), *OPTIONS)
        assert (outcome.code, outcome.out) == (2, "")
        assert re.match(f"hf-ssl: {message}", outcome.err.splitlines()[-1]), outcome.err
        assert not (tmp_path / "run").exists()
