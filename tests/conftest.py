"""Fixtures shared by all tests, which never speak to the real Hub: theirs is a server on this machine."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub_server import HubServer

# Before any library that reads them is imported; child processes inherit them.
HUB = HubServer()
HUB_HOME = tempfile.mkdtemp(prefix="hub-home-")
atexit.register(shutil.rmtree, HUB_HOME, ignore_errors=True)
os.environ.update(HUB.environment(HUB_HOME))

from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The Hub of all tests, empty; every client of this process and of its children speaks to it."""
    from huggingface_hub import HfFileSystem

    HUB.clear()
    HfFileSystem.clear_instance_cache()  # it keeps listings
    yield HUB
    HUB.clear()


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Tensors written by the authors' implementations, by file name (see `tests/golden/README.md`)."""
    return lambda name: load_file(ROOT / "tests" / "golden" / f"{name}.safetensors")


@pytest.fixture
def shared_dir() -> Path:
    """The folder of real images beside the checkout; tests that need it are skipped where it is absent."""
    for folder in (ROOT.parent / "shared", ROOT.parent.parent / "shared"):
        if (folder / "data").is_dir():
            return folder
    pytest.skip("needs the data folder ../shared beside the checkout")
