"""Two tiny finished runs, one with labels and one without."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_ssl.training.run import Run, train
from tests.training.conftest import random_image
from tests.training.test_run import TINY as TINY_MAE

TINY_CNN = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
TINY_MOCO: dict[str, Any] = {
    **{name: value for name, value in TINY_MAE.items() if name in ("global_batch_size", "bf16", "max_steps")},
    **{name: value for name, value in TINY_MAE.items() if name.startswith(("probe_", "save", "eval", "log"))},
    "split": None,
    "image_size": 16,
    "model_args": TINY_CNN,
    "queue_length": 16,
    "projection_size": 8,
    "warmup_steps": 0,
    "probe_num_neighbors": 1,
    "probe_linear": True,
    "max_steps": 3,
}


@pytest.fixture(scope="session")
def image_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten images, in a folder whose path must not be published."""
    root = tmp_path_factory.mktemp("private") / "pets"
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for index in range(10):
            (root / name / f"{index}.png").write_bytes(random_image(100 * label + index))
    return root


@pytest.fixture(scope="session")
def moco_run(image_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A CNN with the small stem, teacher and queue, and scores."""
    folder = tmp_path_factory.mktemp("runs") / "moco"
    yield train("moco", output_dir=str(folder), dataset=str(image_classes), **TINY_MOCO)


@pytest.fixture(scope="session")
def mae_run(image_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A ViT with a decoder, trained on images without labels."""
    folder = tmp_path_factory.mktemp("runs") / "mae"
    yield train("mae", output_dir=str(folder), dataset=str(image_classes / "cat"), **TINY_MAE)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client repeats at once what it would repeat after some seconds."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
