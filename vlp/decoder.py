"""`decoder`: a causal text stack that reads a memory by cross-attention (captioning, generative answers).

Shapes: B memory rows, T texts, L length, S memory length, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from encoders.layers import Cache, attention_mask, initialise, with_bias
from encoders.text import BesideConfig, StackConfig, TextEmbeddings, TextEncoder, load_bert
from encoders.types import Texts, Tokens
from vlp.fusion import Fusion
from vlp.fusion.dual import DualStream
from vlp.fusion.pooler import gather_keep
from vlp.fusion.single import SingleStream
from vlp.fusion.untied import CrossPositions, UntiedConfig, UntiedPositions, untied_scale


class DecoderConfig(BesideConfig):
    """A causal stack with cross-attention in every block."""

    kind: Literal["causal"] = "causal"
    share: Literal["none", "words", "embeddings", "all_but_self_attention", "all"] = "embeddings"
    """What it shares: nothing; the text encoder's word embedding (it has no segments then; OFA); all its embeddings;
    all but self-attention with the cross-attention fusion (BLIP: cross-attention and feed-forward of layer n are the
    fusion's); all with the single-stream fusion, whose attention reads the memory as well (XGPT)."""
    untied: UntiedConfig | None = None
    """Positions that attention reads apart from the content, of words and of the memory, whose fusion has them too
    (OFA); none = what the embeddings add."""
    memory: Literal["image", "text", "both"] = "image"
    """What it reads of a fused memory: its text side (ALBEF's VQA decoder), its image side, or the image's tokens and
    the text's behind them (SimVLM)."""
    reads_padding: bool = False
    """Read the memory's padding as well, so that what is written depends on a batch's longest text; transformers' BLIP
    does so for questions."""
    init_layer: int = 0
    """First layer of `init` to take."""

    any_form: ClassVar[bool] = True

    def build(self, memory_width: int, text: nn.Module, fusion: Fusion | None) -> Decoder:
        """Build the decoder beside the text encoder and the fusion that it may share with."""
        return Decoder(self, memory_width, text, fusion)


class Decoder(nn.Module):
    """Texts and a memory -> tokens, left to right.

    Raises:
        ValueError: it is to share what the text encoder or the fusion does not have.
    """

    def __init__(self, config: DecoderConfig, memory_width: int, text: nn.Module, fusion: Fusion | None) -> None:
        super().__init__()
        self.config, stack = config, config.stack
        self.width = stack.width
        self.embeddings = _embeddings(config.share, stack, text)
        scale = None if config.untied is None else untied_scale(stack)
        blocks = [stack.block(memory_width, scale) for _ in range(stack.layers)]
        final_norm = stack.new_norm()
        for block in blocks:
            initialise(block)
        if config.share == "all_but_self_attention":
            if not (
                isinstance(fusion, DualStream)
                and not fusion.co
                and len(fusion.blocks) == stack.layers
                and fusion.text_width == stack.width
            ):
                raise ValueError(
                    "model.decoder.share all_but_self_attention needs model.fusion dual_stream with attention "
                    f"cross, {stack.layers} layers and width {stack.width}; change it or share embeddings"
                )
            for block, theirs in zip(blocks, fusion.blocks, strict=True):
                for name in ("cross", "cross_norm", "cross_after", "feed", "feed_norm"):
                    setattr(block, name, getattr(theirs, name))
        elif config.share == "all":
            if not (
                isinstance(fusion, SingleStream)
                and len(fusion.blocks) == stack.layers
                and memory_width == fusion.text_width == stack.width
            ):
                raise ValueError(
                    f"model.decoder.share all needs model.fusion single_stream with {stack.layers} layers and width "
                    f"{stack.width}, and a memory of that width; change it or share embeddings"
                )
            for block, theirs in zip(blocks, fusion.blocks, strict=True):
                for name in ("attention", "attention_norm", "attention_after", "feed", "feed_norm"):
                    setattr(block, name, getattr(theirs, name))
                block.cross, block.cross_norm = block.attention, block.attention_norm
                block.cross_after = block.attention_after
            final_norm = fusion.final_norm
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.buckets = stack.form.new_buckets(stack.heads, both_ways=False)
        if self.buckets is not None:
            initialise(self.buckets)
        self.untied: UntiedPositions | None = None
        if config.untied is not None:
            if not isinstance(fusion, SingleStream) or fusion.untied is None:
                raise ValueError(
                    "model.decoder.untied reads the places of a memory, which model.fusion.kind single_stream with "
                    "untied gives; set that too, or model.decoder.untied none"
                )
            self.untied = UntiedPositions(config.untied, stack, None)
            self.cross_positions = CrossPositions(stack, fusion.text_width)

    @property
    def word_embedding(self) -> nn.Parameter:
        """[V, D], for tied heads."""
        weight = self.embeddings.word.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def load_pretrained(self) -> None:
        """Fill the blocks from ``config.init``, where the recipe names one."""
        if self.config.init is not None:
            load_bert(self, self.config.init, embeddings=False, first=self.config.init_layer, side="decoder")

    def forward(self, texts: Texts, memory: Tokens, memory_index: Tensor | None = None, layers: bool = False) -> Tokens:
        """Texts [T, L] reading memory rows ``memory_index`` [T] (None: row t) -> Tokens [T, L, D]."""
        mask = attention_mask(texts.keep, "causal" if texts.attention == "full" else texts.attention, texts.prefix)
        states = self.embeddings(texts)
        if self.buckets is not None:
            mask = with_bias(mask, self.buckets(states.shape[1], states.shape[1]))
        every = [states]
        biases, on_memory = self._biases(memory, 0, texts.ids.shape[1])
        memory_mask = with_bias(self._memory_mask(memory, memory_index), on_memory)
        read = {"memory": memory.states, "memory_index": memory_index, "memory_mask": memory_mask}
        for block, bias in zip(self.blocks, biases, strict=True):
            states = block(states, with_bias(mask, bias), **read)
            every.append(states)
        states = self.final_norm(states)
        return Tokens(states, texts.keep, states[:, 0], tuple(every) if layers else None)

    def _biases(self, memory: Tokens, first: int, length: int) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """Biases of the words from ``first`` on: on all ``length`` words, a block each, and on the memory."""
        if self.untied is None:
            return [None] * len(self.blocks), None
        assert memory.positions is not None, "checked when the model is built"
        positions = self.untied(0, length)
        own = [bias[:, :, first:] for bias in self.untied.biases(positions, 0)]
        return own, self.cross_positions(positions[:, first:], memory.positions)

    def _memory_mask(self, memory: Tokens, index: Tensor | None) -> Tensor | None:
        return None if self.config.reads_padding else attention_mask(gather_keep(memory.keep, index))

    def start(self) -> list[Cache]:
        """Return empty caches for :meth:`step`, one a block."""
        return [Cache() for _ in self.blocks]

    def step(self, ids: Tensor, memory: Tokens, caches: list[Cache], memory_index: Tensor | None = None) -> Tensor:
        """Read the newest tokens ``ids`` [T, L'] after those in ``caches`` -> states [T, L', D]; extends ``caches``.

        The first call projects the memory's keys; later calls find them in the cache, in the caches' row order.
        """
        past = caches[0].past
        first = 0 if past is None else past.keys.shape[2]
        length = first + ids.shape[1]
        states = self.embeddings(Texts(ids, torch.ones_like(ids, dtype=torch.bool)), first)
        mask = attention_mask(None, "causal", length=length, device=ids.device)
        assert mask is not None
        mask = mask[:, :, first:]
        if self.buckets is not None:
            mask = with_bias(mask, self.buckets(ids.shape[1], length, first))
        biases, on_memory = self._biases(memory, first, length)
        memory_mask = with_bias(self._memory_mask(memory, memory_index), on_memory)
        read = {"memory": memory.states, "memory_index": memory_index, "memory_mask": memory_mask}
        for block, bias, cache in zip(self.blocks, biases, caches, strict=True):
            states = block(states, with_bias(mask, bias), cache=cache, **read)
        return self.final_norm(states)


def _embeddings(share: str, stack: StackConfig, text: nn.Module) -> TextEmbeddings:
    if not isinstance(text, TextEncoder):
        raise ValueError("model.decoder needs model.text.kind text, whose vocabulary and embeddings it takes")
    if share == "none":
        own = TextEmbeddings(text.config.model_copy(update={"width": stack.width, "eps": stack.eps}))
        initialise(own)
        return own
    if share == "words" and text.config.width == stack.width:
        own = TextEmbeddings(text.config.model_copy(update={"eps": stack.eps, "segments": 0}))
        initialise(own)
        own.word = text.embeddings.word
        return own
    if text.config.width != stack.width:
        raise ValueError(
            f"model.decoder.share {share} needs model.decoder.width {text.config.width}, the text encoder's; "
            f"it is {stack.width}"
        )
    return text.embeddings
