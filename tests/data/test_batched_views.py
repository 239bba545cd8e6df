"""Views of many small images at once against the same views one by one."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ssl.data import batched_views
from hf_ssl.data.batched_views import resize_matrices
from hf_ssl.data.pixels import OPERATIONS
from hf_ssl.data.views import ViewMaker

pytestmark = pytest.mark.usefixtures("engine")

TRANSFORMS = [
    {"type": "horizontal_flip", "probability": 0.5},
    {
        "type": "color_jitter",
        "probability": 0.8,
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
    },
    {"type": "grayscale", "probability": 0.2},
    {"type": "gaussian_blur", "probability": 0.5},
    {"type": "solarize", "probability": 0.2},
]


def images(count: int, height: int = 32, width: int = 32) -> list[np.ndarray]:
    """Noise, dark noise, and few-coloured images whose hues and saturations lie on the cuts of eight bits."""
    generator = np.random.default_rng(0)
    shape = (count, height, width, 3)
    noise = generator.integers(0, 256, shape, dtype=np.uint8)
    noise[1::3] //= 8
    noise[2::3] = generator.choice(np.array([0, 85, 128, 170, 255], dtype=np.uint8), noise[2::3].shape)
    return list(noise)


def recipe(interpolation: str = "bilinear", **entry) -> list[dict]:
    crop = {"scale": [0.1, 1.0], "interpolation": interpolation}
    return [{"count": 2, "size": 32, "crop": crop, "transforms": TRANSFORMS, **entry}]


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - {"horizontal_flip"}))
def test_operation_on_a_batch_is_that_on_each_image(operation):
    pixels = images(30)
    values = {
        "hue": np.linspace(-0.5, 0.5, 30),
        "gaussian_blur": np.linspace(0.1, 2.0, 30),
        "solarize": np.arange(30) * 9.0,
    }.get(operation, np.linspace(0, 2, 30))
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    got = batched_views._OPERATIONS[operation](batch, torch.tensor(values).float()[:, None, None, None])
    for index, (image, value) in enumerate(zip(pixels, values, strict=True)):
        expected = np.asarray(OPERATIONS[operation](Image.fromarray(image), float(np.float32(value))))
        assert np.array_equal(got[index].permute(1, 2, 0).numpy(), expected), value


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 45), (96, 64)])
def test_bilinear_views_are_those_made_one_by_one(height, width):
    maker, pixels = ViewMaker(recipe()), images(40, height, width)
    seeds = [(1, 2, sample) for sample in range(40)]
    batches = maker.make_batch(pixels, seeds)
    assert [tuple(batch.shape) for batch in batches] == [(40, 3, 32, 32)] * 2
    single = [torch.stack(views) for views in zip(*map(maker, pixels, seeds), strict=True)]
    for batch, expected in zip(batches, single, strict=True):
        assert batch.dtype == torch.uint8
        # A rounding of the crop may go the other way; contrast, saturation and hue then pass it on.
        assert (batch != expected).float().mean() < 0.02


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_of_a_batch_is_within_one_level(interpolation):
    maker, pixels = ViewMaker(recipe(interpolation, transforms=TRANSFORMS[:1])), images(40)
    seeds = [(0, 0, sample) for sample in range(40)]
    single = [torch.stack(views) for views in zip(*map(maker, pixels, seeds), strict=True)]
    for batch, expected in zip(maker.make_batch(pixels, seeds), single, strict=True):
        difference = (batch.int() - expected.int()).abs()
        assert difference.max() <= (1 if interpolation == "bilinear" else 2)
        assert (difference > 0).float().mean() < 0.01


def test_batches_longer_than_a_chunk_keep_their_order(monkeypatch):
    maker, pixels = ViewMaker(recipe()), images(10)
    seeds = [(0, 0, sample) for sample in range(10)]
    whole = maker.make_batch(pixels, seeds)
    monkeypatch.setattr(batched_views, "_CHUNK", 3)
    for first, second in zip(whole, maker.make_batch(pixels, seeds), strict=True):
        assert torch.equal(first, second)


def test_images_of_several_sizes_or_large_ones_are_made_one_by_one():
    maker = ViewMaker(recipe())
    for pixels in (images(1) + images(1, 40, 30), images(2, 120, 100)):
        seeds = [(0, 0, 5), (0, 0, 6)]
        expected = [torch.stack(views) for views in zip(*map(maker, pixels, seeds), strict=True)]
        assert all(map(torch.equal, maker.make_batch(pixels, seeds), expected))


def test_local_views_come_in_their_size():
    local = recipe(kind="local", size=16, count=3)
    batches = ViewMaker([*recipe(), *local]).make_batch(images(4), [(0, 0, i) for i in range(4)])
    assert [batch.shape[-1] for batch in batches] == [32, 32, 16, 16, 16]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_matrices_are_torch_s_antialiased_interpolation(interpolation):
    signal = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    for start, length, size in [(0, 40, 16), (7, 25, 32), (3, 32, 32), (10, 9, 20)]:
        cut = signal[..., start : start + length, :]
        expected = torch.nn.functional.interpolate(cut, size=(size, 40), mode=interpolation, antialias=True)
        (matrix,) = resize_matrices(
            torch.tensor([float(start)]), torch.tensor([float(length)]), 40, size, interpolation
        )
        torch.testing.assert_close(matrix @ signal[0, 0], expected[0, 0], rtol=0, atol=1e-5)
