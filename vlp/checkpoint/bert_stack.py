"""Names of BERT's layers as ALBEF, BLIP and X-VLM store them: one stack there, text tower and fusion here.

The layers from the first cross-attention on are the fusion (Li et al. 2021, ALBEF: the upper six of twelve).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, equal

from vlp.checkpoint.foreign import Shapes, State, count_layers
from vlp.checkpoint.names import Pair, blocks

LAYER: dict[str | tuple[str, ...], str | tuple[str, ...]] = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed.up",
    "output.dense": "feed.down",
    "output.LayerNorm": "feed_norm",
}
CROSS: dict[str | tuple[str, ...], str | tuple[str, ...]] = {
    "crossattention.self.query": "cross.query",
    "crossattention.self.key": "cross.key",
    "crossattention.self.value": "cross.value",
    "crossattention.output.dense": "cross.out",
    "crossattention.output.LayerNorm": "cross_norm",
}


@dataclass(frozen=True)
class Stack:
    """A BERT stack of a file."""

    layers: int
    """All of them."""
    split: int
    """The first with cross-attention; ``layers`` where none has."""
    width: int
    hidden: int
    memory: int | None
    """Width of what the cross-attention reads; None without it."""
    vocabulary: int
    positions: int
    segments: int
    """Rows of the token-type embedding, 0 = none."""


def read_stack(shapes: Shapes, prefix: str) -> Stack:
    """Return the sizes of the stack whose names begin with ``prefix`` ("text_encoder.bert.")."""
    begin = f"{prefix}encoder.layer."
    layers = count_layers(shapes, re.escape(begin) + r"(\d+)\.")
    crossed = [n for n in range(layers) if f"{begin}{n}.crossattention.self.key.weight" in shapes]
    words = shapes[f"{prefix}embeddings.word_embeddings.weight"]
    return Stack(
        layers,
        crossed[0] if crossed else layers,
        words[1],
        shapes[f"{begin}0.intermediate.dense.weight"][0],
        shapes[f"{begin}{crossed[0]}.crossattention.self.key.weight"][1] if crossed else None,
        words[0],
        shapes[f"{prefix}embeddings.position_embeddings.weight"][0],
        shapes.get(f"{prefix}embeddings.token_type_embeddings.weight", (0,))[0],
    )


def split_model(shapes: Shapes, text: Stack, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return text tower, fusion, embedding and decoder of a file whose BERT stack is split (ALBEF, X-VLM).

    Args:
        shapes: of the whole file.
        text: its stack.
        sizes: what text tower, fusion and decoder have in common.
    """
    model: dict[str, Any] = {
        "text": {
            "kind": "text",
            **sizes,
            "layers": text.split,
            "vocabulary_size": text.vocabulary,
            "max_length": text.positions,
            "segments": text.segments,
        },
        "fusion": {"kind": "dual_stream", "attention": "cross", **sizes, "layers": text.layers - text.split},
    }
    if "vision_proj.weight" in shapes:
        model["embed"] = {"width": shapes["vision_proj.weight"][0]}
    if "text_decoder.bert.embeddings.word_embeddings.weight" in shapes:
        layers = read_stack(shapes, "text_decoder.bert.").layers
        model["decoder"] = {"kind": "causal", **sizes, "layers": layers, "share": "none", "memory": "text"}
    return model


def embeddings(theirs: str, ours: str) -> tuple[Pair, ...]:
    """Return the names of a stack's embeddings."""
    return (
        Pair(f"{theirs}embeddings.word_embeddings.weight", f"{ours}embeddings.word.weight"),
        Pair(f"{theirs}embeddings.position_embeddings.weight", f"{ours}embeddings.position.weight"),
        Pair(f"{theirs}embeddings.token_type_embeddings.weight", f"{ours}embeddings.segment.weight"),
        Pair(f"{theirs}embeddings.LayerNorm.{{p}}", f"{ours}embeddings.norm.{{p}}"),
    )


def split_stack(theirs: str, ours: str, layers: int, split: int) -> tuple[Pair, ...]:
    """Return the names of a stack whose layers from ``split`` on are the fusion, embeddings included."""
    pairs = [*embeddings(theirs, f"{ours}text.")]
    for number in range(layers):
        part = f"{ours}text.blocks.{number}." if number < split else f"{ours}fusion.blocks.{number - split}."
        pairs += blocks(f"{theirs}encoder.layer.{number}.", part, LAYER | CROSS)
    return tuple(pairs)


def decoder_stack(theirs: str, ours: str) -> tuple[Pair, ...]:
    """Return the names of a stack that is the decoder, embeddings included."""
    return (*embeddings(theirs, ours), *blocks(f"{theirs}encoder.layer.{{n}}.", f"{ours}blocks.{{n}}.", LAYER | CROSS))


def word_head(theirs: str, ours: str) -> tuple[Pair, ...]:
    """Return the names of BERT's prediction head (``cls.predictions.``); its words are the embedding's."""
    return (
        Pair(f"{theirs}transform.dense.{{p}}", f"{ours}dense.{{p}}"),
        Pair(f"{theirs}transform.LayerNorm.{{p}}", f"{ours}norm.{{p}}"),
        Pair(f"{theirs}bias", f"{ours}decoder.bias"),
    )


def word_head_copies(theirs: str, words: str) -> dict[str, str]:
    """Return what such a head stores twice: name of the copy -> of the original (``words``: the word embedding)."""
    return {f"{theirs}decoder.weight": words, f"{theirs}decoder.bias": f"{theirs}bias"}


def shared_keys(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Return which weights of a stack of NLVR2 are stored twice: name of the copy -> of the original.

    Keys and values of every second cross-attention are those of the one before.
    """
    numbers = sorted(
        int(name[len(prefix) :].split(".")[0])
        for name in names
        if name.startswith(prefix) and "crossattention.self.key.weight" in name
    )
    return {
        f"{prefix}{second}.crossattention.self.{kind}.{p}": f"{prefix}{first}.crossattention.self.{kind}.{p}"
        for first, second in zip(numbers[::2], numbers[1::2], strict=True)
        for kind in ("key", "value")
        for p in ("weight", "bias")
    }


def without_copies(state: State, copies: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Leave out weights that are stored twice; a copy whose original is missing takes its name.

    Args:
        state: by their names.
        copies: name of the copy -> of the original.

    Returns:
        The state, and what was left out with the reason.

    Raises:
        ValueError: a copy and its original differ.
    """
    found: dict[str, Tensor] = dict(state)
    left: dict[str, str] = {}
    for copy, original in copies.items():
        if copy not in found:
            continue
        value = found.pop(copy)
        if original not in found:
            found[original] = value
        elif not equal(found[original], value):
            raise ValueError(f"{copy} and {original} are one weight in this family, but differ; the file is not whole")
        else:
            left[copy] = f"the same as {original}"
    return found, left
