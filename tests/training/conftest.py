"""Trainers on a few random images, with models of milliseconds."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import set_seed

from hf_ssl.data.sources import ImageSource, open_images
from hf_ssl.modeling import METHODS
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.trainer import SSLTrainer
from tests.modeling.tiny import BY_NAME

SIDE = 16


def random_image(seed: int, side: int = SIDE) -> bytes:
    """A PNG: a coloured gradient with noise."""
    generator = np.random.default_rng(seed)
    base = generator.integers(0, 200, (1, 1, 3)) + np.linspace(0, 50, side)[:, None, None]
    pixels = np.clip(base + generator.normal(0, 10, (side, side, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_source(num_images: int = 20, first_seed: int = 0) -> ImageSource:
    """A source in memory."""
    rows = [{"bytes": random_image(first_seed + index), "path": None} for index in range(num_images)]
    features = datasets.Features({"image": datasets.Image()})
    return open_images(datasets.Dataset.from_dict({"image": rows}, features=features))


class FixedBatches:
    """Stands in for the loader, whose order depends on batch size and processes: always the same images.

    Args:
        side: of the images.
        num_views: 0: without an axis for them.
        batch_size: of a batch of this process.
        rank: number of the process; takes every `world_size`-th batch.
        world_size: number of processes.
    """

    def __init__(self, side: int, num_views: int, batch_size: int, rank: int = 0, world_size: int = 1):
        views = (num_views,) if num_views else ()
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (64, *views, 3, side, side), generator=generator, dtype=torch.uint8)
        self._batches = pixels.split(batch_size)[rank::world_size]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"pixel_values": batch} for batch in self._batches)


@pytest.fixture(scope="session")
def source() -> ImageSource:
    """20 images."""
    return make_source()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """12 images in a flat folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index:02}.png").write_bytes(random_image(index))
    return folder


@pytest.fixture
def make_trainer(tmp_path: Path, source: ImageSource) -> Callable[..., SSLTrainer]:
    """Build a trainer of a tiny method; options are training arguments."""

    def make(
        method: str = "moco-v2",
        folder: str = "run",
        sources: ImageSource | list[ImageSource] | None = None,
        weights: list[float] | None = None,
        probe: Any = None,
        **options: Any,
    ) -> SSLTrainer:
        row = BY_NAME[method]
        defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "seed": 3}
        args = SSLTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **options})
        set_seed(3)
        return SSLTrainer(
            model=row.build(),
            args=args,
            train_dataset=sources or source,
            processing_class=METHODS[row.method].processor_class.for_image_size(row.image_size),
            weights=weights,
            probe=probe,
        )

    return make
