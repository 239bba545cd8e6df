"""Compiled loops against the same in Pillow, numpy and torch."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("numba", reason="comes with the extra `fast`")

from hf_ssl.data.compiled_draws import compile_recipe, draw_views, fill_uniforms  # noqa: E402
from hf_ssl.data.compiled_pixels import STEP_CODES, compiled, make_planes, resize_crops, run_steps  # noqa: E402
from hf_ssl.data.pixels import OPERATIONS, crop_and_resize  # noqa: E402
from hf_ssl.data.view_recipe import parse_recipe  # noqa: E402
from hf_ssl.data.views import Step, ViewMaker  # noqa: E402
from hf_ssl.modeling import METHODS  # noqa: E402

VALUES = {
    "brightness": [0.0, 0.2, 0.6, 1.0, 1.37, 2.0],
    "contrast": [0.0, 0.2, 0.6, 1.0, 1.37, 2.0],
    "saturation": [0.0, 0.2, 0.6, 1.0, 1.37, 2.0],
    "hue": [-0.5, -0.13, -0.003, 0.0, 0.003, 0.1, 0.5],
    "grayscale": [0.0],
    "solarize": [0, 1, 128, 200, 255, 256],
}
NAMES = {code: name for name, code in STEP_CODES.items()}


def pictures(side: int) -> list[np.ndarray]:
    """Noise, dark noise, few colours whose hues lie on the cuts of eight bits, and smooth colours."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    noise[1] //= 8
    noise[2] = generator.choice(np.array([0, 85, 128, 170, 255], dtype=np.uint8), noise[2].shape)
    smooth = np.linspace(0, 255, 3 * side * side).reshape(side, side, 3).astype(np.uint8)
    return [*noise, smooth]


def step(image: np.ndarray, name: str, value: float) -> np.ndarray:
    view = np.ascontiguousarray(image.transpose(2, 0, 1))[None]
    run_steps(view, np.array([[STEP_CODES[name]]], np.int8), np.array([[float(value)]]))
    return view[0].transpose(1, 2, 0)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("side", [1, 17, 96])
def test_colours_are_pillow_s_to_the_last_bit(name, side):
    for image in pictures(side):
        for value in VALUES[name]:
            expected = np.asarray(OPERATIONS[name](Image.fromarray(image), value))
            assert np.array_equal(step(image, name, value), expected), value


def test_every_colour_turns_its_hue_as_pillow_does():
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, levels.size, 3)
    for turns in (0.0, 0.07, -0.2):
        expected = np.asarray(OPERATIONS["hue"](Image.fromarray(colours), turns))
        assert np.array_equal(step(colours, "hue", turns), expected)


@pytest.mark.parametrize("side", [1, 2, 5, 32, 97, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0, 9.0])
def test_blur_differs_by_a_level_in_few_values(side, sigma):
    values = []
    for image in pictures(side):
        expected = np.asarray(OPERATIONS["gaussian_blur"](Image.fromarray(image), sigma))
        values.append(np.abs(step(image, "gaussian_blur", sigma).astype(int) - expected).ravel())
    difference = np.concatenate(values)
    assert difference.max() <= 1
    assert difference.mean() < 1e-4


@pytest.mark.parametrize("is_flipped", [False, True])
def test_planes_hold_the_pixels(is_flipped):
    image = pictures(9)[0]
    planes = np.empty((3, 9, 9), np.uint8)
    make_planes(image, is_flipped, planes)
    assert np.array_equal(planes, (image[:, ::-1] if is_flipped else image).transpose(2, 0, 1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (96, 61, 32), (33, 96, 96), (96, 96, 7)])
