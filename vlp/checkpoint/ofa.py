"""OFA (Wang et al. 2022) under fairseq's names: image cells and words in one encoder, a decoder, untied positions.

A released file also holds its settings as Python objects, which are never unpickled here: save its entry ``model``
alone first. What writes image codes (the decoder's positions of a grid) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.foreign import Family, Recipe, Renamed, Rule, Shapes, State, count_layers, rename_by

_STAGES: dict[tuple[int, ...], str] = {(3, 4, 6): "resnet50", (3, 4, 23): "resnet101", (3, 8, 36): "resnet152"}
_PIXELS = {256: 256, 512: 256, 768: 384}
"""Side of the images by width (tiny, medium, base); the larger ones have 480."""
_BART, _CODES, _BINS = 50_265, 8192, 1000
_POSITIONS = 2
"""Rows of the words' positions that fairseq keeps for padding, at the end."""


def _cnn(shapes: Shapes) -> str:
    """Name of the CNN whose first three stages these are."""
    stages = tuple(count_layers(shapes, rf"encoder\.embed_images\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3))
    if stages not in _STAGES:
        raise ValueError(f"OFA's image encoder has stages of {stages} blocks, which is none of {list(_STAGES)}")
    return _STAGES[stages]


def _stack(shapes: Shapes) -> dict[str, Any]:
    """What texts, fusion and decoder have in common."""
    return {
        "width": shapes["encoder.embed_tokens.weight"][1],
        "heads": shapes["encoder.token_rel_pos_table_list.0.weight"][1],
        "hidden": shapes["encoder.layers.0.fc1.weight"][0],
        "norm": "pre",
        "eps": 1e-5,
        "normformer": "encoder.layers.0.attn_ln.weight" in shapes,
    }


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    words, width = shapes["encoder.embed_tokens.weight"]
    distances, stack = shapes["encoder.token_rel_pos_table_list.0.weight"][0], _stack(shapes)
    length = shapes["encoder.embed_positions.weight"][0] - _POSITIONS
    untied = {
        "length": length,
        "buckets": (distances + 1) // 2,
        "side": math.isqrt(shapes["encoder.embed_image_positions.weight"][0] - 1),
    }
    side = config.get("patch_image_size", _PIXELS.get(width, 480))
    own = words >= _BART + _CODES + _BINS
    tree = {
        "model": {
            "vision": {
                "kind": "grid",
                "model": _cnn(shapes),
                "image_size": side,
                "reduction": 16,
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
            },
            "text": {
                **stack,
                "kind": "text",
                "layers": 0,
                "vocabulary_size": words,
                "padding_id": 1,
                "max_length": length,
                "absolute_positions": False,
                "segments": int("encoder.type_embedding.weight" in shapes),
            },
            "fusion": {
                **stack,
                "kind": "single_stream",
                "layers": count_layers(shapes, r"encoder\.layers\.(\d+)\."),
                "modality_embedding": False,
                "project": "image_norm",
                "untied": untied,
            },
            "decoder": {
                **stack,
                "kind": "causal",
                "layers": count_layers(shapes, r"decoder\.layers\.(\d+)\."),
                "share": "words",
                "untied": untied,
                "memory": "both",
            },
        },
        "objectives": {"lm": {"memory": "fused", "view": "lm:answer", "head": "bare"}},
        "data": {
            "max_length": min(80, length),
            "tokenizer": {"source": "facebook/bart-base", "codes": _CODES * own, "bins": _BINS * own},
        },
    }
    assumed = ["questions and answers begin with a space, as in its training"]
    if "patch_image_size" not in config:
        assumed.append(f"images of {side} pixels (no patch_image_size)")
    return Recipe(tree, tuple(assumed))


_ATTENTION = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *(Rule(rf"{theirs}\.{there}\.(weight|bias)", rf"{ours}.{here}.\2") for there, here in _ATTENTION),
        Rule(rf"{theirs}\.c_attn", rf"{ours}.head_scale"),
    )


def _block(theirs: str, ours: str, norms: Mapping[str, str]) -> tuple[Rule, ...]:
    return (
        *_attention(rf"{theirs}\.self_attn", rf"{ours}.attention"),
        *_attention(rf"{theirs}\.encoder_attn", rf"{ours}.cross"),
        *(Rule(rf"{theirs}\.{there}\.(weight|bias)", rf"{ours}.{here}.\2") for there, here in norms.items()),
    )


_FEED = {"fc1": "feed.up", "fc2": "feed.down", "ffn_layernorm": "feed.norm", "final_layer_norm": "feed_norm"}
_NORMS = {"self_attn_layer_norm": "attention_norm", **_FEED}
_CROSS = {
    "self_attn_ln": "attention_after",
    "encoder_attn_layer_norm": "cross_norm",
    "cross_attn_ln": "cross_after",
}
_RULES = (
    Rule(r"encoder\.embed_images\.(.+)", r"vision.body.\1"),
    Rule(r"(encoder|decoder)\.embed_tokens\.weight", "text.embeddings.word.weight"),
    Rule(r"decoder\.output_projection\.weight", "text.embeddings.word.weight"),
    Rule(r"encoder\.layernorm_embedding\.(.+)", r"text.embeddings.norm.\1"),
    Rule(r"encoder\.image_proj\.(.+)", r"fusion.image_project.0.\1"),
    Rule(r"encoder\.patch_layernorm_embedding\.(.+)", r"fusion.image_project.1.\1"),
    Rule(r"encoder\.layer_norm\.(.+)", r"fusion.final_norm.\1"),
    Rule(r"encoder\.embed_positions\.weight", "fusion.untied.word.weight", convert=lambda rows: rows[:-_POSITIONS]),
    Rule(r"encoder\.embed_image_positions\.weight", "fusion.untied.image.weight"),
    Rule(r"encoder\.image_pos_ln\.(.+)", r"fusion.untied.image_norm.\1"),
    Rule(r"encoder\.pos_q_linear\.(.+)", r"fusion.untied.query.\1"),
    Rule(r"encoder\.pos_k_linear\.(.+)", r"fusion.untied.key.\1"),
    Rule(r"encoder\.image_rel_pos_table_list\.(.+)", r"fusion.untied.image_bias.\1"),
    *_block(r"encoder\.layers\.(\d+)", r"fusion.blocks.\1", {"attn_ln": "attention_after", **_NORMS}),
    Rule(r"decoder\.layernorm_embedding\.(.+)", r"decoder.embeddings.norm.\1"),
    Rule(r"decoder\.layer_norm\.(.+)", r"decoder.final_norm.\1"),
    Rule(r"decoder\.embed_positions\.weight", "decoder.untied.word.weight", convert=lambda rows: rows[:-_POSITIONS]),
    Rule(r"decoder\.self_pos_q_linear\.(.+)", r"decoder.untied.query.\1"),
    Rule(r"decoder\.self_pos_k_linear\.(.+)", r"decoder.untied.key.\1"),
    Rule(r"decoder\.cross_pos_q_linear\.(.+)", r"decoder.cross_positions.query.\1"),
    Rule(r"decoder\.cross_pos_k_linear\.(.+)", r"decoder.cross_positions.key.\1"),
    *_block(r"decoder\.layers\.(\d+)", r"decoder.blocks.\1", {**_CROSS, **_NORMS}),
    *(
        Rule(rf"{side}\.{there}\.(.+)", rf"{ours}.untied.{here}.\1")
        for side, ours in (("encoder", "fusion"), ("decoder", "decoder"))
        for there, here in (("pos_ln", "word_norm"), ("token_rel_pos_table_list", "word_bias"))
    ),
    Rule(
        r"decoder\.(embed_image_positions|image_pos_ln|image_rel_pos_table_list|code_layernorm_embedding)\..+",
        reason="of image codes, which vlp does not write",
    ),
    Rule(r"(encoder|decoder)\.(version|(token|image)_rp_bucket|image_position_idx)", reason="a buffer"),
)


def _rename(state: State) -> Renamed:
    """What tells image cells from words is part of the image's projection here, as it is the same for all cells."""
    rest = dict(state)
    kinds = rest.pop("encoder.type_embedding.weight", None)
    if kinds is not None:
        rest["encoder.image_proj.bias"] = rest["encoder.image_proj.bias"] + kinds[1]
    found = rename_by(_RULES, rest)
    own = {} if kinds is None else {"text.embeddings.segment.weight": kinds[:1]}
    return Renamed({**found.state, **own}, found.ignored, found.unexpected)


FAMILY = Family(
    "ofa",
    lambda shapes, config: {"encoder.embed_images.conv1.weight", "decoder.cross_pos_q_linear.weight"} <= shapes.keys(),
    _recipe,
    _rename,
)
