"""`multiway`: one stack in which each token takes the layers of its modality, attention sees all (VLMo, BEiT-3).

Bao et al. 2022 (VLMo, section 3.1): shared attention, a feed-forward per modality, in the top layers one for image-text
pairs. Wang et al. 2022 (BEiT-3) as released: every projection and norm per modality, with Magneto's sub-LN.
Shapes: B images, M rows, N image tokens, L text length, S = N + L, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import ACTIVATIONS, Cache, KeyValues, attention_mask, initialise, with_bias
from encoders.text import BesideConfig, StackConfig
from encoders.types import AttentionKind, Tokens
from objectives.base import MAIN, Fused, Side
from vlp.fusion.each import fuse_each, image_modality, modality_table, pooled_width
from vlp.fusion.joined import joined_mask, split_sides
from vlp.fusion.pooler import Pooler, PoolerKind, gather_images
from vlp.fusion.positions import RelativePositions

VL = "vl"
"""Branch in which one modality alone takes the feed-forward of pairs (VLMo's second contrastive space)."""


class MultiwayConfig(BesideConfig):
    """One stack with layers per modality; over bare embeddings it is the tower of both modalities too."""

    kind: Literal["multiway"] = "multiway"
    norm: Literal["pre", "post"] | None = "pre"
    """Always before each branch."""
    decoupled: bool = False
    """Attention's projections and every norm are per modality too (BEiT-3), else shared (VLMo)."""
    pair_layers: int = 0
    """Top blocks in which the tokens of image-text pairs take a feed-forward of their own (VLMo-base 2)."""
    key_bias: bool = True
    """Keys have a bias; it changes nothing but the number of parameters (BEiT, VLMo: none)."""
    sub_norm: bool = False
    """Another norm before the last projection of each branch (Magneto, BEiT-3)."""
    layer_scale: float | None = None
    """Learned factor per channel on each branch, from this value on (VLMo 0.1); none = there is none."""
    relative_positions: int | None = None
    """Learned bias on attention by distance in the image grid and between up to this many words, and by modality (VLMo
    196); none = there is none."""
    modality_embedding: bool = False
    """Add a learned vector that tells image from text tokens (VLMo)."""
    images: Literal["one", "each"] = "one"
    """Images per text: one, or two that the text is fused with one after the other (NLVR2)."""
    final_norm: bool = True
    """Norm after the last block (off in BEiT-3's VQA and image classification)."""
    pooler: PoolerKind = "tanh"
    """How `pooled` is made."""
    pooler_side: Literal["image", "text"] = "text"
    """Whose first state `cls` and `tanh` read, where a row has both (BEiT-3's VQA: image)."""
    pooler_norm: bool = False
    """Norm on the state that `tanh` reads (BEiT-3's VQA)."""

    def build(
        self, image_width: int, text_width: int, reads: frozenset[Side], grid: tuple[int, int] | None = None
    ) -> Multiway:
        """Build the fusion; ``reads`` says which sides anyone reads, ``grid`` is the image's rows and columns."""
        return Multiway(self, image_width, text_width, reads, grid)


class Ways(nn.ModuleDict):
    """Layers of one kind: `image` and `text`, or `both` alone; and `pair`, which tokens of pairs take instead."""

    def __init__(self, make: Callable[[], nn.Module], decoupled: bool, pair: bool = False) -> None:
        names = ["image", "text"] if decoupled else ["both"]
        super().__init__({name: make() for name in names + ["pair"] * pair})

    def forward(self, x: Tensor, num_image: int, pair: bool = False) -> Tensor:
        """Tokens [M, S, C], the first ``num_image`` the image's -> [M, S, C']; ``pair`` if they are a pair's."""
        way = "pair" if pair and "pair" in self else "both"
        if way in self:
            return self[way](x)
        if num_image in (0, x.shape[1]):
            return self["image" if num_image else "text"](x)
        return torch.cat([self["image"](x[:, :num_image]), self["text"](x[:, num_image:])], 1)


class MultiwayAttention(nn.Module):
    """Multi-head self-attention whose projections may be per modality."""

    def __init__(self, config: MultiwayConfig, stack: StackConfig) -> None:
        super().__init__()
        width, self.heads, self.dropout = stack.width, stack.heads, stack.dropout
        if width % self.heads:
            raise ValueError(f"width {width} is not divisible by heads {self.heads}; choose heads that divide it")
        self.query, self.value, self.out = (Ways(lambda: nn.Linear(width, width), config.decoupled) for _ in range(3))
        self.key = Ways(lambda: nn.Linear(width, width, bias=config.key_bias), config.decoupled)
        self.norm = Ways(lambda: nn.LayerNorm(width, stack.eps), config.decoupled) if config.sub_norm else None

    def forward(self, x: Tensor, num_image: int, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """[M, S, D] -> [M, S, D]; ``mask`` bool or additive, broadcastable to [M, H, S, keys]."""
        query, keys, values = (self._split(way(x, num_image)) for way in (self.query, self.key, self.value))
        if cache is not None:
            if cache.past is not None:
                keys, values = torch.cat([cache.past.keys, keys], 2), torch.cat([cache.past.values, values], 2)
            cache.past = KeyValues(keys, values)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, keys, values, mask, dropout).transpose(1, 2).flatten(2)
        return self.out(mixed if self.norm is None else self.norm(mixed, num_image), num_image)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MultiwayFeedForward(nn.Module):
    """Two linear maps with an activation, and maybe a norm, between them."""

    def __init__(self, config: MultiwayConfig, stack: StackConfig) -> None:
        super().__init__()
        hidden = stack.hidden or 4 * stack.width
        self.up, self.down = nn.Linear(stack.width, hidden), nn.Linear(hidden, stack.width)
        self.norm = nn.LayerNorm(hidden, stack.eps) if config.sub_norm else nn.Identity()
        self.activation = ACTIVATIONS[stack.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.activation(self.up(x))))