def test_small_crops_are_resized_as_large_ones_are(interpolation, height, width, size):
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (40, height, width, 3), dtype=np.uint8)
    lengths = generator.integers(1, [height + 1, width + 1], (40, 2))
    corners = generator.integers(0, [height, width] - lengths + 1)
    boxes, flips = np.hstack([corners, lengths]), np.arange(40) % 2 == 0
    views = np.empty((40, 3, size, size), np.uint8)
    resize_crops(images, boxes, flips, interpolation == "bicubic", views)
    for image, box, is_flipped, view in zip(images, boxes, flips, views, strict=True):
        expected = crop_and_resize(image, tuple(box.tolist()), size, interpolation)
        assert np.array_equal(view.transpose(1, 2, 0), expected[:, ::-1] if is_flipped else expected)


def test_uniform_numbers_are_numpy_s():
    for seed, epoch, sample in [(0, 0, 0), (7, 3, 12345), (2**63, 2**64 - 1, (5 << 48) + 2**40)]:
        key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, sample, 0], np.uint64)
        for count in (1, 22, 61):
            numbers = np.empty(count)
            fill_uniforms(*np.array([seed, epoch, sample], np.uint64), numbers)
            generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
            assert np.array_equal(numbers, generator.random(count))


OF_IMAGES = sorted(set(METHODS) - {"vjepa"})  # views of clips have no compiled loops


@pytest.mark.parametrize("method", OF_IMAGES)
def test_draws_are_those_made_one_by_one(method):
    views = METHODS[method].processor_class.for_image_size(96).views
    maker, program = ViewMaker(views, compiled=False), compile_recipe(parse_recipe(views))
    sizes = np.random.default_rng(2).integers(8, 300, (500, 2))
    seeds = [(11, sample % 3, (sample << 40) + sample) for sample in range(500)]
    draws = draw_views(program, sizes, seeds)
    for place, ((height, width), seed) in enumerate(zip(sizes.tolist(), seeds, strict=True)):
        for number, expected in enumerate(maker.draw(height, width, seed)):
            codes, values = draws.codes[number, place], draws.values[number, place]
            steps = [Step(NAMES[code], value) for code, value in zip(codes, values, strict=True) if code]
            assert tuple(draws.boxes[number, place]) == expected.crop
            assert steps == [other for other in expected.steps if other.operation != "horizontal_flip"]
            flips = sum(other.operation == "horizontal_flip" for other in expected.steps)
            assert draws.is_flipped[number, place] == (flips % 2 == 1)


def test_a_recipe_with_anchors_and_two_flips_gives_the_same_views():
    transforms = [
        {"type": "horizontal_flip", "probability": 0.5},
        {"type": "solarize", "probability": 0.5},
        {"type": "horizontal_flip", "probability": 0.5},
    ]
    views = [
        {"count": 2, "size": 24, "crop": {"scale": [0.2, 1.0]}, "transforms": transforms},
        {"count": 2, "size": 40, "kind": "anchor"},
    ]
    fast, plain = ViewMaker(views, compiled=True), ViewMaker(views, compiled=False)
    for sample in range(20):
        got, expected = (maker(pictures(60)[0], (0, 1, sample)) for maker in (fast, plain))
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("method", OF_IMAGES)
@pytest.mark.parametrize("side", [32, 130])
def test_views_of_every_method_are_the_same(method, side):
    views = METHODS[method].processor_class.for_image_size(64).views
    fast, plain = ViewMaker(views, compiled=True), ViewMaker(views, compiled=False)
    images, seeds = pictures(side), [(3, 0, sample) for sample in range(4)]
    batch = fast.make_batch(images, seeds)
    for place, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        own = fast(image, seed)
        for number, (got, expected) in enumerate(zip(own, plain(image, seed), strict=True)):
            assert torch.equal(batch[number][place], got)
            difference = (got.int() - expected.int()).abs()
            # What follows a blur passes its one level on: solarize turns 127 into 127 and 128 into 127.
            assert (difference > 1).float().mean() < 1e-4, number
            assert (difference > 0).float().mean() < 1e-3, number


def test_code_is_compiled_also_where_it_cannot_be_kept(monkeypatch):
    def njit(cache: bool = False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")  # as numba says it
        return original(**options)

    import numba

    original = numba.njit
    monkeypatch.setattr(numba, "njit", njit)
    assert compiled()(lambda number: number + 1)(1) == 2
