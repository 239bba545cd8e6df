"""Positions of a grid of patches: fixed sine-cosine tables, resizing of any table, and rotations.

Vaswani et al. 2017 in two dimensions; half of the width encodes the row, the other half the column. Published
models disagree on which half comes first, and nothing but the values tells. Clips have a third axis, time.
Shape suffixes: B = images or clips, N = tokens, D = width, H = width of an attention head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.modeling.shared.names import unknown_name_message
from hf_ssl.modeling.shared.patches import clip_places


def sincos_positions(
    width: int,
    grid_rows: int,
    grid_columns: int,
    *,
    first: str,
    class_token: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Fixed table for patches in row-major order.

    Args:
        width: width of a token, a multiple of 4.
        grid_rows: patches from top to bottom.
        grid_columns: patches from left to right.
        first: the coordinate in the first half of the width, "row" or "column".
        class_token: put a row of zeros before the patches.
        dtype: of the result; computed in float64.

    Returns:
        Table (1, N, width) on the CPU, N = rows x columns (+ 1). Each half is all sines, then all cosines.

    Raises:
        ValueError: `width` is not a multiple of 4, or `first` is neither "row" nor "column".
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {width}")
    if first not in ("row", "column"):
        raise ValueError(unknown_name_message("first coordinate", first, ["row", "column"]))
    # The device is written out: models are built under `torch.device("meta")`.
    rows = torch.arange(grid_rows, dtype=torch.float64, device="cpu").repeat_interleave(grid_columns)
    columns = torch.arange(grid_columns, dtype=torch.float64, device="cpu").repeat(grid_rows)
    coordinates = (rows, columns) if first == "row" else (columns, rows)
    table_ND = torch.cat([_encode(coordinate_N, width // 2) for coordinate_N in coordinates], dim=1)
    if class_token:
        table_ND = torch.cat([torch.zeros(1, width, dtype=torch.float64, device="cpu"), table_ND])
    return table_ND[None].to(dtype)


def _encode(coordinate_N: Tensor, width: int) -> Tensor:
    exponents = torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width // 2)
    angles = coordinate_N[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_positions_of_clips(width: int, grid: tuple[int, int, int]) -> Tensor:
    """Fixed table for patches of a clip, time before rows before columns (V-JEPA's `uniform_power`).

    Args:
        width: width of a token; each axis has twice the rounded-up sixth of it, and what is too much is cut
            from the end of the columns' part.
        grid: (time steps, rows, columns) of patches.

    Returns:
        Table (1, N, width), float32 on the CPU.
    """
    axes = torch.meshgrid(
        *(torch.arange(length, dtype=torch.float64, device="cpu") for length in grid), indexing="ij"
    )
    axis_width = 2 * -(-width // 6)
    table_ND = torch.cat([_encode(axis.flatten(), axis_width) for axis in axes], dim=1)[:, :width]
    return table_ND[None].float()


Rotations = tuple[Tensor, Tensor]


def make_rotations(index_BN: Tensor, grid: tuple[int, int, int], head_dim: int) -> Rotations:
    """By which angles queries and keys are turned, a third of their width for each axis (V-JEPA 2).

    As the authors' code has it, the frequencies are tiled over an axis and not repeated for each of the
    pairs that are turned; published weights were trained so. What is left of the width is not turned.

    Args:
        index_BN: places of the tokens in the grid, int64; B may be 1.
        grid: (time steps, rows, columns) of patches.
        head_dim: H, even and at least 6.

    Returns:
        Cosines and sines (B, 1, N, H), float32, or float64 where that is torch's default.
    """
    half = head_dim // 3 // 2
    dtype, device = torch.get_default_dtype(), index_BN.device
    frequencies = 10000.0 ** (-torch.arange(half, dtype=dtype, device=device) / half)
    parts = [(place[..., None] * frequencies).repeat(1, 1, 2) for place in clip_places(index_BN, grid)]
    parts.append(torch.zeros(*index_BN.shape, head_dim - 6 * half, dtype=dtype, device=device))
    angles_B1NH = torch.cat(parts, dim=-1)[:, None]
    return angles_B1NH.cos(), angles_B1NH.sin()


def rotate(states: Tensor, rotations: Rotations) -> Tensor:
    """Queries or keys (B, heads, N, H), each pair of neighbouring values turned by its angle."""
    cosines, sines = (part.to(states.dtype) for part in rotations)
    turned = torch.stack([-states[..., 1::2], states[..., ::2]], dim=-1).flatten(-2)
    return states * cosines + turned * sines


def resize_positions(
    table_1ND: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    has_class_token: bool,
    *,
    offset: float = 0.0,
    antialias: bool = False,
) -> Tensor:
    """Table for another grid, bicubic as `ViTModel` does it; the class token's row is untouched.

    Args:
        table_1ND: table whose patches are in row-major order.
        old_grid: (rows, columns) of `table_1ND`.
        new_grid: (rows, columns) of the result.
        has_class_token: the first row belongs to the class token.
        offset: added to rows and columns of the new grid to give the scale at which the old one is read; 0.1
            in the published DINO and DINOv2 code, where it guards against rounding and shifts all values.
        antialias: average over the old grid's cells where the new one is coarser.

    Returns:
        Table (1, N', D); `table_1ND` itself if the grids are equal.

    Raises:
        ValueError: `table_1ND` does not have the rows of `old_grid`.
    """
    num_extra = int(has_class_token)
    num_rows = old_grid[0] * old_grid[1] + num_extra
    if table_1ND.shape[1] != num_rows:
        raise ValueError(
            f"position table has {table_1ND.shape[1]} rows, a grid of {old_grid[0]} x {old_grid[1]} "
            f"{'with' if has_class_token else 'without'} class token needs {num_rows}"
        )
    if old_grid == new_grid:
        return table_1ND
    patches = torch.unflatten(table_1ND[:, num_extra:], 1, old_grid).permute(0, 3, 1, 2)
    target: dict[str, tuple[float, ...]] = {"size": new_grid}
    if offset:
        scales = ((new + offset) / old for new, old in zip(new_grid, old_grid, strict=True))
        target = {"scale_factor": tuple(scales)}
    patches = F.interpolate(patches, mode="bicubic", align_corners=False, antialias=antialias, **target)  # type: ignore[arg-type]
    return torch.cat([table_1ND[:, :num_extra], patches.flatten(2).transpose(1, 2)], dim=1)
