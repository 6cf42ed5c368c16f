"""`bridge`: co-attention whose every layer also reads a layer of each tower (Xu et al. 2023, BridgeTower, section 3.3).

The fusion's k layers stand beside the towers' last k: what a tower's layer gives is projected, joined with what the
fusion's layer before gave, and normalised.
Shapes: B images, M rows, N image tokens, L text length, D width, k layers.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from encoders.layers import attention_mask, initialise
from encoders.text import BesideConfig
from encoders.types import AttentionKind, Tokens
from objectives.base import Fused, Side
from vlp.fusion.each import ImagesPerText, fuse_each, image_modality, modality_table, pooled_width
from vlp.fusion.pooler import Pooler, PoolerKind, gather_images

LinkKind = Literal["add", "scaled_add", "interpolate"]


class BridgeConfig(BesideConfig):
    """Co-attention beside the last layers of the two towers."""

    kind: Literal["bridge"] = "bridge"
    layers: int | None = 6
    """Blocks of each stream, and how many of each tower's last layers they read."""
    link: LinkKind = "add"
    """How a tower's layer and the stream are joined: their sum; with a learned factor on the tower's; or a learned
    interpolation."""
    one_projection: bool = True
    """One projection for all layers of a tower, else one for each."""
    link_eps: float | None = None
    """Epsilon of the norms where a tower's layer comes in; none = that of the other norms."""
    pooler: PoolerKind = "concat"
    """How `pooled` is made."""
    images: ImagesPerText = "one"
    """Images per text: one; two laid behind each other (`pair`); or two that the text is fused with one after the other
    (`each`: NLVR2)."""

    def build(self, image_width: int, text_width: int, reads: frozenset[Side]) -> Bridge:
        """Build the fusion; ``reads`` says which sides anyone reads."""
        return Bridge(self, image_width, text_width, reads)


class Link(nn.Module):
    """A tower's layer and the stream so far -> what the next block of the stream reads."""

    def __init__(self, kind: LinkKind, width: int, eps: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0)) if kind == "scaled_add" else None
        self.share = nn.Parameter(torch.tensor(0.5)) if kind == "interpolate" else None
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, tower: Tensor, stream: Tensor) -> Tensor:
        """[M, N, D] each -> [M, N, D]."""
        if self.share is not None:
            return self.norm(tower.lerp(stream, self.share))
        return self.norm((tower if self.factor is None else tower * self.factor) + stream)


class Bridge(nn.Module):
    """Two streams that query each other, each beside its tower."""

    attention_kinds: tuple[AttentionKind, ...] = ("full",)

    def __init__(self, config: BridgeConfig, image_width: int, text_width: int, reads: frozenset[Side]) -> None:
        super().__init__()
        self.config, stack = config, config.stack
        if stack.norm != "post":
            raise ValueError("model.fusion.norm pre: bridge has its norms after each branch; set it to post")
        self.text_width, self.reads_layers = (width, number) = (stack.width, stack.layers)
        eps = stack.eps if config.link_eps is None else config.link_eps
        projections = 1 if config.one_projection else number
        self.text_project = nn.ModuleList(nn.Linear(text_width, width) for _ in range(projections))
        self.image_project = nn.ModuleList(nn.Linear(image_width, width) for _ in range(projections))
        self.modality = modality_table(width, config.images)
        self.pooler = Pooler(config.pooler, width, width) if "pooled" in reads else None
        self.pooled_width = pooled_width(self.pooler, config.images)
        # The last image block is worth having only if someone reads its output.
        reads_image = "image" in reads or (self.pooler is not None and self.pooler.reads_image)
        images = number if reads_image else number - 1
        self.text_norm, self.image_norm = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.text_links = nn.ModuleList(Link(config.link, width, eps) for _ in range(number - 1))
        self.image_links = nn.ModuleList(Link(config.link, width, eps) for _ in range(number - 1))
        self.blocks = nn.ModuleList(stack.block(width) for _ in range(number))
        self.image_blocks = nn.ModuleList(stack.block(width) for _ in range(images))
        for part in self.children():
            if not isinstance(part, Pooler):
                initialise(part)

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
    ) -> Fused:
        """Image layers [B, N, k * D'] at rows ``image_index`` with text layers [M, L, k * D'] -> Fused of M rows.

        Raises:
            ValueError: a side is missing, or ``attention`` is one that leaks here.
        """
        if image is None or text is None:
            raise ValueError(
                "model.fusion bridge needs both image and text; use the towers' own states for one of them"
            )
        if attention not in self.attention_kinds:
            raise ValueError(f"model.fusion bridge cannot read a {attention} text without leaking its future; use full")
        if self.config.images == "each":
            return fuse_each(partial(self._fuse, image, layers=layers), text, image_index, attention, prefix)
        return self._fuse(image, text, image_index, attention, prefix, layers=layers)

    def _fuse(
        self,
        image: Tokens,
        text: Tokens,
        image_index: Tensor | None,
        attention: AttentionKind,
        prefix: Tensor | None,
        number: Tensor | None = None,
        layers: bool = False,
    ) -> Fused:
        """As ``forward``, without ``images: each``, whose every row is here the text's image ``number`` [M]."""
        shown, image_keep = gather_images(image.states, image.keep, image_index)
        words = self._project(self.text_project, text.states, self.modality.weight[1])
        seen = self._project(self.image_project, shown, image_modality(self.modality, number))
        text_mask, image_mask = attention_mask(text.keep), attention_mask(image_keep)
        one, other = self.text_norm(words[0]), self.image_norm(seen[0])
        every, every_image = [one], [other]
        for layer, block in enumerate(self.blocks):
            if layer:
                one = self.text_links[layer - 1](words[layer], one)
                other = self.image_links[layer - 1](seen[layer], other)
            # Both read the other's states from before this layer.
            after = block(one, text_mask, memory=other, memory_mask=image_mask)
            if layer < len(self.image_blocks):
                other = self.image_blocks[layer](other, image_mask, memory=one, memory_mask=text_mask)
                every_image.append(other)
            one = after
            every.append(one)
        return self._finish(one, text.keep, other, image_keep, every, every_image, layers)

    def _project(self, projections: nn.ModuleList, states: Tensor, modality: Tensor) -> list[Tensor]:
        """States of k layers side by side [M, N, k * D'] -> each one's [M, N, D]."""
        parts = states.chunk(self.reads_layers, -1)
        return [projections[n if len(projections) > 1 else 0](part) + modality for n, part in enumerate(parts)]

    def _finish(
        self,
        text: Tensor,
        text_keep: Tensor | None,
        image: Tensor,
        image_keep: Tensor | None,
        every: list[Tensor],
        every_image: list[Tensor],
        layers: bool,
    ) -> Fused:
        words = Tokens(text, text_keep, text[:, 0], tuple(every) if layers else None)
        seen = None
        if len(self.image_blocks) == len(self.blocks):
            seen = Tokens(image, image_keep, image[:, 0], tuple(every_image) if layers else None)
        pooled = text.new_zeros(text.shape[0], 0)
        if self.pooler is not None:
            pooled = self.pooler(None if seen is None else seen.pooled, words.pooled)
        return Fused(seen, words, pooled)
