"""What a masked autoencoder or a tokenizer made of images (the figures of He et al. 2022).

Shape suffixes: B = images, C = channels, H, W = pixels, N = patches, P = values of a patch.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from hf_ssl.modeling.shared.patches import patchify, unpatchify
from hf_ssl.pictures.canvas import Tile, draw_grid, fit

_HIDDEN_GRAY = 0.55


def draw_reconstructions(
    pixel_values: Tensor,
    is_masked: Tensor,
    predictions: Tensor,
    *,
    image_mean: Sequence[float] = (0.0, 0.0, 0.0),
    image_std: Sequence[float] = (1.0, 1.0, 1.0),
    normalized_patches: bool = True,
    title: str = "Reconstructions",
) -> Image.Image:
    """Draws image, masked image, reconstruction (visible patches are the true ones) and whole prediction.

    Where all patches are hidden, as from the decoder of a tokenizer, only image and prediction are drawn.

    Args:
        pixel_values: (B, 3, H, W), normalised as the model receives them.
        is_masked: (B, N) bool, True = hidden.
        predictions: (B, N, P) for all patches, inner order (row, column, channel).
        image_mean: subtracted by the image processor.
        image_std: divided by, by the image processor.
        normalized_patches: predictions are in units of each patch's own mean and deviation. The picture then
            takes these two numbers from the true patch, so brightness and contrast of a patch are given and
            only its structure is predicted.
        title: above the sheet.

    Returns:
        One row of four pictures per image, or of two.

    Raises:
        ValueError: patches and image do not fit together.
    """
    target_BCHW, predictions_BNP = pixel_values.detach().float().cpu(), predictions.detach().float().cpu()
    height, width = target_BCHW.shape[2:]
    patch_size = math.isqrt(predictions_BNP.shape[2] // target_BCHW.shape[1])
    grid = (height // max(1, patch_size), width // max(1, patch_size))
    if grid[0] * grid[1] != predictions_BNP.shape[1] or is_masked.shape != predictions_BNP.shape[:2]:
        raise ValueError(
            f"predictions {tuple(predictions.shape)} and mask {tuple(is_masked.shape)} do not fit images "
            f"of {height} x {width} pixels; give (images, patches, 3 * patch_size**2) and (images, patches)"
        )
    target_BNP = patchify(target_BCHW, patch_size)
    if normalized_patches:
        variance_BN1, mean_BN1 = torch.var_mean(target_BNP, dim=2, keepdim=True)
        predictions_BNP = predictions_BNP * (variance_BN1 + 1e-6).sqrt() + mean_BN1
    hidden_BN1 = is_masked.cpu().bool()[:, :, None]
    mean, std = (torch.tensor(values)[:, None, None] for values in (image_mean, image_std))
    gray_BNP = patchify(((_HIDDEN_GRAY - mean) / std).expand(1, -1, height, width), patch_size)
    columns = [
        target_BNP,
        torch.where(hidden_BN1, gray_BNP, target_BNP),
        torch.where(hidden_BN1, predictions_BNP, target_BNP),
        predictions_BNP,
    ]
    pictures = [
        ((unpatchify(patches, patch_size, grid) * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        for patches in columns
    ]
    rows = [[Tile(fit(picture[b])) for picture in pictures] for b in range(len(target_BCHW))]
    headings = ["image", f"{is_masked.float().mean().item():.0%} hidden", "reconstruction", "all predicted"]
    if bool(is_masked.all()):
        rows, headings = [[row[0], row[-1]] for row in rows], ["image", "all predicted"]
    return draw_grid(rows, title=title, headings=headings)
