"""Patches: both orders of values, the way back, and the normalised target."""

import pytest
import torch
import torch.nn.functional as F

from hf_ssl.modeling.shared.patches import gather_pixel_patches, normalize_patches, patchify, unpatchify
from tests.closeness import near, precision


def test_patches_match_the_authors_code(golden):
    case = golden("mae")
    assert torch.equal(patchify(case["loss.img"], 4), case["loss.patches"])


def test_unpatchify_is_the_way_back(golden):
    case = golden("mae")
    assert torch.equal(unpatchify(case["loss.patches"], 4, (4, 4)), case["loss.img"])
    wide = torch.randn(2, 3, 8, 20)
    assert torch.equal(unpatchify(patchify(wide, 4), 4, (2, 5)), wide)


def test_values_of_a_target_patch_run_over_rows_then_columns_then_channels():
    image = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    patch = patchify(image, 2)[0, 4]  # second row of patches, second column
    expected = [image[0, c, 2 + y, 2 + x].item() for y in range(2) for x in range(2) for c in range(2)]
    assert patch.tolist() == expected


@precision
def test_normalised_target_matches_the_authors_code(golden, dtype, tolerance):
    case = golden("mae")
    near(normalize_patches(case["loss.patches"].to(dtype)), case["loss.norm.target"], tolerance)


def test_target_variance_is_unbiased_joint_over_channels_with_eps_inside_the_root():
    patch = torch.tensor([[[0.0, 10.0, 2.0, 12.0]]], dtype=torch.float64)  # two pixels, two channels
    variance = ((0 - 6) ** 2 + (10 - 6) ** 2 + (2 - 6) ** 2 + (12 - 6) ** 2) / 3
    near(normalize_patches(patch, eps=4.0), (patch - 6) / (variance + 4.0) ** 0.5)


def test_a_constant_patch_becomes_zero_and_not_nan():
    assert normalize_patches(torch.full((1, 1, 12), 0.7)).abs().max() < 1e-3


def test_half_precision_targets_are_normalised_in_float32():
    assert normalize_patches(torch.randn(1, 2, 12).bfloat16()).dtype == torch.float32


def test_gathered_pixels_times_the_flat_weight_equal_the_convolution():
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    convolved = F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)  # (B, 6, 5)
    kept = torch.tensor([[4, 0, 3], [5, 1, 2]])
    embedded = gather_pixel_patches(images, 4, kept) @ weight.flatten(1).T
    near(embedded, convolved.gather(1, kept[:, :, None].expand(-1, -1, 5)))


def test_images_of_any_memory_format_give_the_same_patches():
    images = torch.randn(2, 3, 8, 8)
    kept = torch.tensor([[1, 2], [3, 0]])
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(patchify(channels_last, 4), patchify(images, 4))
    assert torch.equal(gather_pixel_patches(channels_last, 4, kept), gather_pixel_patches(images, 4, kept))


def test_an_image_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="image of 30 x 32 pixels is not a multiple of patch_size 16"):
        patchify(torch.zeros(1, 3, 30, 32), 16)
