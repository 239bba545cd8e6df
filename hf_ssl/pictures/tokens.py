"""Visual tokens as colours: which an image has, and which were named for hidden patches.

Shape suffixes: B = images, N = patches, K = tokens, d = width of a code.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_ssl.pictures.canvas import UNSEEN, Tile, draw_grid, fit, patch_mask
from hf_ssl.pictures.patch_pca import patch_colors


def draw_tokens(
    images: Sequence[Any],
    tokens: Tensor,
    named: Tensor,
    is_masked: Tensor,
    codes: Tensor,
    grid: tuple[int, int],
    *,
    title: str = "Tokens",
) -> Image.Image:
    """Draws each image, what of it was seen, its tokens, and those with the named ones in the hidden places.

    Args:
        images: what was tokenized, as the model saw it; whatever `decode_image` takes.
        tokens: (B, N) int64, the tokenizer's.
        named: (B, N) int64, the model's guesses; only those of hidden patches are drawn.
        is_masked: (B, N) bool, True = hidden.
        codes: (K, d); tokens whose codes are alike get like colours, over all images.
        grid: (rows, columns) of patches.
        title: above the sheet.

    Returns:
        One row of four pictures per image.

    Raises:
        ValueError: the numbers of images, patches and grid cells do not agree.
    """
    if not tokens.shape == named.shape == is_masked.shape == (len(images), grid[0] * grid[1]):
        raise ValueError(
            f"tokens {tuple(tokens.shape)}, named {tuple(named.shape)} and mask {tuple(is_masked.shape)} "
            f"must all be ({len(images)} images, {grid[0]} x {grid[1]} patches)"
        )
    guessed = torch.where(is_masked, named, tokens)
    colors = patch_colors(codes[torch.cat([tokens, guessed])]).unflatten(0, (2, len(images))).numpy()
    rows = []
    for index, image in enumerate(images):
        picture = fit(image)
        gray = Image.new("RGB", picture.size, (UNSEEN,) * 3)
        seen = Image.composite(gray, picture, patch_mask(is_masked[index], grid, picture.size))
        maps = [fit(part[index].reshape(*grid, 3)) for part in colors]
        tiles = [part.resize(picture.size, Image.Resampling.NEAREST) for part in maps]
        rows.append([Tile(tile) for tile in (picture, seen, *tiles)])
    share = is_masked.float().mean().item()
    return draw_grid(
        rows, title=title, headings=["image", f"{share:.0%} hidden", "tokens", "hidden ones named"]
    )
