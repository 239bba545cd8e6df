"""Images that carry a number, so that a test can tell which one came out."""

import io
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hf_ssl.data import views as view_module
from hf_ssl.data.decoding import decode_image

SIDE = 4


def encode(number: int) -> bytes:
    """A PNG whose first pixel is `number` (below 65,536), the rest black."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[0, 0, :2] = divmod(number, 256)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def read_number(pixels_CHW: Tensor) -> int:
    return int(pixels_CHW[0, 0, 0]) * 256 + int(pixels_CHW[1, 0, 0])


class NumberedViews:
    """Stands in for a `ViewMaker`: two global views that keep the number, one local, all with noise."""

    kinds = ["global", "local", "global"]

    def decode(self, data: Any, seed: tuple[int, int, int]) -> NDArray[np.uint8]:
        return decode_image(data)

    def __call__(self, image: Any, seed: tuple[int, int, int]) -> list[Tensor]:
        image_CHW = torch.from_numpy(decode_image(image)[:SIDE, :SIDE].copy()).permute(2, 0, 1)
        noise = np.random.default_rng(seed).integers(0, 256, (3, SIDE, SIDE), np.uint8)
        views = [image_CHW.clone() for _ in range(3)]
        for number, view_CHW in enumerate(views):
            view_CHW[2] = torch.from_numpy(noise[number])
        return [views[0], views[1][:, :2, :2], views[2]]

    def make_batch(self, images: list[Any], seeds: list[tuple[int, int, int]]) -> list[Tensor]:
        views = [self(image, seed) for image, seed in zip(images, seeds, strict=True)]
        return [torch.stack(view) for view in zip(*views, strict=True)]


@pytest.fixture
def numbered_rows() -> Callable[..., datasets.Dataset]:
    """Makes a `Dataset` of images `first` to `first + count`, labels = number modulo 3; some broken."""

    def make(count: int, first: int = 0, broken: tuple[int, ...] = ()) -> datasets.Dataset:
        numbers = range(first, first + count)
        files = [b"no image" if number in broken else encode(number) for number in numbers]
        return datasets.Dataset.from_dict(
            {"image": [{"bytes": file, "path": None} for file in files], "label": [n % 3 for n in numbers]},
            features=datasets.Features(
                {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zero", "one", "two"])}
            ),
        )

    return make


@pytest.fixture
def numbered_png() -> Callable[[int], bytes]:
    return encode


@pytest.fixture
def number_of() -> Callable[[Tensor], int]:
    return read_number


@pytest.fixture
def numbered_views() -> NumberedViews:
    return NumberedViews()


@pytest.fixture(params=["compiled", "plain"])
def engine(request, monkeypatch) -> str:
    """A test that uses it runs with both ways to make views."""
    if request.param == "compiled":
        pytest.importorskip("numba", reason="comes with the extra `fast`")
    monkeypatch.setattr(view_module, "can_compile", lambda: request.param == "compiled")
    return request.param
