"""VL-T5 (Cho et al. 2021) under the names of its repository: T5, whose encoder also reads a detector's regions.

The authors lay regions behind the words, here they stand before them: words alone know their places, which attention
cannot tell. Pretrained and finetuned files have the same names, but for VQA's with a classifier, which are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.foreign import Family, Recipe, Renamed, Rule, Shapes, State, count_layers, rename_by

_ENCODER = r"(?:vis_)?encoder"
"""The authors' own loading also takes files that say vis_encoder."""
_VISUAL = "encoder.visual_embedding."
_WORD = "text.embeddings.word.weight"
_LETTERS = {"q": "query", "k": "key", "v": "value", "o": "out", "wi": "up", "wo": "down"}


def _plain(shapes: Shapes) -> Shapes:
    return {name.removeprefix("vis_"): shape for name, shape in shapes.items()}


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    return {"shared.weight", _VISUAL + "feat_embedding.0.weight"} <= _plain(shapes).keys()


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    shapes = _plain(shapes)
    words, width = shapes["shared.weight"]
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    vision = {
        "kind": "region",
        "features": shapes[_VISUAL + "feat_embedding.0.weight"][1],
        "boxes": 4,
        "geometry": "crossed",
        "width": width,
        "norm": "none",
        "segments": "own",
        "segment_rows": shapes[_VISUAL + "img_order_embedding.weight"][0],
        "segment": 0,
        "order": True,
        "rms": True,
        "eps": 1e-6,
    }
    text = {
        "kind": "text",
        "layers": 0,
        "width": width,
        "heads": heads,
        "hidden": shapes["encoder.block.0.layer.1.DenseReluDense.wi.weight"][0],
        "vocabulary_size": words,
        "norm": "pre",
        "activation": "relu",
        "eps": 1e-6,
        "form": {
            "norm": "rms",
            "bias": False,
            "scaled": False,
            "head_width": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
            "buckets": buckets,
        },
        "absolute_positions": False,
        "segments": 0,
        "embed_norm": False,
    }
    layers = {side: count_layers(shapes, rf"{side}\.block\.(\d+)\.") for side in ("encoder", "decoder")}
    tree = {
        "model": {
            "vision": vision,
            "text": text,
            "fusion": {"kind": "single_stream", "layers": layers["encoder"], "modality_embedding": False},
            "decoder": {"kind": "causal", "layers": layers["decoder"], "memory": "both"},
        },
        "objectives": {"lm": {"memory": "fused", "view": "lm:answer", "head": "scaled"}},
        "data": {"prefix": "vqa:", "max_length": 20, "tokenizer": {"source": "t5-base"}},
    }
    return Recipe(tree, ("texts are questions, with vqa: before them; data.prefix names another task",))


def _stack(theirs: str, ours: str, parts: tuple[tuple[str, str], ...]) -> tuple[Rule, ...]:
    """What becomes of a stack whose blocks have these parts, in this order."""
    blocks = []
    for place, (there, here) in enumerate(parts):
        layer = rf"{theirs}\.block\.(\d+)\.layer\.{place}"
        blocks.append(Rule(rf"{layer}\.layer_norm\.weight", rf"{ours}.blocks.\1.{here}_norm.weight"))
        blocks += [
            Rule(rf"{layer}\.{there}\.{letter}\.weight", rf"{ours}.blocks.\1.{here}.{name}.weight")
            for letter, name in _LETTERS.items()
        ]
    bias = rf"{theirs}\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight"
    final = Rule(rf"{theirs}\.final_layer_norm\.weight", f"{ours}.final_norm.weight")
    return (*blocks, Rule(bias, f"{ours}.buckets.table.weight"), final)


_OWN, _FEED = ("SelfAttention", "attention"), ("DenseReluDense", "feed")
_RULES = (
    Rule(rf"(shared|({_ENCODER}|decoder)\.embed_tokens|lm_head)\.weight", _WORD),
    Rule(rf"{_ENCODER}\.visual_embedding\.obj_order_embedding\.weight", _WORD),
    Rule(rf"{_ENCODER}\.visual_embedding\.img_order_embedding\.weight", "vision.segment.weight"),
    Rule(rf"{_ENCODER}\.visual_embedding\.feat_embedding\.0\.(.+)", r"vision.project.\1"),
    Rule(rf"{_ENCODER}\.visual_embedding\.feat_embedding\.1\.(.+)", r"vision.project_norm.\1"),
    Rule(rf"{_ENCODER}\.visual_embedding\.absolute_vis_pos_embedding\.0\.(.+)", r"vision.box.\1"),
    Rule(rf"{_ENCODER}\.visual_embedding\.absolute_vis_pos_embedding\.1\.(.+)", r"vision.box_norm.\1"),
    *_stack(_ENCODER, "fusion", (_OWN, _FEED)),
    *_stack("decoder", "decoder", (_OWN, ("EncDecAttention", "cross"), _FEED)),
    Rule(
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        reason="of T5's older files; attention across has no positions",
    ),
)


def _rename(state: State) -> Renamed:
    return rename_by(_RULES, state)


FAMILY = Family("vl_t5", _recognise, _recipe, _rename)
