"""`dual_stream`: image and text keep their own stacks and meet in cross-attention.

``attention: cross``: text queries image, images stay as they are (ALBEF, BLIP). ``attention: co``: both streams query
each other, self -> cross -> feed-forward in each (METER).
Shapes: B images, M rows, N image tokens, L text length, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from encoders.layers import Block, attention_mask, initialise
from encoders.text import BesideConfig, load_bert
from encoders.types import AttentionKind, Tokens
from objectives.base import Fused, Side
from vlp.fusion.each import NUM_IMAGES, ImagesPerText, fuse_each, image_modality, modality_table, pooled_width
from vlp.fusion.parallel import TwinAttention
from vlp.fusion.pooler import Pooler, PoolerKind, add_order, gather_images, gather_keep


class DualStreamConfig(BesideConfig):
    """Two streams that meet in cross-attention."""

    kind: Literal["dual_stream"] = "dual_stream"
    attention: Literal["cross", "co"] = "cross"
    """`cross`: text queries image. `co`: each queries the other."""
    layers: int | None = None
    """Blocks of each stream (`cross` has only the text's); none = as many as the text encoder has."""
    modality_embedding: bool = False
    """Add a learned vector to each stream before its first block (METER)."""
    project: bool = False
    """Map both streams linearly to `width` first (METER), also where the widths agree already."""
    pooler: PoolerKind = "cls"
    """How `pooled` is made."""
    image_pool: Literal["first", "mean"] = "first"
    """What of the image stream the pooler reads: its first state, or the mean of all (METER with Swin, which has no
    class token)."""
    images: ImagesPerText | Literal["parallel", "alternate"] = "one"
    """Images per text: one; two laid behind each other (`pair`); two that the text is fused with one after the other
    (`each`: NLVR2 in METER); two that every block of `cross` reads at once, each by a cross-attention of its own
    (`parallel`: in BLIP); or two that the blocks of `cross` read by turns, two blocks sharing the keys and values of
    their cross-attention (`alternate`: in ALBEF, X-VLM)."""
    merge_from: int = 6
    """parallel: blocks from this one on merge what they read of the two images by a linear layer; those before take the
    mean."""
    init_layer: int = 0
    """First layer of `init` to take (ALBEF: 6 of BERT's 12)."""

    def build(self, image_width: int, text_width: int, reads: frozenset[Side]) -> DualStream:
        """Build the fusion; ``reads`` says which sides anyone reads."""
        return DualStream(self, image_width, text_width, reads)


class DualStream(nn.Module):
    """Cross-attention between two streams.

    Raises:
        ValueError: pooler and attention do not fit.
    """

    def __init__(self, config: DualStreamConfig, image_width: int, text_width: int, reads: frozenset[Side]) -> None:
        super().__init__()
        self.config, self.co, stack = config, config.attention == "co", config.stack
        self.text_width = width = stack.width
        self.image_width = width if self.co else None
        linear = config.project or text_width != width
        self.text_project = nn.Linear(text_width, width) if linear else nn.Identity()
        # Without `project`, cross-attention maps the image's own width to keys and values by itself.
        linear = config.project or (self.co and image_width != width)
        self.image_project = nn.Linear(image_width, width) if linear else nn.Identity()
        memory_width = width if linear else image_width
        self.modality = modality_table(width, config.images) if config.modality_embedding else None
        self.order = nn.Parameter(torch.zeros(2, memory_width)) if config.images == "pair" else None
        self.blocks = nn.ModuleList(stack.block(memory_width) for _ in range(stack.layers))
        if config.images == "parallel":
            self._read_in_parallel(memory_width)
        if config.images == "alternate":
            self._read_by_turns()
        pre = stack.norm == "pre"
        self.final_norm = nn.LayerNorm(width, stack.eps) if pre else nn.Identity()
        self.pooler = Pooler(config.pooler, width, width) if "pooled" in reads else None
        self.pooled_width = pooled_width(self.pooler, config.images)
        reads_image = self.pooler is not None and self.pooler.reads_image
        if reads_image and not self.co:
            raise ValueError(
                f"model.fusion.pooler {config.pooler} reads the image stream, which attention cross leaves as "
                "it is; use pooler cls or tanh, or attention co"
            )
        # The last image block is worth having only if someone reads its output.
        reads_image = self.co and (reads_image or "image" in reads)
        self.image_blocks = nn.ModuleList(
            stack.block(width) for _ in range(stack.layers - (not reads_image) if self.co else 0)
        )
        self.image_norm = nn.LayerNorm(width, stack.eps) if pre and reads_image else nn.Identity()
        for part in self.children():
            if not isinstance(part, Pooler):
                initialise(part)

    def _read_in_parallel(self, memory_width: int) -> None:
        """Give every block a cross-attention for each of two images."""
        if self.co:
            raise ValueError("model.fusion.images parallel needs model.fusion.attention cross; set it, or images each")
        stack = self.config.stack
        for number, block in enumerate(self.blocks):
            merge = number >= self.config.merge_from
            twins = TwinAttention(stack.width, stack.heads, kv_width=memory_width, dropout=stack.dropout, merge=merge)
            block.cross = twins

    def _read_by_turns(self) -> None:
        """Let every second block share the keys and values of the one before (Li et al. 2021, ALBEF, section 5)."""
        if self.co or len(self.blocks) % NUM_IMAGES:
            raise ValueError(
                f"model.fusion.images alternate needs model.fusion.attention cross and an even number of layers, not "
                f"{self.config.attention} and {len(self.blocks)}; change them, or set images each"
            )
        for first, second in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            assert isinstance(first, Block) and isinstance(second, Block)
            second.cross.key, second.cross.value = first.cross.key, first.cross.value

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Co-attention would leak a causal text's future through the image stream."""
        return ("full",) if self.co else ("full", "causal", "prefix")

    def load_pretrained(self) -> None:
        """Fill the text blocks from ``config.init``, where the recipe names one."""
        if self.config.init is not None:
            load_bert(self, self.config.init, embeddings=False, first=self.config.init_layer)

    def forward(
        self,
        image: Tokens | None,
        text: Tokens | None,
        image_index: Tensor | None = None,
        attention: AttentionKind = "full",
        prefix: Tensor | None = None,
        layers: bool = False,
    ) -> Fused:
        """Image states [B, N, D] at rows ``image_index`` with text states [M, L, D] -> Fused of M rows.

        Without ``image`` the text stream runs alone, its cross-attention skipped (BLIP's text encoder).

        Raises:
            ValueError: ``text`` is missing, or ``attention`` is one that leaks here.
        """
        if text is None:
            raise ValueError(
                "model.fusion dual_stream has no image-only path; use single_stream or a vision encoder with depth > 0"
            )
        if attention not in self.attention_kinds:
            raise ValueError(
                f"model.fusion.attention co cannot read a {attention} text without leaking its future; use cross"
            )
        if self.config.images == "each" and image is not None:
            return fuse_each(partial(self._fuse, image, layers=layers), text, image_index, attention, prefix)
        return self._fuse(image, text, image_index, attention, prefix, layers=layers)

    def _fuse(
        self,
        image: Tokens | None,
        text: Tokens,
        image_index: Tensor | None,
        attention: AttentionKind,
        prefix: Tensor | None,
        number: Tensor | None = None,
        layers: bool = False,
    ) -> Fused:
        """As ``forward``, without ``images: each``, whose every row is here the text's image ``number`` [M]."""
        states = self.text_project(text.states)
        if self.modality is not None:
            states = states + self.modality.weight[1]
        mask = attention_mask(text.keep, attention, prefix, states.shape[1], states.device)
        if image is None:
            return self._cross(None, None, None, states, text, mask, layers)
        memory, keep = self.image_project(image.states), image.keep
        if self.modality is not None:
            if number is not None:  # an image may be one row's first and another's second
                (memory, keep), image_index = gather_images(memory, keep, image_index), None
            memory = memory + image_modality(self.modality, number)
        return (self._co if self.co else self._cross)(memory, keep, image_index, states, text, mask, layers)

    def _cross(
        self,
        memory: Tensor | None,
        keep: Tensor | None,
        index: Tensor | None,
        states: Tensor,
        text: Tokens,
        mask: Tensor | None,
        layers: bool,
    ) -> Fused:
        if memory is not None and self.order is not None:
            memory, keep = gather_images(memory, keep, index)
            memory, index = add_order(memory, index, self.order), None
        turns = [index]
        if memory is not None and self.config.images == "alternate":
            turns = take_turns(index)
        masks = [attention_mask(gather_keep(keep, one)) for one in turns]
        every = [states]
        for number, block in enumerate(self.blocks):
            turn = number % len(turns)
            states = block(states, mask, memory=memory, memory_index=turns[turn], memory_mask=masks[turn])
            every.append(states)
        return self._finish(None, None, states, text.keep, every if layers else None, None)

    def _co(
        self,
        memory: Tensor,
        keep: Tensor | None,
        index: Tensor | None,
        states: Tensor,
        text: Tokens,
        mask: Tensor | None,
        layers: bool,
    ) -> Fused:
        seen, keep = gather_images(memory, keep, index)
        seen = add_order(seen, index, self.order)
        image_mask = attention_mask(keep)
        every, every_image = [states], [seen]
        for number, block in enumerate(self.blocks):
            # Both read the other's states from before this layer.
            after = block(states, mask, memory=seen, memory_mask=image_mask)
            if number < len(self.image_blocks):
                seen = self.image_blocks[number](seen, image_mask, memory=states, memory_mask=mask)
                every_image.append(seen)
            states = after
            every.append(states)
        return self._finish(seen, keep, states, text.keep, every if layers else None, every_image if layers else None)

    def _finish(
        self,
        image: Tensor | None,
        image_keep: Tensor | None,
        states: Tensor,
        keep: Tensor | None,
        every: list[Tensor] | None,
        every_image: list[Tensor] | None,
    ) -> Fused:
        states = self.final_norm(states)
        seen = None
        if image is not None and len(self.image_blocks) == len(self.blocks):
            image = self.image_norm(image)
            first = mean_of(image, image_keep) if self.config.image_pool == "mean" else image[:, 0]
            seen = Tokens(image, image_keep, first, tuple(every_image) if every_image else None)
        text = Tokens(states, keep, states[:, 0], tuple(every) if every else None)
        pooled = states.new_zeros(states.shape[0], 0)
        if self.pooler is not None and (seen is not None or not self.pooler.reads_image):
            pooled = self.pooler(None if seen is None else seen.pooled, text.pooled)
        return Fused(seen, text, pooled)


def mean_of(states: Tensor, keep: Tensor | None) -> Tensor:
    """Mean [M, D] of a row's states [M, N, D], of those alone that it keeps [M, N]."""
    if keep is None:
        return states.mean(1)
    weight = keep[..., None].to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def take_turns(index: Tensor | None) -> list[Tensor | None]:
    """Return the first and the second image of each row, [M] each, of an index [M, 2].

    Raises:
        ValueError: rows have another number of images.
    """
    number = 1 if index is None or index.dim() == 1 else index.shape[1]
    if index is None or number != NUM_IMAGES:
        raise ValueError(
            f"model.fusion.images alternate gives a text {NUM_IMAGES} images, here it has {number}; set it to one"
        )
    return list(index.unbind(1))
