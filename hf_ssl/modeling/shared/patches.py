"""Images as rows of patches and back, in the two orders of values that exist.

Targets of a reconstruction are (row, column, channel) inside a patch; the input of a patch embedding (a
convolution's weight, flattened) is (channel, row, column). Mixing them trains without an error and never
works.
Shape suffixes: B = images or clips, T = frames, C = channels, H, W = pixels, N = patches in row-major order
(of clips: time before row before column), M = kept patches, P = values of a patch.
"""

import torch
from torch import Tensor

from hf_ssl.modeling.shared.losses import full_precision


def patch_grid(pixel_values: Tensor, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches of images (..., H, W)."""
    return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size


def clip_grid(pixel_values_BTCHW: Tensor, tubelet_size: int, patch_size: int) -> tuple[int, int, int]:
    """(time steps, rows, columns) of patches of clips."""
    return pixel_values_BTCHW.shape[1] // tubelet_size, *patch_grid(pixel_values_BTCHW, patch_size)


def clip_places(index: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Time step, row and column of the patches with these indices, each of the shape of `index`."""
    _, rows, columns = grid
    return index // (rows * columns), index // columns % rows, index % columns


def _split(pixel_values_BCHW: Tensor, patch_size: int) -> Tensor:
    height, width = pixel_values_BCHW.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"image of {height} x {width} pixels is not a multiple of patch_size {patch_size}")
    columns_split = torch.unflatten(pixel_values_BCHW, 3, (-1, patch_size))
    return torch.unflatten(columns_split, 2, (-1, patch_size))  # B, C, rows, y, columns, x


def patchify(pixel_values_BCHW: Tensor, patch_size: int, index_BM: Tensor | None = None) -> Tensor:
    """Reconstruction targets: patches with inner order (row, column, channel).

    Args:
        pixel_values_BCHW: images.
        patch_size: side of a patch.
        index_BM: row-major indices of the patches wanted, in the order wanted; None: all.

    Returns:
        (B, N, P), or (B, M, P).

    Raises:
        ValueError: height or width is not a multiple of `patch_size`.
    """
    patches = _split(pixel_values_BCHW, patch_size).permute(0, 2, 4, 3, 5, 1)
    return patches.flatten(3).flatten(1, 2) if index_BM is None else _select(patches, index_BM)


def _select(patches: Tensor, index_BM: Tensor) -> Tensor:
    """Patches (B, M, P) of (B, rows, columns, ...); indexing a permuted view copies only what is wanted."""
    num_columns = patches.shape[2]
    image_B1 = torch.arange(len(patches), device=patches.device)[:, None]
    return patches[image_B1, index_BM // num_columns, index_BM % num_columns].flatten(2)


def unpatchify(patches_BNP: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: images (B, C, H, W).

    Args:
        patches_BNP: patches with inner order (row, column, channel).
        patch_size: side of a patch.
        grid: (rows, columns) of patches.
    """
    patches = torch.unflatten(torch.unflatten(patches_BNP, 2, (patch_size, patch_size, -1)), 1, grid)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def normalize_patches(target_BNP: Tensor, eps: float = 1e-6) -> Tensor:
    """Every patch to mean 0, variance 1 over all its values jointly (unbiased variance, eps in the root)."""
    target_BNP = full_precision(target_BNP)
    # On a CPU faster than torch.var_mean.
    centered_BNP = target_BNP - target_BNP.mean(dim=2, keepdim=True)
    variance_BN1 = centered_BNP.square().sum(dim=2, keepdim=True) / (target_BNP.shape[2] - 1)
    return centered_BNP * (variance_BN1 + eps).rsqrt()


def gather_pixel_patches(pixel_values_BCHW: Tensor, patch_size: int, kept_index_BM: Tensor) -> Tensor:
    """Pixels of the kept patches (B, M, P) with inner order (channel, row, column), for the patch embedding.

    Args:
        pixel_values_BCHW: images.
        patch_size: side of a patch.
        kept_index_BM: row-major indices of the patches wanted, in the order wanted.

    Raises:
        ValueError: height or width is not a multiple of `patch_size`.
    """
    return _select(_split(pixel_values_BCHW, patch_size).permute(0, 2, 4, 1, 3, 5), kept_index_BM)


def clip_patches(
    pixel_values_BTCHW: Tensor, tubelet_size: int, patch_size: int, kept_index_BM: Tensor | None = None
) -> Tensor:
    """Pixels of the patches of clips (B, N or M, P) with inner order (channel, frame, row, column).

    Args:
        pixel_values_BTCHW: clips.
        tubelet_size: frames of a patch.
        patch_size: side of a patch.
        kept_index_BM: indices of the patches wanted, in the order wanted; None: all.

    Raises:
        ValueError: frames, height or width are not a multiple of the patch's.
    """
    frames, _, height, width = pixel_values_BTCHW.shape[1:]
    if frames % tubelet_size or height % patch_size or width % patch_size:
        raise ValueError(
            f"clip of {frames} frames of {height} x {width} pixels is not a multiple of tubelet_size "
            f"{tubelet_size} and patch_size {patch_size}"
        )
    split = pixel_values_BTCHW.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
    patches = split.unflatten(1, (-1, tubelet_size)).permute(0, 1, 4, 6, 3, 2, 5, 7)
    if kept_index_BM is None:
        return patches.flatten(4).flatten(1, 3)
    clip_B1 = torch.arange(len(patches), device=patches.device)[:, None]
    places = clip_places(kept_index_BM, clip_grid(pixel_values_BTCHW, tubelet_size, patch_size))
    return patches[(clip_B1, *places)].flatten(2)
