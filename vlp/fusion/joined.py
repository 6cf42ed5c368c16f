"""One sequence of both modalities, image tokens first: who sees whom in it, and its two sides.

Shapes: M rows, S tokens (N of the image, then L of the text), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from encoders.layers import attention_mask
from encoders.types import AttentionKind, Tokens


def joined_mask(keep: Tensor, num_image: int, attention: AttentionKind, prefix: Tensor | None) -> Tensor | None:
    """Return who sees whom, of ``keep`` [M, S]: under "causal" and "prefix" all see the image and the text's prefix."""
    if attention == "full":
        return attention_mask(keep)
    # Image tokens stand first: a causal mask whose prefix is the image (and the text's own prefix).
    length = torch.full((keep.shape[0],), num_image, device=keep.device)
    if attention == "prefix":
        assert prefix is not None
        length = length + prefix
    return attention_mask(keep, "prefix", length)


def split_sides(
    states: Tensor,
    keep: Tensor,
    num_image: int,
    has_image: bool,
    has_text: bool,
    every: tuple[Tensor, ...] | None,
) -> tuple[Tokens | None, Tokens | None]:
    """States [M, S, D] (and those of ``every`` layer) -> the image's tokens and the text's, pooled at their first."""
    image = text = None
    if has_image:
        layers = None if every is None else tuple(x[:, :num_image] for x in every)
        image = Tokens(states[:, :num_image], keep[:, :num_image], states[:, 0], layers)
    if has_text:
        layers = None if every is None else tuple(x[:, num_image:] for x in every)
        text = Tokens(states[:, num_image:], keep[:, num_image:], states[:, num_image], layers)
    return image, text
