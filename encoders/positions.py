"""Position embeddings of an image grid: resized to another grid as each family does it, or sines and cosines.

Shapes: N prefix tokens and patches, D width.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, cat
from torch.nn import functional as F

from encoders.precision import full_precision

PositionResize = Literal["bicubic", "bicubic_antialias", "bilinear_antialias", "bilinear_corners"]
"""Interpolation of position embeddings.

bicubic: ALBEF, BLIP, X-VLM, METER, BEiT-3 and transformers' models (between pixel centres, no antialiasing);
bicubic_antialias: timm and open_clip; for every image anew, bilinear_antialias: SigLIP 2 (NaFlex), bilinear_corners:
ViLT (corners stay where they are).
"""


def resize_positions(
    table: Tensor,
    grid: tuple[int, int],
    prefix: int = 1,
    method: PositionResize = "bicubic",
    stored: tuple[int, int] | None = None,
) -> Tensor:
    """Interpolate the patches' rows of a table of position embeddings; the prefix tokens' rows stay.

    Computed in float32; a table of the wanted grid is returned as it is.

    Args:
        table: [1, N, D] or [N, D], patches row by row.
        grid: Rows and columns of patches that are wanted.
        prefix: Rows at the start that belong to no patch: class and register tokens (3 for BEiT-3, whose first two rows
            are unused).
        method: The interpolation.
        stored: Rows and columns of the table's own patches; None = a square.

    Returns:
        The table with prefix + rows * columns rows, in its own dtype and number of dimensions.

    Raises:
        ValueError: ``stored`` is not given and the table's patches are no square, or it does not fit the table.
    """
    assert table.dim() in (2, 3) and method in get_args(PositionResize), (table.shape, method)
    patches = table.shape[-2] - prefix
    side = math.isqrt(max(patches, 0))
    before = stored or (side, side)
    if patches < 1 or before[0] * before[1] != patches:
        shown = f"a {before[0]} x {before[1]} grid" if stored else "a square"
        raise ValueError(
            f"position embeddings {tuple(table.shape)} have {patches} rows besides {prefix} of other tokens, "
            f"which is not {shown}; check the image size and the patch size"
        )
    if tuple(before) == tuple(grid):
        return table
    rows = table.reshape(-1, table.shape[-1])
    image = rows[prefix:].float().unflatten(0, before).permute(2, 0, 1)[None]  # [1, D, rows, columns]
    if method == "bilinear_corners":
        image = F.interpolate(image, grid, mode="bilinear", align_corners=True)
    else:
        mode, _, antialias = method.partition("_")
        image = F.interpolate(image, grid, mode=mode, antialias=bool(antialias))
    resized = image[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)
    return cat([rows[:prefix], resized]).view(*table.shape[:-2], -1, table.shape[-1])


def positions_per_image(
    table: Tensor,
    grid: tuple[int, int],
    prefix: int = 1,
    keep: Tensor | None = None,
    method: Literal["bilinear_corners", "bilinear_antialias"] = "bilinear_corners",
) -> Tensor:
    """Interpolate a square table for each image of a batch to the rows and columns of patches that it fills.

    For sizes that only the device knows (ViLT, NaFlex): interpolation along an axis is a product with a matrix of
    weights, so that nothing waits for the host; in float32, as half precision would blur the places.

    Args:
        table: [prefix + S * S, D].
        grid: Rows and columns of patches of the batch, to which smaller images are padded at the bottom and right.
        prefix: Rows at the start that belong to no patch.
        keep: [B, rows * columns] bool, patches that hold image; None = all.
        method: The interpolation.

    Returns:
        [B, prefix + rows * columns, D], or [1, ...] without ``keep``; what stands at padding means nothing.
    """
    side = math.isqrt(table.shape[0] - prefix)
    assert side * side == table.shape[0] - prefix, (table.shape, prefix)
    image = table[prefix:].float().unflatten(0, (side, side))  # [S, S, D]
    if keep is None:
        counts = [torch.full((1,), number, device=table.device) for number in grid]
    else:
        filled = keep.unflatten(1, grid)
        counts = [filled[:, :, 0].sum(1), filled[:, 0].sum(1)]
    weights = _between if method == "bilinear_corners" else _blurred
    rows, columns = (weights(number, size, side) for number, size in zip(counts, grid, strict=True))
    with full_precision(table):
        patches = torch.einsum("brs,std,bct->brcd", rows, image, columns).flatten(1, 2).to(table.dtype)
    return cat([table[:prefix].expand(len(patches), -1, -1), patches], 1)


def _between(count: Tensor, size: int, side: int) -> Tensor:
    """Weights [B, size, side] of a table of ``side`` rows at ``count`` [B] evenly spread places, ends included."""
    at = torch.arange(size, device=count.device) * ((side - 1) / (count - 1).clamp(min=1))[:, None]  # [B, size]
    return (1 - (at[..., None] - torch.arange(side, device=count.device)).abs()).clamp(min=0)


def _blurred(count: Tensor, size: int, side: int) -> Tensor:
    """Weights [B, size, side] of a table of ``side`` rows for ``count`` [B] equal parts of its length, antialiased.

    A triangle about each part's centre, as wide as the part where parts are longer than the table's own rows.
    """
    part = side / count[:, None, None]  # [B, 1, 1] rows of the table in one part
    centre = (torch.arange(size, device=count.device)[:, None] + 0.5) * part  # [B, size, 1]
    places = torch.arange(side, device=count.device) + 0.5
    weights = (1 - (places - centre).abs() / part.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)  # what is behind the last part has none


def sine_positions(grid: tuple[int, int], width: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of each cell's row, then of its column (Carion et al. 2020, DETR, appendix A.4).

    Rows and columns are counted in parts of the whole, which is one turn of the fastest sine, whatever the grid.

    Args:
        grid: rows and columns of cells.
        width: D, a multiple of 4.
        device: of the result.

    Returns:
        [rows * columns, D] float32, cells row by row.

    Raises:
        ValueError: D is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine positions need a width that is a multiple of 4, not {width}; change the width")
    rate = 10000 ** (-torch.arange(width // 4, device=device) / (width // 4))
    sides = []
    for number in grid:
        angle = (torch.arange(1, number + 1, device=device) * (2 * math.pi / number))[:, None] * rate  # [number, D / 4]
        sides.append(torch.stack([angle.sin(), angle.cos()], 2).flatten(1))
    rows, columns = (side.expand(*grid, -1) for side in (sides[0][:, None], sides[1][None]))
    return cat([rows, columns], 2).flatten(0, 1)
