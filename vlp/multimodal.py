"""`multimodal`: the upper half of a causal text stack, which reads the image; the text encoder is its lower half.

CoCa's decoder (Yu et al. 2022, section 3.2): one pass of the text serves the contrastive loss and the captions.
Shapes: B memory rows, T texts, L length, S memory length, D width.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from encoders.layers import Attention, Cache, FeedForward, KeyValues, attention_mask, initialise
from encoders.text import BesideConfig, StackConfig, TextEmbeddings, TextEncoder, load_bert
from encoders.types import Texts, Tokens
from vlp.decoder import Decoder, DecoderConfig
from vlp.fusion import Fusion
from vlp.fusion.pooler import gather_keep


class MultimodalConfig(BesideConfig):
    """Blocks with cross-attention on the text encoder's states."""

    kind: Literal["multimodal"] = "multimodal"
    cross: Literal["inside", "behind"] = "inside"
    """Where the image is read: between self-attention and feed-forward (CoCa), or behind both, by a block of
    cross-attention with a feed-forward of its own (open_clip's CoCa)."""
    cross_hidden: int | None = None
    """Width inside that feed-forward; none = 4 x width."""
    memory: Literal["image"] = "image"
    """What it reads of the memory."""
    init_layer: int = 0
    """First layer of `init` to take."""

    def build(self, memory_width: int, text: nn.Module, fusion: Fusion | None) -> Multimodal:
        """Build the decoder on top of the text encoder."""
        return Multimodal(self, memory_width, text)


class CrossBlock(nn.Module):
    """Cross-attention and feed-forward, each behind a norm; the memory has a norm, too."""

    def __init__(self, stack: StackConfig, memory_width: int, hidden: int) -> None:
        super().__init__()
        self.cross = Attention(stack.width, stack.heads, kv_width=memory_width, dropout=stack.dropout)
        self.cross_norm = nn.LayerNorm(stack.width, stack.eps)
        self.memory_norm = nn.LayerNorm(memory_width, stack.eps)
        self.feed = FeedForward(stack.width, hidden, stack.activation)
        self.feed_norm = nn.LayerNorm(stack.width, stack.eps)
        self.drop = nn.Dropout(stack.dropout)

    def project(self, memory: Tensor) -> KeyValues:
        """[B, S, memory_width] -> keys and values."""
        return self.cross.project(self.memory_norm(memory))

    def forward(self, x: Tensor, memory: KeyValues, mask: Tensor | None) -> Tensor:
        """[T, L, D] -> [T, L, D]."""
        x = x + self.drop(self.cross(self.cross_norm(x), memory, mask))
        return x + self.drop(self.feed(self.feed_norm(x)))


class Multimodal(nn.Module):
    """The text encoder's states and a memory -> tokens, left to right.

    Raises:
        ValueError: the text encoder sees the future, or is of another width.
    """

    def __init__(self, config: MultimodalConfig, memory_width: int, text: nn.Module) -> None:
        super().__init__()
        self.config, stack = config, config.stack
        if not isinstance(text, TextEncoder) or not text.config.causal or text.width != stack.width or text.bare:
            raise ValueError(
                "model.decoder.kind multimodal goes on from the text encoder, which must be of kind text, causal, with "
                f"layers and of width {stack.width}; change it, or take model.decoder.kind causal"
            )
        self.width, self.lower = stack.width, text
        behind = config.cross == "behind"
        self.blocks = nn.ModuleList(stack.block(None if behind else memory_width) for _ in range(stack.layers))
        hidden = config.cross_hidden or 4 * stack.width
        self.cross_blocks = nn.ModuleList(
            CrossBlock(stack, memory_width, hidden) for _ in range(stack.layers if behind else 0)
        )
        self.final_norm = nn.LayerNorm(stack.width, stack.eps) if stack.norm == "pre" else nn.Identity()
        for part in (self.blocks, self.cross_blocks):
            initialise(part)

    @property
    def embeddings(self) -> TextEmbeddings:
        """Those of the text encoder."""
        return self.lower.embeddings

    @property
    def word_embedding(self) -> nn.Parameter:
        """[V, D], for tied heads."""
        return self.lower.word_embedding

    def load_pretrained(self) -> None:
        """Fill the blocks from ``config.init``, where the recipe names one."""
        if self.config.init is not None:
            load_bert(self, self.config.init, embeddings=False, first=self.config.init_layer)

    def forward(
        self,
        texts: Texts,
        memory: Tokens,
        memory_index: Tensor | None = None,
        layers: bool = False,
        lower: Tokens | None = None,
    ) -> Tokens:
        """Texts [T, L] reading memory rows ``memory_index`` [T] (None: row t) -> Tokens [T, L, D].

        ``lower`` is what the text encoder makes of the texts, where that is known; ``layers`` begin with it, and have
        two a block where the image is read behind it.
        """
        states = (self.lower(texts) if lower is None else lower).states
        mask = attention_mask(texts.keep, "causal")
        states, every = self._run(states, mask, memory, memory_index, self._caches())
        return Tokens(states, texts.keep, states[:, 0], every if layers else None)

    def _caches(self) -> list[Cache]:
        return [Cache() for _ in self.blocks]

    def _run(
        self, states: Tensor, mask: Tensor | None, memory: Tokens, index: Tensor | None, caches: list[Cache]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the blocks on the newest tokens, extending ``caches`` in place."""
        every = [states]
        memory_mask = attention_mask(gather_keep(memory.keep, index))
        for number, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            if self.cross_blocks:
                cross = self.cross_blocks[number]
                assert isinstance(cross, CrossBlock)
                states = block(states, mask, cache=cache)
                every.append(states)
                if cache.memory is None:
                    cache.memory = cross.project(memory.states).rows(index)
                states = cross(states, cache.memory, memory_mask)
            else:
                read = {"memory": memory.states, "memory_index": index, "memory_mask": memory_mask}
                states = block(states, mask, cache=cache, **read)
            every.append(states)
        return self.final_norm(states), tuple(every)

    def start(self) -> list[Cache]:
        """Return empty caches for :meth:`step`, one a block of both halves."""
        return [Cache() for _ in self.lower.blocks] + self._caches()

    def step(self, ids: Tensor, memory: Tokens, caches: list[Cache], memory_index: Tensor | None = None) -> Tensor:
        """Read the newest tokens ``ids`` [T, L'] after those in ``caches`` -> states [T, L', D]; extends ``caches``."""
        past = caches[0].past
        first = 0 if past is None else past.keys.shape[2]
        states = self.embeddings(Texts(ids, torch.ones_like(ids, dtype=torch.bool)), first)
        mask = attention_mask(None, "causal", length=first + ids.shape[1], device=ids.device)
        assert mask is not None
        mask = mask[:, :, first:]
        half = len(self.lower.blocks)
        for block, cache in zip(self.lower.blocks, caches[:half], strict=True):
            states = block(states, mask, cache=cache)
        if self.lower.config.pool != "token":
            states = self.lower.finish(states)
        return self._run(states, mask, memory, memory_index, caches[half:])[0]


AnyDecoderConfig: TypeAlias = Annotated[DecoderConfig | MultimodalConfig, Field(discriminator="kind")]
AnyDecoder: TypeAlias = Decoder | Multimodal
