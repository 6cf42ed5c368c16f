"""VLMo (Bao et al. 2022): base, large and base+ as released, in all stages and finetuned.

The authors save weights alone, with the text padded to a fixed length before the image; here the image stands first and
the text has any length, which attention cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlp.checkpoint.foreign import Family, Recipe, Renamed, Rule, Shapes, State, count_layers, rename_by

_BLOCKS = r"transformer\.blocks\.(\d+)\."
_RELATIVE = "relative_position_bias_table"
_WORDS = 196
"""Longest text of the released files' relative positions."""
_HEADS = {"vlmo_base_patch16": 12, "vlmo_large_patch16": 16, "vlmo_base_plus_patch16": 16}
_POOLED = ("itm_score.", "vqa_classifier.", "nlvr2_classifier.")
"""Heads that read the pooler, which every file holds."""


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    return "transformer.blocks.0.mlp_imag.fc1.weight" in shapes


def _has(names: Iterable[str], *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in names)


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    assumed: list[str] = []
    width, _, patch, _ = shapes["transformer.patch_embed.proj.weight"]
    words, length = shapes["text_embeddings.word_embeddings.weight"][0], _text_length(shapes, config, assumed)
    layers = count_layers(shapes, _BLOCKS)
    pair_layers = sum(f"transformer.blocks.{n}.mlp_vl.fc1.weight" in shapes for n in range(layers))
    heads = _heads(shapes, config, layers, width, assumed)
    reach = _reach(shapes, config, assumed)
    side = _grid(shapes, config, patch, reach) * patch
    absolute = "transformer.pos_embed" in shapes
    vision: dict[str, Any] = {"image_size": side, "patch_size": patch, "width": width, "depth": 0}
    vision |= {"mean": [0.5] * 3, "std": [0.5] * 3, "position_resize": "bicubic"}
    vision |= {} if absolute else {"arguments": {"pos_embed": "none"}}
    text = {"width": width, "layers": 0, "heads": heads, "vocabulary_size": words, "max_length": length}
    text |= {"absolute_positions": reach is None}
    fusion = {
        "kind": "multiway",
        "layers": layers,
        "hidden": shapes["transformer.blocks.0.mlp_imag.fc1.weight"][0],
        "norm": "pre",
        "eps": 1e-6,
        "pair_layers": pair_layers,
        "key_bias": False,
        "layer_scale": 0.1 if "transformer.blocks.0.gamma_1" in shapes else None,
        "relative_positions": reach,
        "modality_embedding": True,
        "pooler": "tanh" if "pooler.dense.weight" in shapes else "cls",
        "images": "each" if "nlvr2_classifier.0.weight" in shapes else "one",
    }
    branches = ["vl"] if "itc_vl_image_proj.fc.weight" in shapes else []
    embed = {"width": width, "bias": False, "branches": branches}
    tree = {
        "model": {"vision": vision, "text": text, "fusion": fusion, "embed": embed},
        "objectives": _objectives(shapes, pair_layers),
        "data": {
            "max_length": length,
            "tokenizer": {"source": "bert-base-uncased"},
            "transform": {"image_size": side, "resampler": "pillow"},
        },
    }
    return Recipe(tree, tuple(assumed))


def _objectives(shapes: Shapes, pair_layers: int) -> dict[str, Any]:
    """The losses whose heads the file holds, as the authors weigh them."""
    found: dict[str, Any] = {}
    if _has(shapes, "itc_image_proj."):
        itc = {"kind": "itc", "positives": "diagonal", "max_scale": math.inf}
        if _has(shapes, "itc_vl_image_proj."):
            found |= {"itc": itc | {"weight": 0.5}, "itc_vl": itc | {"weight": 0.5, "branch": "vl"}}
        else:
            found["itc"] = itc
    if _has(shapes, "itm_score."):
        found["itm"] = {"exclude": "diagonal", "candidates": "global"}
    if _has(shapes, "mlm_score."):
        # The text stage has no feed-forward of pairs, and its loss its whole weight.
        alone = pair_layers == 0
        found["mlm"] = {"weight": 1.0 if alone else 0.25, "whole_word": True, "tied": False, "alone": alone}
    if _has(shapes, "vqa_classifier."):
        found["answer"] = {"answers": [f"answer {n}" for n in range(shapes["vqa_classifier.3.weight"][0])]}
    if _has(shapes, "nlvr2_classifier."):
        hidden = shapes["nlvr2_classifier.0.weight"][0]
        found["relate"] = {"kind": "answer", "answers": ["False", "True"], "loss": "ce", "hidden": hidden}
    return found


def _text_length(shapes: Shapes, config: Mapping[str, Any], assumed: list[str]) -> int:
    """Longest text: the rows of the position embedding, which is stored also where it is not used."""
    table = shapes.get("text_embeddings.position_embeddings.weight")
    if table is None and "max_text_len" not in config:
        assumed.append("max_text_len 40")
    return table[0] if table else int(config.get("max_text_len", 40))


