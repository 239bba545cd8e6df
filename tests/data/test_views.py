"""Views against torchvision (operations, given the drawn values) and against closed forms (distributions)."""

import collections
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvF

from hf_ssl.data.pixels import OPERATIONS, blur, crop_and_resize, gaussian_taps
from hf_ssl.data.view_recipe import CropSpec
from hf_ssl.data.views import Step, ViewMaker, ViewParameters, draw_crop, evaluation_view

JITTER = {"type": "color_jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
NUM_DRAWS = 2000

pytestmark = pytest.mark.usefixtures("engine")


def recipe(*transforms: dict[str, Any], **entry: Any) -> list[dict[str, Any]]:
    return [{"size": 32, "crop": {"scale": [0.2, 1.0]}, "transforms": list(transforms), **entry}]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(shared_dir, name: str = "chelsea.jpg") -> Image.Image:
    return Image.open(shared_dir / "data" / "photos" / name).convert("RGB")


def draws(views: list[dict[str, Any]], height: int = 500, width: int = 500, count: int = NUM_DRAWS):
    """Parameters of the first view of `count` samples."""
    maker = ViewMaker(views)
    return [maker.draw(height, width, (0, 0, sample))[0] for sample in range(count)]


def within_three_sigma(count: int, probability: float, trials: int = NUM_DRAWS) -> bool:
    return abs(count - trials * probability) <= 3 * math.sqrt(trials * probability * (1 - probability))


def assert_uniform(values: list[float], low: float, high: float) -> None:
    """Kolmogorov's test at 0.1 % and the bounds."""
    unit = np.sort((np.array(values) - low) / (high - low))
    assert 0 <= unit[0] and unit[-1] <= 1
    ranks = np.arange(1, len(unit) + 1) / len(unit)
    assert np.abs(unit - ranks).max() < 1.95 / math.sqrt(len(unit))


# Operations: equal to torchvision, given the value.


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_and_resize_is_pillow_s_within_one_level(shared_dir, size, interpolation):
    image = photo(shared_dir)
    for box in [(10, 20, 250, 300), (0, 0, 300, 451), (100, 100, 20, 31), (60, 30, size, size)]:
        mode = InterpolationMode(interpolation)
        expected = np.asarray(tvF.resized_crop(image, *box, [size, size], mode))
        got = crop_and_resize(np.asarray(image), box, size, interpolation)
        assert got.shape == (size, size, 3)
        difference = np.abs(got.astype(int) - expected)
        # Pillow rounds between the two axes of bicubic, which adds up to two levels in single values.
        assert difference.max() <= (1 if interpolation == "bilinear" else 2)
        assert (difference > 1).mean() < 1e-4


def test_pixels_outside_the_crop_have_no_influence():
    image = noise(40, 40)
    elsewhere = 255 - image
    elsewhere[5:25, 8:38] = image[5:25, 8:38]
    first, second = (crop_and_resize(pixels, (5, 8, 20, 30), 16, "bicubic") for pixels in (image, elsewhere))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("operation", "reference", "values"),
    [
        ("brightness", tvF.adjust_brightness, [0.0, 0.6, 1.0, 1.37, 1.8]),
        ("contrast", tvF.adjust_contrast, [0.0, 0.6, 1.0, 1.37, 1.8]),
        ("saturation", tvF.adjust_saturation, [0.0, 0.6, 1.0, 1.37, 1.8]),
        ("hue", tvF.adjust_hue, [-0.5, -0.1, -0.003, 0.0, 0.003, 0.07, 0.5]),
        ("solarize", tvF.solarize, [0, 128, 200, 256]),
        ("grayscale", lambda image, _: tvF.to_grayscale(image, 3), [0]),
        ("horizontal_flip", lambda image, _: tvF.hflip(image), [0]),
    ],
)
def test_operation_is_torchvision_s_to_the_last_bit(shared_dir, operation, reference, values):
    for image in (photo(shared_dir).resize((96, 64)), Image.fromarray(noise(33, 47))):
        for value in values:
            assert np.array_equal(OPERATIONS[operation](image, value), reference(image, value)), value


def test_solarize_and_grayscale_match_the_golden_values(golden):
    case = golden("views")
    image = Image.fromarray(case["image_uint8"].numpy())
    assert np.array_equal(OPERATIONS["solarize"](image, 128), case["solarize_128"].numpy())
    gray = np.asarray(OPERATIONS["grayscale"](image, 0))
    assert all(np.array_equal(gray[:, :, channel], case["grayscale_pil"].numpy()) for channel in range(3))


