"""Learned biases on attention by the distance of two tokens (BEiT, Bao et al. 2021; VLMo for image-text pairs).

Shapes: N image tokens (a class token and the grid's patches), L text length, S = N + L, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RelativePositions(nn.Module):
    """One table, a column for each head of each block (block by block), a row for each kind of pair of tokens.

    Rows, in VLMo's order: the offsets between two patches, query minus key; class token to patch, patch to class token,
    class token to itself; text to image, image to text; the offsets between two words (all but the first), key minus
    query; first word to word, word to first word, first word to itself.
    """

    image_index: Tensor
    text_index: Tensor

    def __init__(self, grid: tuple[int, int], length: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers, self.grid, self.length = layers, grid, length
        rows, columns = grid
        self.offsets = (2 * rows - 1) * (2 * columns - 1)
        across = self.offsets + 3
        self.table = nn.Parameter(torch.zeros(across + 2 + 2 * length, layers * heads))
        self.register_buffer("image_index", _with_first(_grid_distances(rows, columns), self.offsets), False)
        at = torch.arange(length - 1)
        text = at[None] - at[:, None] + length - 2 + across + 2
        self.register_buffer("text_index", _with_first(text, len(self.table) - 3), False)

    def forward(self, num_image: int, length: int) -> Tensor:
        """Bias of every query on every key, image first, [layers, H, S, S].

        Args:
            num_image: N, or 0 without an image.
            length: L, or 0 without a text.

        Raises:
            ValueError: the text is longer than the table, or the image is of another grid.
        """
        if length > self.length:
            raise ValueError(
                f"texts of {length} tokens, but model.fusion.relative_positions is {self.length}; shorten "
                "data.max_length or raise it"
            )
        if num_image not in (0, len(self.image_index)):
            raise ValueError(
                f"images of {num_image} tokens, but model.fusion.relative_positions tells apart a class token and a "
                f"{self.grid[0]} x {self.grid[1]} grid; keep the class token and give images of one size"
            )
        bias = F.embedding(self.index(num_image, length), self.table)  # [S, S, layers * H]
        return bias.permute(2, 0, 1).unflatten(0, (self.layers, -1))

    def index(self, num_image: int, length: int) -> Tensor:
        """Row of the table for every query and key, image first, [S, S] int64."""
        to_image = self.offsets + 3
        image = F.pad(self.image_index[:num_image, :num_image], (0, length), value=to_image + 1)
        text = F.pad(self.text_index[:length, :length], (num_image, 0), value=to_image)
        return torch.cat([image, text])

    def resized(self, stored: Tensor) -> Tensor | None:
        """Interpolate a table of another, square, grid for this one; None if it is no such table.

        As BEiT does it: cubic splines through the stored offsets, which are laid out at distances that grow
        geometrically, so that near ones stay as they are and the farthest are the new grid's farthest.
        """
        offsets = len(stored) - (len(self.table) - self.offsets)
        side = math.isqrt(max(offsets, 0))
        rows, columns = self.grid
        if side * side != offsets or side % 2 == 0 or rows != columns or stored.shape[1:] != self.table.shape[1:]:
            return None
        weights = _spline(_geometric(side, 2 * rows - 1), torch.arange(2.0 * rows - 1).double() - (rows - 1))
        grid = stored[:offsets].double().unflatten(0, (side, side))
        grid = torch.einsum("ya,xb,abc->yxc", weights, weights, grid).flatten(0, 1)
        return torch.cat([grid.to(stored.dtype), stored[offsets:]])


def _grid_distances(rows: int, columns: int) -> Tensor:
    """Number of the offset between every two cells of a grid, query minus key, [rows * columns, rows * columns]."""
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    offset = at[:, None] - at[None] + torch.tensor([rows - 1, columns - 1])
    return offset[..., 0] * (2 * columns - 1) + offset[..., 1]


def _with_first(index: Tensor, first: int) -> Tensor:
    """Rows ``first`` and the next two, of a first token to others, back, and to itself, put around ``index`` [n, n]."""
    found = F.pad(index, (1, 0, 1, 0), value=first)
    found[:, 0] = first + 1
    found[0, 0] = first + 2
    return found


def _geometric(stored: int, wanted: int) -> Tensor:
    """Where ``stored`` offsets lie among ``wanted`` ones: 0, 1, 1 + q, 1 + q + q^2, ... and their mirror image.

    The last is as far out as the last that is wanted (for a smaller grid, q is its least value, 1.01).
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (stored // 2)) / (1 - q) > wanted // 2:
            high = q
        else:
            low = q
    out = (q ** torch.arange(stored // 2, dtype=torch.float64)).cumsum(0)
    return torch.cat([-out.flip(0), out.new_zeros(1), out])


def _spline(x: Tensor, wanted: Tensor) -> Tensor:
    """Weights [W, S] of the values at ``x`` [S] in the cubic spline through them at ``wanted`` [W], float64.

    Its third derivative has no jump at the second and the last but one (the "not-a-knot" spline of FITPACK); beyond the
    ends it keeps its last value.
    """
    size = len(x)
    degree = min(3, size - 1)
    inner = x[2:-2] if degree == 3 else x[:0]
    knots = torch.cat([x[:1].expand(degree + 1), inner, x[-1:].expand(degree + 1)])
    return _basis(knots, degree, wanted.clamp(x[0], x[-1])) @ torch.linalg.inv(_basis(knots, degree, x))


def _basis(knots: Tensor, degree: int, at: Tensor) -> Tensor:
    """Values [A, K - degree - 1] of the B-splines over ``knots`` [K] (de Boor's recurrence)."""
    last = int((knots < knots[-1]).sum()) - 1  # the last span that is not empty holds its right end too
    span = (torch.searchsorted(knots, at, right=True) - 1).clamp(max=last)
    basis = F.one_hot(span, len(knots) - 1).double()
    for k in range(1, degree + 1):
        width = knots[k:] - knots[:-k]
        share = ((at[:, None] - knots[:-k]) / width).where(width > 0, 0.0)  # [A, K - k]
        basis = share[:, :-1] * basis[:, :-1] + (1 - share[:, 1:]).where(width[1:] > 0, 0.0) * basis[:, 1:]
    return basis
