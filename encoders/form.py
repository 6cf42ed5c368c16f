"""What a block's layers are made of, where that is not BERT's and ViT's way: T5's norms, scores and positions.

Shapes: L queries, S keys, H heads.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlp.config import Config


class FormConfig(Config):
    """Form of a stack's layers; the defaults are BERT's and ViT's (T5: Raffel et al. 2020, section 2.1)."""

    norm: Literal["layer", "rms"] = "layer"
    """Layer norm, or that without mean and bias (RMS norm: T5)."""
    bias: bool = True
    """Linear maps add a bias."""
    gated: bool = False
    """The feed-forward's activation is multiplied by a second linear map (T5 1.1)."""
    scaled: bool = True
    """Products of queries and keys are divided by the root of a head's width; T5's are not."""
    head_width: int | None = None
    """Width of a head; none = width / heads (T5: 64, or 128)."""
    buckets: int = Field(0, ge=0, multiple_of=4)
    """Self-attention among words has a learned bias by their distance, in so many buckets; 0 = none (T5: 32)."""
    distance: int = Field(128, ge=2)
    """Distance from which on all are in one bucket."""

    def new_norm(self, width: int, eps: float) -> nn.Module:
        """Build a norm of states of this width."""
        return nn.RMSNorm(width, eps) if self.norm == "rms" else nn.LayerNorm(width, eps)

    def inner(self, heads: int) -> int | None:
        """Width of all heads together; None = that of the states."""
        return None if self.head_width is None else heads * self.head_width

    def new_buckets(self, heads: int, both_ways: bool) -> RelativeBuckets | None:
        """Build the bias of a stack's self-attention, which all its blocks share; None without buckets.

        ``both_ways`` tells words before from words behind; texts that are read left to right have none behind.
        """
        return RelativeBuckets(heads, self.buckets, self.distance, both_ways) if self.buckets else None


class RelativeBuckets(nn.Module):
    """A learned bias for each head by the distance of key and query, in buckets: small ones hold one distance each.

    Larger ones widen geometrically up to ``distance``, and the last one holds all beyond.
    """

    def __init__(self, heads: int, buckets: int, distance: int, both_ways: bool) -> None:
        super().__init__()
        self.distance, self.both_ways = distance, both_ways
        self.table = nn.Embedding(buckets, heads)
        each = buckets // 2 if both_ways else buckets
        if distance <= each // 2:
            raise ValueError(
                f"form.distance {distance} is not beyond the {each // 2} buckets that hold one distance each; raise it "
                "or lower form.buckets"
            )

    def forward(self, queries: int, keys: int, first: int = 0) -> Tensor:
        """Bias of ``queries`` words from place ``first`` on, on keys from place 0 on, [1, H, L, S]."""
        device = self.table.weight.device
        behind = torch.arange(keys, device=device)[None] - torch.arange(first, first + queries, device=device)[:, None]
        return self.table(self.index(behind)).permute(2, 0, 1)[None]

    def index(self, behind: Tensor) -> Tensor:
        """Bucket of how far keys stand behind queries, int64 of any shape."""
        number = self.table.num_embeddings
        if self.both_ways:
            number //= 2
            base, far = (behind > 0) * number, behind.abs()
        else:
            base, far = torch.zeros_like(behind), (-behind).clamp(min=0)
        exact = number // 2
        grown = (far.clamp(min=1).float() / exact).log() / math.log(self.distance / exact) * (number - exact)
        wide = (exact + grown.long()).clamp(max=number - 1)
        return base + torch.where(far < exact, far, wide)