def test_blur_matches_the_golden_values_with_their_three_taps(golden):
    case = golden("views")
    blurred = blur(case["blur_in"][None], sigma=0.7, radius=1)[0]
    torch.testing.assert_close(blurred, case["blur_out_reflect_padding"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("side", "sigma"), [(224, 0.1), (224, 2.0), (96, 1.0), (32, 0.7)])
def test_blur_taps_match_the_golden_values(golden, side, sigma):
    taps = golden("views")[f"blur_kernel_side{side}_sigma{sigma}"]
    ours = torch.tensor(gaussian_taps(sigma, radius=len(taps) // 2), dtype=torch.float64)
    torch.testing.assert_close(ours, taps, rtol=0, atol=1e-7)  # the authors' taps are of float32


@pytest.mark.parametrize("side", [32, 130])  # the matrix path and the shifted additions
@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_blur_is_torchvision_s_gaussian_of_the_same_taps(side, sigma):
    image = Image.fromarray(noise(side, side))
    radius = math.ceil(3 * sigma)
    expected = tvF.gaussian_blur(tvF.pil_to_tensor(image), [2 * radius + 1] * 2, [sigma] * 2).permute(1, 2, 0)
    got = np.asarray(OPERATIONS["gaussian_blur"](image, sigma))
    assert np.abs(got.astype(int) - expected.numpy()).max() <= 1


def test_blur_keeps_a_constant_image_also_where_it_is_smaller_than_the_kernel():
    for side in (1, 4, 32, 100):
        image = Image.new("RGB", (side, side), (255, 7, 130))
        assert np.array_equal(OPERATIONS["gaussian_blur"](image, 2.0), image)


# Distributions of what is drawn.


def test_crop_falls_back_to_the_golden_central_box(golden):
    case = golden("views")
    never_fits = CropSpec(scale=(4.0, 4.0), ratio=(3 / 4, 4 / 3), interpolation="bilinear")
    sizes, boxes = case["rrc_fallback_width_height"].tolist(), case["rrc_fallback_top_left_h_w"].tolist()
    for (width, height), expected in zip(sizes, boxes, strict=True):
        assert list(draw_crop(never_fits, height, width, [0.5] * 22)) == expected


def test_crop_area_is_uniform_and_aspect_log_uniform():
    # In a square image every box with area <= 3/4 fits, so no attempt is refused and the ranges are exact.
    crops = [p.crop for p in draws(recipe(crop={"scale": [0.2, 0.75]}), 5000, 5000)]
    assert_uniform([crop.height * crop.width / 5000**2 for crop in crops], 0.2 - 1e-3, 0.75 + 1e-3)
    edge = math.log(4 / 3) + 1e-3
    assert_uniform([math.log(crop.width / crop.height) for crop in crops], -edge, edge)


def test_crop_corner_is_uniform_and_the_box_inside_the_image():
    crops = [p.crop for p in draws(recipe(), 375, 500)]
    assert all(0 <= c.top <= 375 - c.height and 0 <= c.left <= 500 - c.width for c in crops)
    for offsets in (
        [(c.top + 0.5) / (376 - c.height) for c in crops if c.height < 300],
        [(c.left + 0.5) / (501 - c.width) for c in crops if c.width < 400],
    ):
        assert_uniform(offsets, 0, 1)


def test_crop_of_a_small_image_has_torchvision_s_frequencies():
    # At 3 x 2 pixels rounding, refusals and the fallback decide; torchvision's own draws are the reference.
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image, count = torch.zeros(3, 2, 3), 4000
    reference = collections.Counter(
        tuple(RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])) for _ in range(count)
    )
    ours = collections.Counter(tuple(p.crop) for p in draws(recipe(crop={"scale": [0.08, 1.0]}), 2, 3, count))
    assert reference.keys() == ours.keys()
    for box, expected in reference.items():
        assert abs(ours[box] - expected) < 4 * math.sqrt(2 * expected) + 1


def test_jitter_factors_are_uniform_in_their_ranges():
    values = collections.defaultdict(list)
    for parameters in draws(recipe({**JITTER, "brightness": 1.5})):
        for step in parameters.steps:
            values[step.operation].append(step.value)
    assert_uniform(values["brightness"], 0.0, 2.5)  # never negative
    assert_uniform(values["contrast"], 0.6, 1.4)
    assert_uniform(values["saturation"], 0.8, 1.2)
    assert_uniform(values["hue"], -0.1, 0.1)


def test_the_four_jitter_operations_come_in_every_order_equally_often():
    orders = collections.Counter(tuple(s.operation for s in p.steps) for p in draws(recipe(JITTER)))
    assert len(orders) == 24
    chi_squared = sum((count - NUM_DRAWS / 24) ** 2 / (NUM_DRAWS / 24) for count in orders.values())
    assert chi_squared < 49.7  # 99.9 % of 23 degrees of freedom


def test_jitter_leaves_out_operations_of_amount_zero():
    parameters = draws(recipe({"type": "color_jitter", "contrast": 0.4}), count=50)
    assert {tuple(s.operation for s in p.steps) for p in parameters} == {("contrast",)}


def test_blur_sigma_is_uniform():
    parameters = draws(recipe({"type": "gaussian_blur", "sigma": [0.1, 2.0]}))
    assert_uniform([p.steps[0].value for p in parameters], 0.1, 2.0)


def test_each_view_has_its_own_probabilities():
    blur_solarize = [
        [{"type": "gaussian_blur", "probability": b}, {"type": "solarize", "probability": s}]
        for b, s in ((1.0, 0.0), (0.1, 0.2))
    ]
    maker = ViewMaker([recipe(*transforms)[0] for transforms in blur_solarize])
    counts: collections.Counter[tuple[int, str]] = collections.Counter()
    for sample in range(NUM_DRAWS):
        for view, parameters in enumerate(maker.draw(64, 64, (0, 0, sample))):
            counts.update((view, step.operation) for step in parameters.steps)
    assert counts[0, "gaussian_blur"] == NUM_DRAWS and counts[0, "solarize"] == 0
    assert within_three_sigma(counts[1, "gaussian_blur"], 0.1)
    assert within_three_sigma(counts[1, "solarize"], 0.2)


@pytest.mark.parametrize("kind", ["horizontal_flip", "grayscale", "color_jitter"])
def test_probability_is_that_of_the_recipe(kind):
    transform = {**JITTER, "type": kind} if kind == "color_jitter" else {"type": kind}
    happened = sum(bool(p.steps) for p in draws(recipe({**transform, "probability": 0.3})))
    assert within_three_sigma(happened, 0.3)


def test_transforms_run_in_the_order_of_the_recipe():
    kinds = ["grayscale", "solarize", "horizontal_flip", "gaussian_blur"]
    for order in (kinds, kinds[::-1]):
        (parameters,) = ViewMaker(recipe(*({"type": kind} for kind in order))).draw(64, 64, (0, 0, 0))
        assert [step.operation for step in parameters.steps] == order


def test_pixels_are_those_of_torchvision_with_the_drawn_values(shared_dir):
    """The whole chain on a photograph: the same operations on the same crop."""
    image = photo(shared_dir)
    maker = ViewMaker(
        recipe({"type": "horizontal_flip"}, JITTER, {"type": "solarize", "probability": 0.5}, size=64)
    )
    reference = {
        "horizontal_flip": lambda x, _: tvF.hflip(x),
        "brightness": tvF.adjust_brightness,
        "contrast": tvF.adjust_contrast,
        "saturation": tvF.adjust_saturation,
        "hue": tvF.adjust_hue,
        "solarize": tvF.solarize,
    }
    for sample in range(20):
        seed = (0, 0, sample)
        (parameters,), (view,) = maker.draw(image.height, image.width, seed), maker(image, seed)
        expected = Image.fromarray(crop_and_resize(np.asarray(image), parameters.crop, 64, "bilinear"))
        for operation, value in parameters.steps:
            expected = reference[operation](expected, value)
        assert torch.equal(view, tvF.pil_to_tensor(expected))


# Randomness.


FULL = recipe(
    {"type": "horizontal_flip", "probability": 0.5},
    {**JITTER, "probability": 0.8},
    {"type": "grayscale", "probability": 0.2},
    {"type": "gaussian_blur", "probability": 0.5},
    {"type": "solarize", "probability": 0.2},
    count=2,
)


def test_views_are_uint8_of_the_recipe_s_sizes_in_its_order():
    local = {
        "kind": "local",
        "size": 16,
        "count": 3,
        "crop": {"scale": [0.05, 0.2], "interpolation": "bicubic"},
    }
    maker = ViewMaker([*FULL, local])
    assert (maker.num_views, maker.sizes) == (5, [32, 32, 16, 16, 16])
    assert maker.kinds == ["global", "global", "local", "local", "local"]
    views = maker(noise(50, 70), (0, 0, 0))
    assert [tuple(view.shape) for view in views] == [(3, s, s) for s in maker.sizes]
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in views)


