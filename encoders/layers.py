"""The layers everybody builds from: attention on SDPA, feed-forward, and one transformer block.

Shapes: M rows, L queries, S keys, D width, H heads. ``keep`` masks are bool, True = attend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.form import FormConfig
from encoders.types import AttentionKind

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI CLIP
    "relu": F.relu,
    "tanh": torch.tanh,
}
PLAIN = FormConfig()


@dataclass
class KeyValues:
    """Projected keys and values of one attention, [B, H, S, D / H] each."""

    keys: Tensor
    values: Tensor

    def rows(self, index: Tensor | None) -> KeyValues:
        """Return the keys of other rows: ``index`` [M], or [M, I] to lay I inputs behind each other."""
        if index is None:
            return self
        return KeyValues(_gather(self.keys, index), _gather(self.values, index))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, S, d] and [M] -> [M, H, S, d]; with [M, I] -> [M, H, I * S, d]."""
    if index.dim() == 1:
        return x.index_select(0, index)
    picked = x[index].transpose(1, 2)  # [M, H, I, S, d]
    return picked.flatten(2, 3)


@dataclass
class Cache:
    """What one block remembers while a text is generated token by token."""

    past: KeyValues | None = None
    memory: KeyValues | None = None

    def reorder(self, index: Tensor) -> None:
        """Keep the rows ``index`` [M], in that order (beam search)."""
        self.past = self.past.rows(index) if self.past else None
        self.memory = self.memory.rows(index) if self.memory else None


