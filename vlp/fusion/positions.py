"""Learned biases on attention by the distance of two tokens (BEiT, Bao et al. 2021; VLMo for image-text pairs).

Shapes: N image tokens (a class token and the grid's patches), L text length, S = N + L, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RelativePositions(nn.Module):
    """One table for each kind of pair of tokens; its columns are the heads of all blocks, block by block.

    `image`: by rows and columns between two patches, then class token to patch, patch to class token, class token to
    itself. `text`: by words between two words (all but the first), then likewise for the first word, [CLS]. `across`:
    text to image, image to text.
    """

    image_index: Tensor
    text_index: Tensor

    def __init__(self, grid: tuple[int, int], length: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers, self.grid, self.length = layers, grid, length
        rows, columns = grid
        columns_of = layers * heads
        self.image = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, columns_of))
        self.text = nn.Parameter(torch.zeros(2 * length, columns_of))
        self.across = nn.Parameter(torch.zeros(2, columns_of))
        self.register_buffer("image_index", _with_first(_grid_distances(rows, columns), len(self.image)), False)
        at = torch.arange(length - 1)
        self.register_buffer("text_index", _with_first(at[None] - at[:, None] + length - 2, len(self.text)), False)

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
        image = F.embedding(self.image_index[:num_image, :num_image], self.image)  # [N, N, layers * H]
        text = F.embedding(self.text_index[:length, :length], self.text)
        to_image, to_text = (way.expand(*size, -1) for way, size in zip(
            self.across, ((length, num_image), (num_image, length)), strict=True))  # fmt: skip
        bias = torch.cat([torch.cat([image, to_text], 1), torch.cat([to_image, text], 1)])
        return bias.permute(2, 0, 1).unflatten(0, (self.layers, -1))


def _grid_distances(rows: int, columns: int) -> Tensor:
    """Number of the offset between every two cells of a grid, query minus key, [rows * columns, rows * columns]."""
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    offset = at[:, None] - at[None] + torch.tensor([rows - 1, columns - 1])
    return offset[..., 0] * (2 * columns - 1) + offset[..., 1]


def _with_first(index: Tensor, size: int) -> Tensor:
    """The index of a first token's three kinds of pairs, the last three of the table, put around ``index`` [n, n]."""
    found = F.pad(index, (1, 0, 1, 0), value=size - 3)
    found[:, 0] = size - 2
    found[0, 0] = size - 1
    return found