def test_equal_seeds_give_equal_views_in_any_order_and_process():
    image, seeds = noise(40, 40), [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (2, 1, 3)]
    first = {seed: torch.stack(ViewMaker(FULL)(image, seed)) for seed in seeds}
    maker = ViewMaker(FULL)
    torch.manual_seed(99), np.random.seed(99)
    assert all(torch.equal(torch.stack(maker(image, seed)), first[seed]) for seed in reversed(seeds))
    crops = {maker.draw(4000, 4000, seed)[0].crop for seed in seeds}
    assert len(crops) == len(seeds)  # seed, epoch and sample id all count, and are not interchangeable


def test_seeds_use_all_of_their_64_bits_and_refuse_negative_ones():
    maker = ViewMaker(FULL)
    large = [maker.draw(4000, 4000, (0, 0, 2**64 - 1 - i))[0].crop for i in range(2)]
    assert large[0] != large[1]
    with pytest.raises(OverflowError):
        maker.draw(32, 32, (0, 0, -1))


def test_two_views_are_independent_draws():
    parameters = [ViewMaker(FULL).draw(4000, 4000, (0, 0, sample)) for sample in range(NUM_DRAWS)]
    assert all(first.crop != second.crop for first, second in parameters)
    areas = np.array([[view.crop.height * view.crop.width for view in views] for views in parameters])
    flips = np.array([[Step("horizontal_flip") in view.steps for view in views] for views in parameters])
    for pairs in (areas, flips):
        assert abs(np.corrcoef(pairs.T)[0, 1]) < 3.3 / math.sqrt(NUM_DRAWS)