def attention_mask(
    keep: Tensor | None,
    kind: AttentionKind = "full",
    prefix: Tensor | None = None,
    length: int | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """Return which key each query may see, broadcastable to [M, H, L, S], or None for all.

    Args:
        keep: [M, S] bool, real positions.
        kind: "full"; "causal": query l sees keys up to l; "prefix": and the first ``prefix`` [M] keys.
        prefix: [M] int64, needed by "prefix".
        length: S, where ``keep`` is None.
        device: of the mask, where ``keep`` is None.
    """
    mask = None if keep is None else keep[:, None, None, :]
    if kind == "full":
        return mask
    if keep is not None:
        length, device = keep.shape[1], keep.device
    assert length is not None
    at = torch.arange(length, device=device)
    seen = (at[None, :] <= at[:, None])[None]  # [1, L, S]
    if kind == "prefix":
        assert prefix is not None
        seen = seen | (at[None, None, :] < prefix[:, None, None])
    seen = seen[:, None]
    return seen if mask is None else seen & mask


def with_bias(seen: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Which keys are seen (bool, or a bias already), and a bias on them -> one mask for attention; broadcastable."""
    if seen is None or bias is None:
        return seen if bias is None else bias
    if seen.is_floating_point():
        return seen + bias
    return bias.masked_fill(~seen, -torch.inf)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, eq. 1) with separate query, key and value projections.

    All heads together are ``inner`` wide, else as wide as the states. Products of queries and keys are multiplied by
    ``scale``, else by one over the root of a head's width. With ``head_scale`` what a head finds is multiplied by a
    learned factor (Shleifer et al. 2021, NormFormer, section 2).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_width: int | None = None,
        inner: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        head_scale: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        inner = inner or width
        if inner % heads:
            raise ValueError(f"width {inner} is not divisible by heads {heads}; choose heads that divide it")
        self.heads, self.dropout, self.scale = heads, dropout, scale
        self.query = nn.Linear(width, inner, bias)
        self.key = nn.Linear(kv_width or width, inner, bias)
        self.value = nn.Linear(kv_width or width, inner, bias)
        self.out = nn.Linear(inner, width, bias)
        self.head_scale = nn.Parameter(torch.ones(heads)) if head_scale else None

    def project(self, memory: Tensor) -> KeyValues:
        """[B, S, kv_width] -> keys and values, [B, H, S, D / H] each."""
        return KeyValues(self._split(self.key(memory)), self._split(self.value(memory)))

    def forward(self, x: Tensor, memory: KeyValues, mask: Tensor | None = None) -> Tensor:
        """[M, L, D] queries on the projected ``memory`` -> [M, L, D]; ``mask`` bool, or float, which is added."""
        dropout = self.dropout if self.training else 0.0
        query = self._split(self.query(x))
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, memory.keys, memory.values, mask, dropout, scale=self.scale)
        if self.head_scale is not None:
            mixed = mixed * self.head_scale[:, None, None].to(mixed.dtype)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, and with ``norm_eps`` a norm behind it (NormFormer).

    Gated (``form``), the activation is of another linear map, and multiplies the first.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation = "gelu",
        *,
        norm_eps: float | None = None,
        form: FormConfig = PLAIN,
    ) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, form.bias), nn.Linear(hidden, width, form.bias)
        self.gate = nn.Linear(width, hidden, form.bias) if form.gated else None
        self.activation = ACTIVATIONS[activation]
        self.norm = nn.Identity() if norm_eps is None else form.new_norm(hidden, norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        return self.down(self.norm(inner))


class Block(nn.Module):
    """Self-attention, optional cross-attention, feed-forward; residual with the norm before or after each.

    ``norm="post"`` is BERT's layer, ``norm="pre"`` is ViT's. With ``cross``, keys and values of the memory are
    projected here once from its B rows and indexed by row, so that several texts share one image's projection.
    ``normformer`` adds a norm behind each attention and inside the feed-forward, and a factor per head; ``form`` says
    what norms and linear maps are.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        norm: Literal["pre", "post"] = "post",
        cross_width: int | None = None,
        activation: Activation = "gelu",
        eps: float = 1e-12,
        dropout: float = 0.0,
        normformer: bool = False,
        scale: float | None = None,
        form: FormConfig = PLAIN,
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        new_attention = partial(
            Attention,
            width,
            heads,
            inner=form.inner(heads),
            dropout=dropout,
            scale=scale if form.scaled else 1.0,
            head_scale=normformer,
            bias=form.bias,
        )
        new_norm = partial(form.new_norm, width, eps)
        self.attention, self.attention_norm = new_attention(), new_norm()
        self.attention_after = new_norm() if normformer else nn.Identity()
        if cross_width is not None:
            self.cross, self.cross_norm = new_attention(kv_width=cross_width), new_norm()
            self.cross_after = new_norm() if normformer else nn.Identity()
        self.feed = FeedForward(width, hidden, activation, norm_eps=eps if normformer else None, form=form)
        self.feed_norm = new_norm()
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        memory_index: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """[M, L, D] -> [M, L, D].

        Args:
            x: rows.
            mask: bool or additive, broadcastable to [M, H, L, S].
            memory: [B, S, cross_width], what the cross-attention reads; None skips it.
            memory_index: [M] or [M, I], the memory row(s) of each row; None: row m reads memory m.
            memory_mask: bool or additive, broadcastable to [M, H, L, S].
            cache: keys and values of earlier tokens, extended in place.
        """
        x = self._residual(x, self.attention_norm, lambda y: self._self_attention(y, mask, cache))
        if memory is not None:
            keys = self._memory(memory, memory_index, cache)
            x = self._residual(x, self.cross_norm, lambda y: self.cross_after(self.cross(y, keys, memory_mask)))
        return self._residual(x, self.feed_norm, self.feed)

    def _residual(self, x: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.drop(layer(norm(x))) if self.pre else norm(x + self.drop(layer(x)))

    def _self_attention(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        own = self.attention.project(x)
        if cache is not None:
            if cache.past is not None:
                own = KeyValues(
                    torch.cat([cache.past.keys, own.keys], 2), torch.cat([cache.past.values, own.values], 2)
                )
            cache.past = own
        return self.attention_after(self.attention(x, own, mask))

    def _memory(self, memory: Tensor, index: Tensor | None, cache: Cache | None) -> KeyValues:
        if cache is not None and cache.memory is not None:
            return cache.memory
        keys = self.cross.project(memory).rows(index)
        if cache is not None:
            cache.memory = keys
        return keys


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Fill our own layers as BERT does: normal(0, ``std``) weights, zero biases, unit norms.

    BERT's 0.02 belongs to inputs of 768 and more. Narrower inputs get a larger one, so that a small model's branches do
    not start silent beside its residual stream (at width 128 its [CLS] would hardly see the text).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std * math.sqrt(768 / min(part.in_features, 768)))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=std)
    for part in module.modules():
        if isinstance(part, Attention) and part.scale == 1.0:  # scores of the usual size (T5)
            part.query.weight.data.mul_((part.query.out_features / part.heads) ** -0.5)
