"""A model is pulled whole or not at all; failures that pass are repeated, one line names those that stay."""

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub.file_download as download
import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoModel, ViTConfig, ViTModel

from hf_ssl.data import remote
from hf_ssl.training.pulling import pulled
from tests.hub_client import without_waits
from tests.hub_server import HubServer

NAME = "lab/vit"
NUMBERS = itertools.count()


@pytest.fixture
def model() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config, add_pooling_layer=False)


@pytest.fixture
def files(model: ViTModel, tmp_path: Path) -> dict[str, bytes]:
    """The model as a repository: config.json and 220 kB of weights."""
    model.save_pretrained(tmp_path / "model")
    return {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    without_waits(monkeypatch, tries=8)


def pull(name: str = NAME) -> Any:
    return pulled(name, lambda: AutoModel.from_pretrained(name, add_pooling_layer=False))


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def stored_weights(name: str = NAME) -> list[bytes]:
    """What the cache would give for the weights of a model, whatever revision."""
    folder = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return [path.read_bytes() for path in folder.glob("snapshots/*/model.safetensors")]


@pytest.mark.parametrize(
    "request_line", ["GET .*/model.safetensors", "HEAD .*/model.safetensors", "HEAD .*/config.json"]
)
@pytest.mark.parametrize(
    "what",
    [{"status": 500}, {"status": 503, "times": 7}, {"status": 429, "retry_after": 1}, {"cut_after": 0}],
    ids=str,
)
def test_failures_that_pass_are_repeated(
    hub: HubServer, files: dict[str, bytes], model: ViTModel, request_line: str, what: dict[str, int]
):
    name = f"{NAME}-{next(NUMBERS)}"  # nothing of it is in the cache
    hub.commit("models", name, files)
    hub.fail(request_line, **what)
    assert same(pull(name), model)


@pytest.mark.parametrize("what", [{"cut_after": 50_000}, {"keep": 50_000}], ids=str)
def test_weights_that_stay_cut_never_appear_in_the_cache(
    hub: HubServer, files: dict[str, bytes], model: ViTModel, what: dict[str, int]
):
    name = f"{NAME}-{next(iter(what))}"
    hub.commit("models", name, files)
    hub.fail("GET .*/model.safetensors", times=10_000, **what)
    with pytest.raises(
        ValueError, match=rf"^cannot load {name}: .*, still after \d+ s and 8 tries$"
    ) as caught:
        pull(name)
    assert "\n" not in str(caught.value)
    assert stored_weights(name) == []
    hub.faults.clear()
    assert same(pull(name), model)
    assert stored_weights(name) == [files["model.safetensors"]]


def test_weights_that_do_not_answer_are_not_said_to_be_missing(hub: HubServer, files: dict[str, bytes]):
    hub.commit("models", "lab/silent", files)
    hub.fail("(HEAD|GET) .*/model.safetensors", status=503, times=10_000)
    with pytest.raises(
        ValueError, match=r"^cannot load lab/silent: the server answers 503 Service Unavailable"
    ):
        pull("lab/silent")


def test_a_server_that_is_killed_in_the_middle_of_a_pull_is_waited_for(
    hub: HubServer, files: dict[str, bytes], model: ViTModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.5, 0.5, 0.5))
    hub.commit("models", "lab/killed", files)
    hub.fail("GET .*/model.safetensors", bytes_per_second=200_000)

    def restart() -> None:
        while not hub.asked("GET .*/model.safetensors"):
            time.sleep(0.02)
        time.sleep(0.3)
        hub.stop()
        assert stored_weights("lab/killed") == []
        time.sleep(0.3)
        hub.start()

    killer = threading.Thread(target=restart)
    killer.start()
    assert same(pull("lab/killed"), model)
    killer.join()


def test_what_is_no_failure_of_the_hub_is_said_at_once(hub: HubServer, files: dict[str, bytes]):
    hub.commit("models", "lab/no-weights", {"config.json": files["config.json"]})
    for name, message in (
        ("lab/nothing", "lab/nothing is not a .* valid model identifier"),
        ("lab/no-weights", "no file named .*model.safetensors|does not appear to have a file"),
        ("./nowhere/at-all", "nowhere"),
    ):
        hub.requests.clear()
        with pytest.raises(OSError, match=message):
            pull(name)
        assert len(hub.requests) < 12


def test_damaged_weights_are_said_in_one_line(hub: HubServer, files: dict[str, bytes], tmp_path: Path):
    cut = {**files, "model.safetensors": files["model.safetensors"][:50_000]}
    hub.commit("models", "lab/damaged", cut)
    (tmp_path / "damaged").mkdir()
    for name, content in cut.items():
        (tmp_path / "damaged" / name).write_bytes(content)
    for name in ("lab/damaged", str(tmp_path / "damaged")):
        with pytest.raises(
            ValueError, match=rf"^the weights of '{name}' are damaged or cut short: "
        ) as caught:
            pull(name)
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_half(
    hub: HubServer, files: dict[str, bytes], model: ViTModel, monkeypatch: pytest.MonkeyPatch
):
    hub.commit("models", "lab/large", files)
    http_get = download.http_get

    def write_until_full(url: str, temp_file: Any, *args: Any, **kwargs: Any) -> None:
        if "safetensors" not in url:
            return http_get(url, temp_file, *args, **kwargs)
        temp_file.write(files["model.safetensors"][:1000])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "http_get", write_until_full)
        with pytest.raises(
            OSError, match=f"^cannot load 'lab/large': no space left in {HF_HUB_CACHE}; free some"
        ):
            pull("lab/large")
    assert stored_weights("lab/large") == []
    assert same(pull("lab/large"), model)
