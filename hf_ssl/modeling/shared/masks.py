"""Which patches an encoder sees. True in a boolean mask means hidden.

Shape suffixes: B = images, N = patches, M = kept patches.
"""

import torch
from torch import Tensor


def num_kept_patches(num_patches: int, mask_ratio: float) -> int:
    """Patches left visible: `int(num_patches * (1 - mask_ratio))` in float arithmetic, as published.

    Args:
        num_patches: patches of an image.
        mask_ratio: hidden share, in [0, 1).

    Returns:
        At least 1.

    Raises:
        ValueError: `mask_ratio` outside [0, 1), or so high that nothing stays visible.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie in [0, 1), got {mask_ratio}")
    # int, not round, and 1 - ratio first: 10 patches at 0.9 keep int(0.99...) = 0 in the official code.
    num_kept = int(num_patches * (1 - mask_ratio))
    if num_kept == 0:
        raise ValueError(
            f"mask_ratio {mask_ratio} hides all {num_patches} patches; lower it or use smaller patches"
        )
    return num_kept


def random_masking(noise_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the patches with the smallest noise in every image.

    Args:
        noise_BN: uniform noise, one value per patch.
        num_kept: patches to keep, M.

    Returns:
        `kept_index_BM` (int64, in order of rising noise), `restore_index_BN` (int64: entry n of the original
        order is found at this place of [kept, hidden]) and `is_masked_BN` (bool, True = hidden).

    Raises:
        ValueError: `num_kept` is not between 1 and N.
    """
    if not 1 <= num_kept <= noise_BN.shape[1]:
        raise ValueError(f"num_kept must lie in [1, {noise_BN.shape[1]}], got {num_kept}")
    shuffle_index_BN = noise_BN.argsort(dim=1)
    restore_index_BN = torch.empty_like(shuffle_index_BN)
    order_BN = torch.arange(noise_BN.shape[1], device=noise_BN.device).expand_as(shuffle_index_BN)
    restore_index_BN.scatter_(1, shuffle_index_BN, order_BN)
    return shuffle_index_BN[:, :num_kept], restore_index_BN, restore_index_BN >= num_kept
