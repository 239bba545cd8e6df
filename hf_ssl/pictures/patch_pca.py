"""Patch features as colours: their three main directions become red, green and blue.

Shape suffixes: B = images, N = patches, D = feature width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_ssl.pictures.canvas import Tile, draw_grid, fit


def draw_patch_pca(
    images: Sequence[Any], patch_features: Tensor, grid: tuple[int, int], *, title: str = "Patch features"
) -> Image.Image:
    """Draws each image beside its patches, coloured by the main directions over all images.

    Args:
        images: what the features were computed from, as the model saw it; whatever `decode_image` takes.
        patch_features: (B, N, D), row-major, without class or register tokens.
        grid: (rows, columns) of patches.
        title: above the sheet.

    Returns:
        Image beside colours, several images in a row. Equal colours mean like features, over all images.

    Raises:
        ValueError: the numbers of images, patches and grid cells do not agree.
    """
    if patch_features.shape[:2] != (len(images), grid[0] * grid[1]):
        raise ValueError(
            f"patch_features {tuple(patch_features.shape)} do not hold {grid[0]} x {grid[1]} patches of "
            f"{len(images)} images"
        )
    colors = patch_colors(patch_features).reshape(-1, *grid, 3)
    tiles = []
    for image, color in zip(images, colors, strict=True):
        picture = fit(image)
        tiles += [Tile(picture), Tile(fit(color.numpy()).resize(picture.size, Image.Resampling.NEAREST))]
    per_row = 2 * min(3, len(images))
    rows = [tiles[start : start + per_row] for start in range(0, len(tiles), per_row)]
    return draw_grid(rows, title=title)


def patch_colors(patch_features_BND: Tensor) -> Tensor:
    """Maps features to uint8 colours (B, N, 3); percentiles 1 and 99 of each direction become 0 and 255."""
    features = patch_features_BND.detach().float().cpu().flatten(0, 1)
    centered = features - features.mean(dim=0)
    _, _, directions = torch.linalg.svd(centered, full_matrices=False)
    scores = centered @ directions[:3].T
    scores = scores * torch.where(
        scores.pow(3).sum(dim=0) < 0, -1.0, 1.0
    )  # directions have no sign of their own
    scores = torch.nn.functional.pad(scores, (0, 3 - scores.shape[1]))
    low, high = torch.quantile(scores, torch.tensor([0.01, 0.99]), dim=0)
    extent = high - low
    # A direction that holds nothing but rounding errors stays dark.
    extent = torch.where(extent > 1e-4 * extent.max(), extent, torch.inf)
    unit = ((scores - low) / extent).clamp(0, 1)
    colors_BN3: Tensor = (unit * 255).round().to(torch.uint8).reshape(*patch_features_BND.shape[:2], 3)
    return colors_BN3