def test_draw_returns_what_call_uses():
    image = noise(40, 60)
    maker = ViewMaker(recipe({"type": "solarize", "probability": 0.5}))
    for sample in range(10):
        (parameters,) = maker.draw(40, 60, (0, 0, sample))
        assert isinstance(parameters, ViewParameters)
        expected = crop_and_resize(image, parameters.crop, 32, "bilinear")
        if parameters.steps:
            expected = np.where(expected >= 128, 255 - expected, expected)
        assert np.array_equal(maker(image, (0, 0, sample))[0].permute(1, 2, 0).numpy(), expected)


def test_the_image_is_left_as_it_was():
    image = noise(32, 32)
    before = image.copy()
    full_crop = recipe({"type": "solarize"}, crop={"scale": [1.0, 1.0], "ratio": [1.0, 1.0]})
    for view in (ViewMaker(full_crop)(image, (0, 0, 0))[0], evaluation_view(image, 32)):
        view.zero_()
    assert np.array_equal(image, before)


# Recipes that are refused.


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([], "at least one entry"),
        ([{"size": 32}], r"views\[0\] needs the key 'crop'"),
        (recipe(sizes=32), "unknown key 'sizes'; did you mean 'size'"),
        (recipe({"type": "gausian_blur"}), "did you mean 'gaussian_blur'"),
        (recipe({"probability": 1.0}), r"transforms\[0\] needs the key 'type'"),
        (recipe({"type": "grayscale", "p": 0.2}), "unknown key 'p'.*probability"),
        (recipe({"type": "color_jitter", "brigthness": 0.4}), "did you mean 'brightness'"),
        (recipe(kind="globl"), "did you mean 'global'"),
        (recipe(crop={"scale": [0.2, 1.0], "interpolation": "cubic"}), "did you mean 'bicubic'"),
        (recipe(crop={"scale": [0.2, 1.5]}), "scale must be a number from 0 to 1, got 1.5"),
        (recipe(crop={"scale": [1.0, 0.2]}), "lowest <= highest"),
        (recipe(crop={"scale": 0.2}), "two numbers"),
        (recipe(crop={"scale": [0.2, 1.0], "ratio": [0, 1]}), "0 < lowest"),
        (
            recipe({"type": "grayscale", "probability": 1.2}),
            "probability must be a number from 0 to 1, got 1.2",
        ),
        (recipe({"type": "grayscale", "probability": True}), "got True"),
        (recipe({"type": "color_jitter", "hue": 0.6}), "hue must be a number from 0 to 0.5"),
        (recipe({"type": "color_jitter", "contrast": -1}), "contrast must be"),
        (recipe({"type": "gaussian_blur", "sigma": [0, 2]}), "0 < lowest"),
        (recipe({"type": "solarize", "threshold": 0.5}), "threshold must be a whole number"),
        (recipe(size=0), "whole number >= 1"),
        (recipe(size="32"), "whole number >= 1, got '32'"),
        (recipe(count=0), "count must be"),
        (recipe() + recipe(size=48), r"global views have the sizes \[32, 48\]"),
    ],
)
def test_wrong_recipe_is_refused_with_the_way_out(views, message):
    with pytest.raises(ValueError, match=message):
        ViewMaker(views)