def _heads(shapes: Shapes, config: Mapping[str, Any], layers: int, width: int, assumed: list[str]) -> int:
    if _RELATIVE in shapes:
        return shapes[_RELATIVE][1] // layers
    heads = config.get("num_heads") or _HEADS.get(str(config.get("model_arch")))
    if heads is None:
        heads = 16 if width == 544 else max(4, width // 64)
        assumed.append(f"num_heads {heads}")
    return int(heads)


def _reach(shapes: Shapes, config: Mapping[str, Any], assumed: list[str]) -> int | None:
    """Longest text of the relative positions; None without them."""
    if _RELATIVE not in shapes:
        return None
    if "max_text_len_of_initckpt" not in config:
        assumed.append(f"max_text_len_of_initckpt {_WORDS}")
    return int(config.get("max_text_len_of_initckpt", _WORDS))


def _grid(shapes: Shapes, config: Mapping[str, Any], patch: int, reach: int | None) -> int:
    """Rows of patches that the file's positions are of."""
    if reach is None:
        return math.isqrt(shapes["transformer.pos_embed"][1] - 1)
    offsets = shapes[_RELATIVE][0] - 5 - 2 * reach
    side = math.isqrt(max(offsets, 0))
    if side * side != offsets or side % 2 == 0:
        raise ValueError(
            f"vlmo checkpoint: {_RELATIVE} of {shapes[_RELATIVE][0]} rows does not fit texts of up to {reach} words; "
            "give config={'max_text_len_of_initckpt': N} as it was trained"
        )
    return (side + 1) // 2


def _experts(theirs: str, ours: str) -> list[Rule]:
    """A block's feed-forward and its norm of one modality."""
    return [
        Rule(rf"{_BLOCKS}norm2_{theirs}\.(.+)", rf"fusion.blocks.\1.feed_norm.{ours}.\2"),
        Rule(rf"{_BLOCKS}mlp_{theirs}\.fc1\.(.+)", rf"fusion.blocks.\1.feed.{ours}.up.\2"),
        Rule(rf"{_BLOCKS}mlp_{theirs}\.fc2\.(.+)", rf"fusion.blocks.\1.feed.{ours}.down.\2"),
    ]


_ATTENTION = r"fusion.blocks.\1.attention."
_RULES = (
    Rule(r"relative_position_bias_table", "fusion.positions.table"),
    Rule(r"(text_|text_imag_)?relative_position_index", reason="derived from the sizes"),
    Rule(r"transformer\.(cls_token|pos_embed|patch_embed\.proj\.\w+)", r"vision.vit.\1"),
    Rule(rf"{_BLOCKS}norm1\.(.+)", r"fusion.blocks.\1.attention_norm.both.\2"),
    Rule(
        rf"{_BLOCKS}attn\.qkv\.weight", tuple(f"{_ATTENTION}{part}.both.weight" for part in ("query", "key", "value"))
    ),
    Rule(rf"{_BLOCKS}attn\.q_bias", rf"{_ATTENTION}query.both.bias"),
    Rule(rf"{_BLOCKS}attn\.v_bias", rf"{_ATTENTION}value.both.bias"),
    Rule(rf"{_BLOCKS}attn\.proj\.(.+)", rf"{_ATTENTION}out.both.\2"),
    Rule(rf"{_BLOCKS}gamma_1", r"fusion.blocks.\1.attention_scale"),
    Rule(rf"{_BLOCKS}gamma_2", r"fusion.blocks.\1.feed_scale"),
    *_experts("imag", "image"),
    *_experts("text", "text"),
    *_experts("vl", "pair"),
    Rule(r"transformer\.norm\.(.+)", r"fusion.final_norm.both.\1"),
    Rule(r"text_embeddings\.position_ids", reason="counted"),
    Rule(r"text_embeddings\.word_embeddings\.weight", "text.embeddings.word.weight"),
    Rule(r"text_embeddings\.token_type_embeddings\.weight", "text.embeddings.segment.weight"),
    Rule(r"text_embeddings\.LayerNorm\.(.+)", r"text.embeddings.norm.\1"),
    Rule(r"pooler\.dense\.(.+)", r"fusion.pooler.text.\1"),
    Rule(r"mlm_score\.bias", "objectives.mlm.head.decoder.bias"),
    Rule(r"mlm_score\.decoder\.weight", "objectives.mlm.head.decoder.weight"),
    Rule(r"mlm_score\.transform\.dense\.(.+)", r"objectives.mlm.head.dense.\1"),
    Rule(r"mlm_score\.transform\.LayerNorm\.(.+)", r"objectives.mlm.head.norm.\1"),
    Rule(r"itm_score\.fc\.(.+)", r"objectives.itm.head.\1"),
    Rule(r"itc_(image|text)_proj\.fc\.weight", r"embed.main.\1.weight"),
    Rule(r"itc_vl_(image|text)_proj\.fc\.weight", r"embed.vl.\1.weight"),
    Rule(r"logit_scale", "embed.main.logit_scale", convert=lambda scale: scale.reshape(1)),
    Rule(r"logit_vl_scale", "embed.vl.logit_scale", convert=lambda scale: scale.reshape(1)),
    Rule(r"vqa_classifier\.(.+)", r"objectives.answer.head.\1"),
    Rule(r"nlvr2_classifier\.(.+)", r"objectives.relate.head.\1"),
)


def _image_first(rows: Tensor) -> Tensor:
    """Text, image, second image (NLVR2) -> image, text, second image."""
    return torch.cat([rows[1:2], rows[:1], rows[2:]])


def _rename(state: State) -> Renamed:
    rules = list(_RULES)
    if _RELATIVE in state:
        rules.insert(0, Rule(r"text_embeddings\.position_embeddings\.weight", reason="not used beside relative ones"))
    else:
        rules.append(Rule(r"text_embeddings\.position_embeddings\.weight", "text.embeddings.position.weight"))
    heads = _has(state, "itc_image_proj.", "mlm_score.", *_POOLED)
    if heads and not _has(state, *_POOLED):
        rules.insert(0, Rule(r"pooler\..+", reason="no head of the file reads it"))
    rules.append(Rule(r"token_type_embeddings\.weight", "fusion.modality.weight", convert=_image_first))
    return rename_by(rules, state)


FAMILY = Family("vlmo", _recognise, _recipe, _rename)
