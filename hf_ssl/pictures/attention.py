"""Where the class token looks: one map for each head of a ViT's last block.

Shape suffixes: B = images, H = heads, N = patches, h, w = grid of patches.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from hf_ssl.pictures.canvas import Tile, draw_grid, fit

SHARE = 0.6  # of a head's attention that its brightest patches hold together; DINO's figures


def draw_attention(
    images: Sequence[Any],
    attention: Tensor,
    grid: tuple[int, int],
    *,
    title: str = "Attention of the class token",
) -> Image.Image:
    """Draws each image beside its maps; every map has its own scale.

    Args:
        images: what the attention was computed from; whatever `decode_image` takes.
        attention: (B, H, N) of the class token to the patches, row-major, not negative.
        grid: (rows, columns) of patches.
        title: above the sheet.

    Returns:
        One row for each image: the image, the mean of all heads, every head; below, in how few of the
        patches 60 % of the attention lies.

    Raises:
        ValueError: the numbers of images, patches and grid cells do not agree.
    """
    if attention.ndim != 3 or attention.shape[::2] != (len(images), grid[0] * grid[1]):
        raise ValueError(
            f"attention {tuple(attention.shape)} does not hold {grid[0]} x {grid[1]} patches of "
            f"{len(images)} images"
        )
    rows = []
    for image, attention_HN in zip(images, attention.detach().float().cpu(), strict=True):
        picture = fit(image)
        row = [Tile(picture)]
        for map_N in (attention_HN.mean(dim=0), *attention_HN):
            colored = Image.fromarray(heat(map_N.reshape(grid)))
            enlarged = colored.resize(picture.size, Image.Resampling.NEAREST)
            row.append(Tile(enlarged, f"60 % in {patches_with_most(map_N)} of {len(map_N)}"))
        rows.append(row)
    heads = [f"head {number + 1}" for number in range(attention.shape[1])]
    return draw_grid(rows, title=title, headings=["image", "mean", *heads])


def patches_with_most(map_N: Tensor, share: float = SHARE) -> int:
    """The smallest number of patches that together hold `share` of the attention."""
    sorted_N = map_N.sort(descending=True).values
    held_N = sorted_N.cumsum(dim=0) / sorted_N.sum()
    return int((held_N < share).sum()) + 1


def heat(map_hw: Tensor) -> np.ndarray[Any, Any]:
    """Values as uint8 colours (h, w, 3) from dark to bright, the largest the brightest."""
    from matplotlib import colormaps

    scaled = map_hw / map_hw.max().clamp_min(1e-12)
    return (255 * colormaps["inferno"](scaled.numpy())[..., :3]).round().astype(np.uint8)
