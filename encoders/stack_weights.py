"""Weights of transformers' BERT, RoBERTa and T5 for our own stacks: one name map each, and the function that fills."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn

from encoders.layers import ACTIVATIONS, Attention, FeedForward
from encoders.sources import local_source

if TYPE_CHECKING:
    from transformers import T5Config

Side: TypeAlias = Literal["encoder", "decoder"]
_Rules: TypeAlias = tuple[tuple[str, str], ...]
_BERT_BLOCK: _Rules = (
    (r"attention\.self\.(query|key|value)\.", r"attention.\1."),
    (r"attention\.output\.dense\.", "attention.out."),
    (r"attention\.output\.LayerNorm\.", "attention_norm."),
    (r"crossattention\.self\.(query|key|value)\.", r"cross.\1."),
    (r"crossattention\.output\.dense\.", "cross.out."),
    (r"crossattention\.output\.LayerNorm\.", "cross_norm."),
    (r"intermediate\.dense\.", "feed.up."),
    (r"output\.dense\.", "feed.down."),
    (r"output\.LayerNorm\.", "feed_norm."),
)
_BERT_EMBEDDINGS: _Rules = (
    (r"word_embeddings\.", "word."),
    (r"position_embeddings\.", "position."),
    (r"token_type_embeddings\.", "segment."),
    (r"LayerNorm\.", "norm."),
)
_T5_LETTERS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "o": "out",
    "wi": "up",
    "wi_0": "gate",
    "wi_1": "up",
    "wo": "down",
}
_T5_ACTIVATIONS = {"gelu_new": "gelu_tanh"}
"""Names of activations that are others here."""
_T5_LAYERS = {"SelfAttention": "attention", "EncDecAttention": "cross", "DenseReluDense": "feed"}


def rename_bert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' BERT or RoBERTa names to ours: ``embeddings.*`` and ``blocks.N.*``; others are dropped."""
    renamed = {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"(?:\w+\.)?embeddings\.(.+)", name):
            prefix, rest, rules = "embeddings.", found[1], _BERT_EMBEDDINGS
        elif found := re.fullmatch(r"(?:\w+\.)?encoder\.layer\.(\d+)\.(.+)", name):
            prefix, rest, rules = f"blocks.{found[1]}.", found[2], _BERT_BLOCK
        else:
            continue
        for pattern, ours in rules:
            if match := re.match(pattern, rest):
                renamed[prefix + match.expand(ours) + rest[match.end() :]] = tensor
                break
    return renamed


def rename_t5(state: Mapping[str, Tensor], side: Side) -> dict[str, Tensor]:
    """Rename one side of transformers' T5 to our names; others are dropped.

    They are ``embeddings.word``, ``blocks.N.*``, ``buckets.table`` and ``final_norm``.
    """
    renamed = {"embeddings.word.weight": state["shared.weight"]}
    layers = ("attention", "feed") if side == "encoder" else ("attention", "cross", "feed")
    for name, tensor in state.items():
        if name == f"{side}.final_layer_norm.weight":
            renamed["final_norm.weight"] = tensor
        elif name == f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight":
            renamed["buckets.table.weight"] = tensor
        elif found := re.fullmatch(rf"{side}\.block\.(\d+)\.layer\.(\d)\.layer_norm\.weight", name):
            renamed[f"blocks.{found[1]}.{layers[int(found[2])]}_norm.weight"] = tensor
        elif found := re.fullmatch(rf"{side}\.block\.(\d+)\.layer\.\d\.(\w+)\.(q|k|v|o|w\w+)\.weight", name):
            renamed[f"blocks.{found[1]}.{_T5_LAYERS[found[2]]}.{_T5_LETTERS[found[3]]}.weight"] = tensor
    return renamed


def load_bert(module: nn.Module, source: str, *, embeddings: bool, first: int = 0, side: Side = "encoder") -> None:
    """Fill ``module.blocks`` (and ``module.embeddings``) from a transformers folder or hub id, from layer ``first`` on.

    Cross-attention, which BERT does not have, keeps its initial weights. Of a T5, one ``side`` is taken, with its last
    norm and the bias of its attention.

    Raises:
        ValueError: the source has too few layers, other sizes, or layers of another form.
    """
    from transformers import AutoModel

    whole = AutoModel.from_pretrained(local_source(source), dtype=torch.float32)
    state = whole.state_dict()
    is_t5 = "shared.weight" in state and "encoder.final_layer_norm.weight" in state
    theirs = rename_t5(state, side) if is_t5 else rename_bert(state)
    ours = module.state_dict()
    if is_t5:
        _check_t5(module, source, whole.config)
    wanted = {}
    for name, tensor in ours.items():
        if name.startswith("blocks.") and (is_t5 or ".cross" not in name):
            number, rest = name.removeprefix("blocks.").split(".", 1)
            source_name = f"blocks.{int(number) + first}.{rest}"
        elif (name.startswith("embeddings.") and embeddings) or (
            is_t5 and name.startswith(("buckets.", "final_norm."))
        ):
            source_name = name
        else:
            continue
        if source_name not in theirs:
            raise ValueError(f"init {source!r} has no {source_name}; use fewer layers or another model")
        found = theirs[source_name]
        if name.startswith("embeddings.position") or name.startswith("embeddings.segment"):
            found = found[: tensor.shape[0]]
        # Added words (BLIP's [DEC] and [ENC]) and segments (VL-BERT's of regions) keep their initial weights.
        if name in ("embeddings.word.weight", "embeddings.segment.weight"):
            found = torch.cat([found, tensor[len(found) :]])
        if found.shape != tensor.shape:
            raise ValueError(
                f"init {source!r}: {source_name} is {tuple(found.shape)}, the recipe needs {tuple(tensor.shape)}"
            )
        wanted[name] = found
    module.load_state_dict(wanted, strict=False)


def _check_t5(module: nn.Module, source: str, config: T5Config) -> None:
    """Refuse a stack that would take a T5's weights and compute something else with them."""
    scales = {part.scale for part in module.modules() if isinstance(part, Attention)}
    if scales and (scales != {1.0} or getattr(module, "buckets", None) is None):
        raise ValueError(
            f"init {source!r} is a T5, whose layers are of another form; set model.text.norm pre and model.text.form "
            "{norm: rms, bias: false, scaled: false, buckets: 32}"
        )
    gated, ours = config.is_gated_act, _T5_ACTIVATIONS.get(config.dense_act_fn, config.dense_act_fn)
    for part in module.modules():
        if isinstance(part, FeedForward) and (
            part.activation is not ACTIVATIONS.get(ours) or gated != (part.gate is not None)
        ):
            raise ValueError(
                f"init {source!r} has feed-forwards of another kind; set model.text.activation {ours} and "
                f"model.text.form.gated {str(gated).lower()}"
            )
    buckets = getattr(module, "buckets", None)
    if buckets is not None and buckets.distance != config.relative_attention_max_distance:
        raise ValueError(
            f"init {source!r} has distances up to {config.relative_attention_max_distance}; set "
            "model.text.form.distance to that"
        )
