"""Random masking: the published order, and the integer rule with its floating-point traps."""

import pytest
import torch

from hf_ssl.modeling.shared.masks import num_kept_patches, random_masking
from tests.closeness import near


def test_masking_matches_the_authors_code(golden):
    case = golden("mae")
    kept, restore, is_masked = random_masking(case["mask.noise"], 4)
    assert torch.equal(kept, case["mask.ids_shuffle"][:, :4])
    assert torch.equal(restore, case["mask.ids_restore"])
    assert torch.equal(is_masked, case["mask.mask"].bool())
    near(case["mask.x"].gather(1, kept[:, :, None].expand(-1, -1, 5)), case["mask.x_kept"])


def test_kept_count_follows_the_authors_integer_rule(golden):
    case = golden("mae")
    rows = zip(
        case["keep.L"].tolist(), case["keep.ratio"].tolist(), case["keep.len_keep"].tolist(), strict=True
    )
    for num_patches, mask_ratio, num_kept in rows:
        if num_kept:
            assert num_kept_patches(num_patches, mask_ratio) == num_kept
        else:  # the official code goes on without a single visible patch
            with pytest.raises(ValueError, match=f"{mask_ratio} hides all {num_patches} patches"):
                num_kept_patches(num_patches, mask_ratio)


def test_kept_count_is_cut_and_not_rounded():
    assert num_kept_patches(196, 0.6) == 78 and num_kept_patches(20, 0.8) == 3


def test_hidden_patches_are_those_of_high_noise():
    noise = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    kept, restore, is_masked = random_masking(noise, 3)
    threshold = noise.sort(dim=1).values[:, 3:4]
    assert torch.equal(is_masked, noise >= threshold)
    assert is_masked.sum(dim=1).eq(9).all() and not is_masked.gather(1, kept).any()


def test_restore_index_puts_kept_and_hidden_back_into_image_order():
    noise = torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    kept, restore, _ = random_masking(noise, 4)
    shuffled = noise.sort(dim=1).values  # [kept, hidden] in the order of rising noise
    assert torch.equal(shuffled.gather(1, restore), noise)
    assert torch.equal(noise.gather(1, kept), shuffled[:, :4])


@pytest.mark.parametrize("mask_ratio", [1.0, -0.1, 1.5])
def test_a_ratio_outside_its_range_is_refused(mask_ratio):
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \[0, 1\)"):
        num_kept_patches(16, mask_ratio)


@pytest.mark.parametrize("num_kept", [0, 5])
def test_keeping_none_or_more_than_there_are_is_refused(num_kept):
    with pytest.raises(ValueError, match=rf"num_kept must lie in \[1, 4\], got {num_kept}"):
        random_masking(torch.rand(1, 4), num_kept)
