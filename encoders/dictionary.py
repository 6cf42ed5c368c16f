"""The visual dictionary: each cell of a map becomes its nearest entry, and entries follow the cells they stand for.

Huang et al. 2021, "Seeing Out of tHe bOx: end-to-end pre-training for vision-language representation learning" (SOHO),
section 3.2; which cells are hidden together, section 3.3.
Shapes: B images, P cells, C channels, K entries, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import initialise
from encoders.precision import full_precision
from vlp.config import Config


class DictionaryConfig(Config):
    """Entries of a dictionary; the defaults are SOHO's."""

    entries: int = Field(2048, ge=2)
    """K, entries that there are."""
    width: int = 768
    """D, width of an entry, to which cells are projected and normalised."""
    momentum: float = Field(0.99, ge=0, lt=1)
    """Share of itself that an entry keeps in a step; the rest is the mean of the cells that it stood for."""
    mask_token: bool = False
    """Learn a vector that stands for cells whose entry is hidden (objective mim, target entries)."""


class Dictionary(nn.Module):
    """Cells -> entries. The gradient passes as if cells had stayed what they were (straight through)."""

    entries: Tensor
    """[K, D], saved with the weights, but moved by :meth:`follow` alone."""
    placed: Tensor
    """[] bool, whether the entries lie among the cells: they do from the first step on."""
    totals: Tensor
    """[K, D + 1] of the training forwards since the last step: sum of the cells of each entry, then their number."""
    squares: Tensor
    """[D], sum of the squares of these cells."""

    def __init__(self, config: DictionaryConfig, channels: int) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        self.project = nn.Linear(channels, config.width)
        initialise(self.project)
        # Cells and entries of one length: else the shortest entry would be the nearest to most of the cells.
        self.norm = nn.LayerNorm(config.width)
        self.mask = nn.Parameter(torch.zeros(config.width)) if config.mask_token else None
        self.register_buffer("entries", torch.randn(config.entries, config.width))
        self.register_buffer("placed", torch.zeros((), dtype=torch.bool))
        self.register_buffer("totals", torch.zeros(config.entries, config.width + 1), persistent=False)
        self.register_buffer("squares", torch.zeros(config.width), persistent=False)

    def forward(self, cells: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Cells [B, P, C] -> tokens [B, P, D], and, where ``masked`` [B, P] names cells, what was hidden [B, P] int64.

        With a named cell all cells of its image that have its entry are hidden: a neighbour would give it away. What is
        hidden is the entry's number, -100 where nothing is.

        Raises:
            ValueError: cells are to be hidden, but there is nothing to stand in for them.
        """
        values = self.norm(self.project(cells))
        numbers = self.numbers(values)
        if self.training and self.project.weight.requires_grad:
            self._collect(values.detach(), numbers)
        nearest = F.embedding(numbers, self.entries).to(values.dtype)
        tokens = values + (nearest - values).detach()
        if masked is None:
            # A gradient of zero where nothing is to be hidden: ranks wait for every parameter's.
            return tokens if self.mask is None else tokens + 0 * self.mask, None
        if self.mask is None:
            raise ValueError("images have hidden cells but model.vision.dictionary.mask_token is false; set it to true")
        hidden = same_entry(numbers, masked)
        return torch.where(hidden[..., None], self.mask, tokens), torch.where(hidden, numbers, -100)

    @torch.no_grad()
    def numbers(self, values: Tensor) -> Tensor:
        """Projected cells [B, P, D] -> the number of each one's nearest entry, [B, P] int64."""
        # In half precision many cells would get another entry than in float32.
        with full_precision(values):
            flat = values.flatten(0, -2).to(self.entries.dtype)
            distance = self.entries.square().sum(1) - 2 * flat @ self.entries.t()  # but for what all entries share
            return distance.argmin(1).view(values.shape[:-1])

    def _collect(self, values: Tensor, numbers: Tensor) -> None:
        """Add cells [B, P, D] to what their entries stood for."""
        flat = values.flatten(0, -2).to(self.totals.dtype)
        self.totals.index_add_(0, numbers.flatten(), F.pad(flat, (0, 1), value=1.0))
        self.squares += flat.square().sum(0)

    @torch.no_grad()
    def follow(self, total: Callable[[Tensor], Tensor]) -> None:
        """Move every entry that stood for cells in this step towards their mean (section 3.2, equation 4).

        The first step spreads them as the cells are spread: of entries that lie anywhere, few would ever be the nearest
        to a cell (the paper's cold start).

        Args:
            total: sums a tensor over the ranks, by which entries stay the same on all of them.
        """
        sums, count = total(self.totals).split([self.width, 1], 1)
        number = count.sum().clamp(min=1)
        mean = sums.sum(0) / number
        spread = (total(self.squares) / number - mean.square()).clamp(min=0).sqrt()
        share = (1 - self.config.momentum) * (count > 0).to(count.dtype)
        moved = self.entries.lerp(sums / count.clamp(min=1), share)
        seen = count.any()  # a step of texts alone has no cells to lie among
        self.entries.copy_(torch.where(self.placed | ~seen, moved, mean + spread * self.entries))
        self.placed.logical_or_(seen)
        self.totals.zero_()
        self.squares.zero_()


def same_entry(numbers: Tensor, named: Tensor) -> Tensor:
    """Return which cells [B, P] have the entry of one of their image's ``named`` cells [B, P].

    ``numbers`` [B, P] are the cells' entries.
    """
    return ((numbers[:, :, None] == numbers[:, None]) & named[:, None]).any(2)
