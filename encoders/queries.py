"""Attention pooling: learned queries read an image's tokens, and what they find are the image's tokens from then on.

CoCa's poolers (Yu et al. 2022, section 3.2): one query for the contrastive vector, many for the decoder.
Shapes: B images, N image tokens, Q queries, D width of the tokens, E width of the queries.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from encoders.layers import Attention, attention_mask
from vlp.config import Config


class QueriesConfig(Config):
    """Learned queries on top of a vision encoder."""

    layout: Literal["split", "parallel", "cascaded"] = "cascaded"
    """`pooled` is what the first query finds (`split`: open_clip's CoCa), or what a query of its own finds, in the
    encoder's tokens (`parallel`) or in what the others found (`cascaded`: the paper)."""
    number: int = Field(256, ge=1)
    """Queries whose findings are the image's tokens; in `split` the first one is `pooled` instead."""
    width: int = 768
    """E, width of what they find."""
    heads: int = 8
    """Attention heads."""
    eps: float = 1e-5
    """Epsilon of the norms."""
    norm: bool = True
    """Layer norm on what they find."""


class QueryPool(nn.Module):
    """Queries attend to normalised tokens."""

    def __init__(self, width: int, number: int, config: QueriesConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(number, config.width))
        self.query_norm = nn.LayerNorm(config.width, config.eps)
        self.token_norm = nn.LayerNorm(width, config.eps)
        self.attention = Attention(config.width, config.heads, kv_width=width)
        self.norm = nn.LayerNorm(config.width, config.eps) if config.norm else nn.Identity()

    def forward(self, states: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, N, D] and keep [B, N] -> [B, Q, E]."""
        query = self.query_norm(self.query).expand(len(states), -1, -1)
        memory = self.attention.project(self.token_norm(states))
        return self.norm(self.attention(query, memory, attention_mask(keep)))


class Queries(nn.Module):
    """The poolers of one encoder of this width."""

    def __init__(self, config: QueriesConfig, width: int) -> None:
        super().__init__()
        if config.layout == "split" and config.number < 2:
            raise ValueError("model.vision.queries.layout split needs number 2 or more: the first one is `pooled`")
        self.config = config
        self.tokens = QueryPool(width, config.number, config)
        self.contrast: QueryPool | None = None
        if config.layout != "split":
            self.contrast = QueryPool(width if config.layout == "parallel" else config.width, 1, config)

    @property
    def num_tokens(self) -> int:
        """Q, tokens of one image."""
        return self.config.number - (self.config.layout == "split")

    def forward(self, states: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, N, D] and keep [B, N] -> the image's tokens [B, Q, E] and its pooled vector [B, E]."""
        found = self.tokens(states, keep)
        if self.contrast is None:
            return found[:, 1:], found[:, 0]
        pooled = self.contrast(states, keep) if self.config.layout == "parallel" else self.contrast(found)
        return found, pooled[:, 0]
