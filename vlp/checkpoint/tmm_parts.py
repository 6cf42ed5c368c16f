"""What torchmultimodal's models share: its transformer layers, in the names of three generations, and its arguments.

Queries, keys and values are apart (`query` or `q_proj`) or one (`input_proj`); with dropout the second linear layer of
a feed-forward has number 3, else 2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlp.checkpoint.clip import HEAD_WIDTH
from vlp.checkpoint.foreign import Shapes
from vlp.checkpoint.names import Names, Pair, blocks

_PARTS = ("query", "key", "value")
_SPLIT: tuple[tuple[str, ...], ...] = (_PARTS, tuple(f"{one[0]}_proj" for one in _PARTS))
_OUT = ("output", "output_proj")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "heads")
"""What its builders call their attention heads."""


def layers(theirs: str, ours: str, image: bool = False) -> tuple[Pair, ...]:
    """Return the names of a stack's layers, which are our own blocks, or those of a timm ViT (``image``)."""
    joint: Names = "attn.qkv" if image else tuple(f"attention.{name}" for name in _PARTS)
    table: dict[Names, Names] = {
        "attention.input_proj": joint,
        "attention_layernorm": "norm1" if image else "attention_norm",
        "feedforward_layernorm": "norm2" if image else "feed_norm",
        "feedforward.model.0": "mlp.fc1" if image else "feed.up",
        "feedforward.model.2": "mlp.fc2" if image else "feed.down",
        "feedforward.model.3": "mlp.fc2" if image else "feed.down",
    }
    table |= {tuple(f"attention.{name}" for name in names): joint for names in _SPLIT}
    table |= {f"attention.{name}": "attn.proj" if image else "attention.out" for name in _OUT}
    return blocks(theirs + "layer.{n}.", ours + "blocks.{n}.", table)


def crosses(theirs: str, ours: str) -> tuple[Pair, ...]:
    """Return the names of a stack's cross-attentions."""
    table: dict[Names, Names] = {"cross_attention_layernorm": "cross_norm"}
    table |= dict(attention("cross_attention.", "cross."))
    return blocks(theirs + "layer.{n}.", ours + "blocks.{n}.", table)


def attention(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    """Return the names of an attention's four linear layers."""
    found = [(theirs + name, ours + part) for names in _SPLIT for name, part in zip(names, _PARTS, strict=True)]
    return (*found, *((theirs + name, ours + "out") for name in _OUT))


def first_scale() -> Tensor:
    """Return the log temperature that training began with, for files without the losses, which hold it."""
    return torch.tensor([-math.log(0.07)])


def argument(config: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """Return an argument of the function that built the model, wherever in ``config`` it stands."""
    for name in names:
        if name in config:
            return config[name]
    for part in config.values():
        if isinstance(part, Mapping) and (found := argument(part, *names)) is not None:
            return found
    return default


def sections_of(config: Mapping[str, Any], names: tuple[str, ...]) -> list[Mapping[str, Any]]:
    """Return those parts of ``config`` that are called so: each holds the arguments of one builder."""
    return [config[name] for name in names if isinstance(config.get(name), Mapping)]


def heads_of(config: Mapping[str, Any], names: tuple[str, ...], width: int) -> tuple[int, bool]:
    """Return the heads of a stack of this width, and whether ``config`` states them.

    They stand in a part of it called by one of ``names``, or at its top; else in the part that states the same width,
    whatever it is called; else in whatever part does not state another, where only one number found divides it.
    """
    parts = (*sections_of(config, names), config)
    stated = [config.get(f"{name}_heads") for name in names] + [part.get(one) for part in parts for one in _HEADS]
    heads = next((one for one in stated if one), None)
    if heads is None:
        inner = [part for part in config.values() if isinstance(part, Mapping)]
        same = [part for part in inner if width in (part.get("width"), part.get("hidden_size"))]
        heads = next((found for part in same if (found := argument(part, *_HEADS))), None)
    if heads is None:
        fitting = [one for one in _anywhere(config, width) if width % one == 0]
        heads = fitting[0] if len(fitting) == 1 else None
    return (max(1, width // HEAD_WIDTH), False) if heads is None else (int(heads), True)


def _anywhere(config: Mapping[str, Any], width: int) -> set[int]:
    """The different numbers of heads in ``config``, but for parts that state another width."""
    found = {int(config[one]) for one in _HEADS if config.get(one)}
    for part in config.values():
        if isinstance(part, Mapping) and {part.get("width"), part.get("hidden_size")} <= {None, width}:
            found |= _anywhere(part, width)
    return found


def stack(shapes: Shapes, theirs: str, config: Mapping[str, Any], heads: tuple[str, ...]) -> dict[str, Any]:
    """Return layers, heads and hidden width of a stack; ``heads`` are the arguments that may state them."""
    numbers = [int(m[1]) for name in shapes if (m := re.match(re.escape(theirs) + r"layer\.(\d+)\.", name))]
    hidden, width = shapes[theirs + "layer.0.feedforward.model.0.weight"]
    found = argument(config, *heads, *_HEADS)
    return {"layers": max(numbers) + 1, "heads": found or max(1, width // HEAD_WIDTH), "hidden": hidden}
