"""Positions that attention reads apart from the content (Ke et al. 2021, TUPE, eq. 7; with OFA's tables of distances).

Content and positions have projections of their own. The logit of a query and a key is the sum of both products, each
over the root of twice a head's width, and of a learned bias by their distance in the text or in the image's grid.
Shapes: N image tokens (at most one before the grid's cells), L words, S = N + L, H heads, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import initialise
from encoders.text import StackConfig
from vlp.config import Config


class UntiedConfig(Config):
    """Learned positions of words and image cells, whose products are added to attention's."""

    length: int = Field(1024, ge=2)
    """Most words of a text."""
    buckets: int = Field(256, ge=4)
    """Distances between words that are told apart each way: half of them one by one, the others in steps that grow
    geometrically up to `length`."""
    side: int = Field(42, ge=1)
    """Rows and columns of the largest grid of cells; a smaller one is its upper left corner."""


def untied_scale(stack: StackConfig) -> float:
    """Return what products of queries and keys are multiplied by: there are two of them, so each counts half."""
    return (2 * stack.width / stack.heads) ** -0.5


class UntiedPositions(nn.Module):
    """Positions of image tokens and words, and what they add to the logits of self-attention.

    Args:
        config: sizes of the tables.
        stack: whose attention it is; every block has tables of distances of its own.
        grid: rows and columns of an image's cells; None: there are words alone.

    Raises:
        ValueError: the grid is larger than the tables, or the layers have T5's positions.
    """

    def __init__(self, config: UntiedConfig, stack: StackConfig, grid: tuple[int, int] | None) -> None:
        super().__init__()
        if stack.form.buckets or stack.form.head_width or not stack.form.scaled:
            raise ValueError(
                "untied positions and model.text.form with buckets, head_width or scaled false are two ways to read "
                "positions; set untied of fusion and decoder to none, or leave these out of the form"
            )
        self.config, self.heads, self.grid, self.scale = config, stack.heads, grid, untied_scale(stack)
        self.word, self.word_norm = nn.Embedding(config.length, stack.width), nn.LayerNorm(stack.width, stack.eps)
        self.query, self.key = nn.Linear(stack.width, stack.width), nn.Linear(stack.width, stack.width)
        self.word_bias = _tables(2 * config.buckets - 1, stack)
        if grid is not None:
            if max(grid) > config.side:
                raise ValueError(
                    f"model.fusion.untied.side {config.side} is less than the {grid[0]} x {grid[1]} cells of an image; "
                    "raise it"
                )
            self.image, self.image_norm = (
                nn.Embedding(config.side**2 + 1, stack.width),
                nn.LayerNorm(stack.width, stack.eps),
            )
            self.image_bias = _tables((2 * config.side - 1) ** 2 + 3, stack)
        initialise(self)
        for table in (*self.word_bias, *(self.image_bias if grid is not None else ())):
            nn.init.zeros_(table.weight)

    def forward(self, num_image: int, length: int) -> Tensor:
        """Return the normalised positions of ``num_image`` image tokens (or none) and of words, [1, S, D].

        Raises:
            ValueError: the text is longer than the table, or the image is not the whole grid.
        """
        parts = []
        if num_image:
            parts.append(self.image_norm(self.image(self._places(num_image))))
        if length > self.config.length:
            raise ValueError(f"texts of {length} tokens, but `untied.length` of the model is {self.config.length}")
        if length:
            parts.append(self.word_norm(self.word.weight[:length]))
        return torch.cat(parts)[None]

    def biases(self, positions: Tensor, num_image: int) -> list[Tensor]:
        """Positions [1, S, D], the first ``num_image`` the image's -> for each block, [1, H, S, S] of query and key."""
        absolute = correlation(self.query(positions), self.key(positions), self.heads, self.scale)
        length = positions.shape[1] - num_image
        words = word_distances(length, self.config.length, self.config.buckets, positions.device)
        cells = self._distances(num_image) if num_image else None
        found = []
        for number, table in enumerate(self.word_bias):
            bias = F.pad(table(words).permute(2, 0, 1), (num_image, 0, num_image, 0))
            if cells is not None:
                of_image = self.image_bias[number](cells).permute(2, 0, 1)  # [H, N, N]
                bias = bias + F.pad(of_image, (0, length, 0, length))
            found.append(absolute + bias)
        return found

    def _places(self, num_image: int) -> Tensor:
        """Row of the table for each image token, [N]: 0 is a token before the cells."""
        rows, columns = self._cells(num_image)
        places = (1 + rows * self.config.side + columns).flatten()
        return F.pad(places, (num_image - len(places), 0))

    def _distances(self, num_image: int) -> Tensor:
        """Row of the tables for every two image tokens, query and key, [N, N]; the last three are the first token's."""
        rows, columns = (each.flatten() for each in self._cells(num_image))
        span, last = 2 * self.config.side - 1, self.config.side - 1
        found = (rows[:, None] - rows + last) * span + columns[:, None] - columns + last
        if len(found) == num_image:
            return found
        found = F.pad(found, (1, 0, 1, 0), value=span**2)  # the first token as the query
        found[1:, 0], found[0, 0] = span**2 + 1, span**2 + 2
        return found

    def _cells(self, num_image: int) -> Sequence[Tensor]:
        """Row and column of each cell, [rows, columns] each."""
        assert self.grid is not None
        rows, columns = self.grid
        if num_image - rows * columns not in (0, 1):
            raise ValueError(
                f"images of {num_image} tokens, but model.fusion.untied tells apart the {rows} x {columns} cells of "
                "the vision encoder; give images of one size"
            )
        device = self.word.weight.device
        return torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")


class CrossPositions(nn.Module):
    """What positions add to the logits of cross-attention, the same in all blocks."""

    def __init__(self, stack: StackConfig, memory_width: int) -> None:
        super().__init__()
        self.heads, self.scale = stack.heads, untied_scale(stack)
        self.query, self.key = nn.Linear(stack.width, stack.width), nn.Linear(memory_width, stack.width)
        initialise(self)

    def forward(self, positions: Tensor, memory: Tensor) -> Tensor:
        """Positions [1, L, D] of words and [1, S, memory_width] of what they read -> [1, H, L, S]."""
        return correlation(self.query(positions), self.key(memory), self.heads, self.scale)


def correlation(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Scaled products of queries [1, L, D] and keys [1, S, D] of every head, [1, H, L, S]."""
    left, right = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key))
    return (left * scale) @ right.transpose(2, 3)


def word_distances(length: int, longest: int, buckets: int, device: torch.device) -> Tensor:
    """Row of a table of 2 * ``buckets`` - 1 for every two of ``length`` words, query minus key, [L, L] int64.

    Up to half of the buckets a distance has a row of its own; then rows grow geometrically, the last at ``longest``.
    """
    at = torch.arange(length, device=device)
    offset = at[:, None] - at
    near = buckets // 2
    # Logarithms of what is near are not read; `clamp` keeps them finite.
    beyond = (offset.abs().clamp(min=near) / near).log() / math.log(max(longest - 1, near + 1) / near)
    far = (near + (beyond * (near - 1)).ceil().long()).clamp(max=buckets - 1)
    return torch.where(offset.abs() <= near, offset, offset.sign() * far) + buckets - 1


def _tables(rows: int, stack: StackConfig) -> nn.ModuleList:
    return nn.ModuleList(nn.Embedding(rows, stack.heads) for _ in range(stack.layers))
