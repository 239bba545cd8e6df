"""Fixtures shared by all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


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