def test_defaults_are_torchvision_s_and_the_papers():
    minimal = [{"size": 32, "crop": {"scale": [0.2, 1.0]}, "transforms": [{"type": "solarize"}]}]
    (parameters,) = ViewMaker(minimal).draw(100, 100, (0, 0, 0))
    assert parameters.kind == "global" and parameters.interpolation == "bilinear"
    assert parameters.steps == (Step("solarize", 128),)


# Evaluation.


@pytest.mark.parametrize("name", ["chelsea.jpg", "car_man.jpg", "snowboarder.jpg"])
def test_evaluation_view_is_the_image_processor_s(shared_dir, name):
    from transformers import ViTImageProcessor

    image = photo(shared_dir, name)
    square = ViTImageProcessor(size={"height": 48, "width": 48}, do_rescale=False, do_normalize=False)
    assert torch.equal(evaluation_view(image, 48), _processed(square, image))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_view_with_central_crop_is_the_image_processor_s(shared_dir, interpolation, turned):
    from transformers import CLIPImageProcessor

    image = photo(shared_dir).transpose(Image.Transpose.ROTATE_90) if turned else photo(shared_dir)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 73},
        crop_size={"height": 64, "width": 64},
        resample=Image.Resampling[interpolation.upper()],
        do_rescale=False,
        do_normalize=False,
    )
    view = evaluation_view(image, 64, resize_size=73, interpolation=interpolation)
    assert torch.equal(view, _processed(processor, image))


def _processed(processor, image: Image.Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0].to(torch.uint8)


def test_evaluation_view_refuses_a_crop_larger_than_the_image():
    with pytest.raises(ValueError, match="resize_size 40 is smaller than size 64"):
        evaluation_view(noise(50, 50), 64, resize_size=40)


# Anchors


def test_an_anchor_is_the_global_view_at_another_size_without_its_colours():
    jitter = {"type": "color_jitter", "brightness": 0.5, "hue": 0.2}
    view = {"kind": "global", "count": 2, "size": 16, "crop": {"scale": [0.3, 1.0]}}
    transforms = [{"type": "horizontal_flip", "probability": 0.5}, jitter]
    small = {**view, "kind": "local", "count": 1, "size": 8}
    recipe = [{**view, "transforms": transforms}, small, {"kind": "anchor", "count": 2, "size": 32}]
    maker = ViewMaker(recipe)
    assert maker.kinds == ["global", "global", "local", "anchor", "anchor"]
    flips = set()
    for sample in range(8):
        drawn = maker.draw(64, 64, (0, 0, sample))
        for own, anchor in zip(drawn[:2], drawn[3:], strict=True):
            assert anchor.crop == own.crop and anchor.size == 32
            assert anchor.steps == tuple(step for step in own.steps if step.operation == "horizontal_flip")
            flips.add(len(anchor.steps))
        assert drawn[:3] == ViewMaker(recipe[:2]).draw(64, 64, (0, 0, sample))  # nothing else moves
    assert flips == {0, 1}


def test_anchors_are_as_many_as_global_views_and_have_no_crop_of_their_own():
    view = {"kind": "global", "count": 2, "size": 16, "crop": {"scale": [0.3, 1.0]}}
    with pytest.raises(ValueError, match="1 anchor views cannot repeat 2 global ones"):
        ViewMaker([view, {"kind": "anchor", "size": 32}])
    with pytest.raises(ValueError, match=r"views\[1\] has the unknown key 'crop'"):
        ViewMaker([view, {**view, "kind": "anchor"}])
