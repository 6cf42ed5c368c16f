"""Rows of tokens: taken, gathered over ranks, laid behind and beside each other, and cut apart again.

Shapes: B rows, M rows of an index, N image tokens, L text length, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.types import Tokens
from objectives.base import Fused
from objectives.collectives import gather_grad_to_all, gather_no_grad


def beside(first: Tokens, second: Tokens) -> Tokens:
    """Tokens [M, N, D] and [M, L, D] -> [M, N + L, D]."""
    keeps = [
        one.states.new_ones(one.states.shape[:2], dtype=torch.bool) if one.keep is None else one.keep
        for one in (first, second)
    ]
    positions = None
    if first.positions is not None and second.positions is not None:
        positions = torch.cat([first.positions, second.positions], 1)
    states = torch.cat([first.states, second.states], 1)
    return Tokens(states, torch.cat(keeps, 1), first.pooled, positions=positions)


def take(tokens: Tokens, index: Tensor) -> Tokens:
    """Return the rows ``index`` [M] of tokens."""
    keep, named = (None if one is None else one.index_select(0, index) for one in (tokens.keep, tokens.named))
    return Tokens(tokens.states.index_select(0, index), keep, tokens.pooled.index_select(0, index), named=named)


def pad_to(tokens: Tokens, length: int | None) -> Tokens:
    """Pad tokens [B, L, D] to a length.

    Raises:
        ValueError: there is no such length.
    """
    if length is None:
        raise ValueError("objectives.itm.candidates global needs model.text.max_length; use model.text.kind text")
    more = length - tokens.states.shape[1]
    keep = tokens.states.new_ones(tokens.states.shape[:2], dtype=torch.bool) if tokens.keep is None else tokens.keep
    named = None if tokens.named is None else _named(tokens, length)
    return Tokens(F.pad(tokens.states, (0, 0, 0, more)), F.pad(keep, (0, more)), tokens.pooled, named=named)


def gather_tokens(tokens: Tokens, sizes: Sequence[int] | None) -> Tokens:
    """Return the tokens of all ranks, in rank order; their gradients flow back to their own rank."""
    keep = None if tokens.keep is None else gather_no_grad(tokens.keep.to(torch.uint8), sizes).bool()
    named = None if tokens.named is None else gather_no_grad(tokens.named, sizes)
    states, pooled = (gather_grad_to_all(one, sizes) for one in (tokens.states, tokens.pooled))
    return Tokens(states, keep, pooled, named=named)


def concatenate(parts: list[Tokens]) -> Tokens | None:
    """Lay tokens behind each other, row by row, padded to the longest; None of none."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    longest = max(part.states.shape[1] for part in parts)
    states = torch.cat([F.pad(part.states, (0, 0, 0, longest - part.states.shape[1])) for part in parts])
    keep = named = None
    if any(part.keep is not None or part.states.shape[1] < longest for part in parts):
        keeps = [
            part.states.new_ones(part.states.shape[:2], dtype=torch.bool) if part.keep is None else part.keep
            for part in parts
        ]
        keep = torch.cat([F.pad(k, (0, longest - k.shape[1])) for k in keeps])
    if any(part.named is not None for part in parts):
        named = torch.cat([_named(part, longest) for part in parts])
    return Tokens(states, keep, torch.cat([part.pooled for part in parts]), named=named)


def _named(tokens: Tokens, length: int) -> Tensor:
    """What each word names, [B, length]; padding names nothing."""
    if tokens.named is None:
        return tokens.states.new_full((len(tokens.states), length), -1, dtype=torch.int64)
    return F.pad(tokens.named, (0, length - tokens.named.shape[1]), value=-1)


def split(fused: Fused, sizes: Sequence[int], lengths: Sequence[int | None]) -> list[Fused]:
    """Cut what was fused in one go into its parts, of these numbers of rows and lengths of the texts (None: all)."""
    if len(sizes) == 1:
        return [fused]
    found, first = [], 0
    for size, length in zip(sizes, lengths, strict=True):
        rows = slice(first, first + size)
        found.append(Fused(_slice(fused.image, rows), _slice(fused.text, rows, length), fused.pooled[rows]))
        first += size
    return found


def _slice(tokens: Tokens | None, rows: slice, length: int | None = None) -> Tokens | None:
    if tokens is None:
        return None
    keep = None if tokens.keep is None else tokens.keep[rows, :length]
    layers = None if tokens.layers is None else tuple(x[rows, :length] for x in tokens.layers)
    positions = None if tokens.positions is None else tokens.positions[:, :length]
    return Tokens(tokens.states[rows, :length], keep, tokens.pooled[rows], layers, positions=positions)