class MultiwayBlock(nn.Module):
    """Self-attention over all tokens, feed-forward by modality; residual, with the norms before each."""

    def __init__(self, config: MultiwayConfig, stack: StackConfig, pair: bool) -> None:
        super().__init__()
        self.attention_norm = Ways(lambda: nn.LayerNorm(stack.width, stack.eps), config.decoupled)
        self.attention = MultiwayAttention(config, stack)
        self.feed_norm = Ways(lambda: nn.LayerNorm(stack.width, stack.eps), True, pair)
        self.feed = Ways(lambda: MultiwayFeedForward(config, stack), True, pair)
        scale = config.layer_scale
        self.attention_scale, self.feed_scale = (
            None if scale is None else nn.Parameter(torch.full((stack.width,), scale)) for _ in range(2)
        )
        self.drop = nn.Dropout(stack.dropout)

    def forward(
        self, x: Tensor, num_image: int, pair: bool, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """[M, S, D], the first ``num_image`` tokens the image's -> [M, S, D].

        Args:
            x: rows.
            num_image: N, or 0.
            pair: take the feed-forward of pairs, where the block has one.
            mask: bool or additive, broadcastable to [M, H, S, keys].
            cache: keys and values of earlier tokens, extended in place.
        """
        mixed = self.attention(self.attention_norm(x, num_image), num_image, mask, cache)
        x = x + self.drop(mixed if self.attention_scale is None else self.attention_scale * mixed)
        fed = self.feed(self.feed_norm(x, num_image, pair), num_image, pair)
        return x + self.drop(fed if self.feed_scale is None else self.feed_scale * fed)


class Multiway(nn.Module):
    """Image and text tokens through one stack of layers by modality.

    Raises:
        ValueError: the norm is not before the branches, or the image has no grid to tell distances in.
    """

    attention_kinds: tuple[AttentionKind, ...] = ("full", "causal", "prefix")

    def __init__(
        self,
        config: MultiwayConfig,
        image_width: int,
        text_width: int,
        reads: frozenset[Side],
        grid: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.config, stack = config, config.stack
        if stack.norm != "pre":
            raise ValueError("model.fusion.norm post: multiway has its norms before each branch; remove it")
        if stack.normformer:
            raise ValueError("model.fusion.normformer true: multiway has sub_norm in its place; set it to false")
        self.text_width = self.image_width = width = stack.width
        self.image_project = nn.Linear(image_width, width) if image_width != width else nn.Identity()
        self.text_project = nn.Linear(text_width, width) if text_width != width else nn.Identity()
        self.modality = modality_table(width, config.images) if config.modality_embedding else None
        first = stack.layers - config.pair_layers
        self.blocks = nn.ModuleList(MultiwayBlock(config, stack, number >= first) for number in range(stack.layers))
        self.final_norm = Ways(lambda: nn.LayerNorm(width, stack.eps), config.decoupled) if config.final_norm else None
        initialise(self)
        self.positions: RelativePositions | None = None
        if config.relative_positions is not None:
            if grid is None:
                raise ValueError(
                    "model.fusion.relative_positions needs an image grid, which this vision encoder has not; use "
                    "model.vision.kind patch, or set it to none"
                )
            self.positions = RelativePositions(grid, config.relative_positions, stack.layers, stack.heads)
        self.pooler = Pooler(config.pooler, width, width) if "pooled" in reads else None
        self.pooler_norm = nn.LayerNorm(width, stack.eps) if self.pooler and config.pooler_norm else None
        self.pooled_width = pooled_width(self.pooler, config.images)

    @property
    def branches(self) -> tuple[str, ...]:
        """Ways through the stack that one modality alone can take."""
        return (MAIN, VL)

    def load_pretrained(self) -> None:
        """Nothing: its checkpoints are loaded whole."""

    def forward(
        self,
        image: Tokens | None,
        text: Tokens | None,
        image_index: Tensor | None = None,
        attention: AttentionKind = "full",
        prefix: Tensor | None = None,
        layers: bool = False,
        branch: str = MAIN,
    ) -> Fused:
        """Image states [B, N, D] at rows ``image_index`` with text states [M, L, D] -> Fused of M rows.

        Under "causal" and "prefix" attention all tokens see the image and the text's prefix, and text tokens the words
        before them. ``branch`` "vl" sends one modality alone through the feed-forward of pairs.
        """
        if self.config.images == "each" and image is not None and text is not None:
            return fuse_each(partial(self._fuse, image, layers=layers), text, image_index, attention, prefix)
        return self._fuse(image, text, image_index, attention, prefix, layers=layers, branch=branch)

    def _fuse(
        self,
        image: Tokens | None,
        text: Tokens | None,
        image_index: Tensor | None,
        attention: AttentionKind,
        prefix: Tensor | None,
        number: Tensor | None = None,
        layers: bool = False,
        branch: str = MAIN,
    ) -> Fused:
        """As ``forward``, of rows with one image, each of this ``number`` [M] in its text."""
        assert branch in self.branches, branch
        states, keep, num_image = self._join(image, text, image_index, number)
        pair = branch == VL or (image is not None and text is not None)
        seen = joined_mask(keep, num_image, attention, prefix)
        biases = self._biases(num_image, states.shape[1] - num_image)
        every = [states]
        for block, bias in zip(self.blocks, biases, strict=True):
            states = block(states, num_image, pair, with_bias(seen, bias))
            every.append(states)
        if self.final_norm is not None:
            states = self.final_norm(states, num_image)
        kept = tuple(every) if layers else None
        image, text = split_sides(states, keep, num_image, image is not None, text is not None, kept)
        return Fused(image, text, self._pool(image, text))

    def start(self, image: Tokens, image_index: Tensor | None = None) -> list[Cache]:
        """Read images [B, N, D] of an image-text pair -> what :meth:`step` reads of them, one cache a block."""
        states, keep, num_image = self._join(image, None, image_index)
        caches = [Cache() for _ in self.blocks]
        mask = attention_mask(keep)
        biases = self._biases(num_image, 0)
        for block, bias, cache in zip(self.blocks, biases, caches, strict=True):
            states = block(states, num_image, True, with_bias(mask, bias), cache)
        return caches

    def step(self, text: Tensor, first: int, num_image: int, caches: list[Cache]) -> Tensor:
        """Read the newest words [M, L', D] of texts after ``num_image`` image tokens -> states [M, L', D].

        Words see the image and the words before them; ``caches`` are extended. ``first`` is the position of the first
        of these words. The images must all be real: no padding.
        """
        states = self.text_project(text)
        if self.modality is not None:
            states = states + self.modality.weight[1]
        length = first + text.shape[1]
        seen = attention_mask(None, "causal", length=num_image + length, device=text.device)
        assert seen is not None
        seen = seen[:, :, num_image + first :]
        for block, bias, cache in zip(self.blocks, self._biases(num_image, length), caches, strict=True):
            rows = None if bias is None else bias[:, :, num_image + first :]
            states = block(states, 0, True, with_bias(seen, rows), cache)
        return states if self.final_norm is None else self.final_norm(states, 0)

    def _join(
        self, image: Tokens | None, text: Tokens | None, image_index: Tensor | None, number: Tensor | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """Both sides behind each other, image first: states [M, S, D], keep [M, S], N."""
        parts: list[Tensor] = []
        keeps: list[Tensor] = []
        for tokens, project in ((image, self.image_project), (text, self.text_project)):
            if tokens is None:
                continue
            states, keep = gather_images(tokens.states, tokens.keep, image_index if tokens is image else None)
            states = project(states)
            if self.modality is not None:
                of_image = tokens is image
                states = states + (image_modality(self.modality, number) if of_image else self.modality.weight[1])
            parts.append(states)
            keeps.append(states.new_ones(states.shape[:2], dtype=torch.bool) if keep is None else keep)
        return torch.cat(parts, 1), torch.cat(keeps, 1), 0 if image is None else parts[0].shape[1]

    def _biases(self, num_image: int, length: int) -> list[Tensor | None]:
        if self.positions is None:
            return [None] * len(self.blocks)
        return list(self.positions(num_image, length)[:, None].unbind())

    def _pool(self, image: Tokens | None, text: Tokens | None) -> Tensor:
        first = [None if side is None else side.pooled for side in (image, text)]
        if self.pooler is None or (None in first and self.pooler.reads_image):
            given = next(one for one in first if one is not None)
            return given.new_zeros(given.shape[0], 0)
        if self.config.pooler_side == "image" and first[0] is not None and not self.pooler.reads_image:
            first[1] = None  # a pooler of one state takes the text's where there is one
        if self.pooler_norm is not None:
            first = [None if one is None else self.pooler_norm(one) for one in first]
        return self.pooler(*first)
