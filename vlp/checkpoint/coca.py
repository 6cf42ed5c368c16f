"""open_clip's CoCa: CLIP's image tower with attention pooling, a text tower with a token behind the text, a decoder.

In its published weights that token sees one place too late (``correct_cls_mask``, open_clip 3, says otherwise).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.clip import (
    HEAD_WIDTH,
    QUERY_KEY_VALUE,
    clip_words,
    patch_tower,
    scalar_pairs,
    text_tower,
)
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers
from vlp.checkpoint.names import Names, Pair, blocks, rename_pairs, transposed
from vlp.checkpoint.open_clip import image_names, text_names
from vlp.data.presets import openclip

CAPTION_WEIGHT = 2.0
"""Of the captions' loss beside the contrast's 1 (open_clip's default, the paper's too)."""
_POOLER_HEADS = 8
_PAD = 0


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    model = config.get("model_cfg") or config
    towers = {name: model.get(f"{name}_cfg") or {} for name in ("vision", "text", "multimodal")}
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    preset = openclip(config.get("preprocess_cfg") or {})
    width = shapes["visual.conv1.weight"][0]
    vision = patch_tower(
        shapes,
        "visual.conv1.weight",
        "visual.positional_embedding",
        layers=count_layers(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
        heads=width // towers["vision"].get("head_width", HEAD_WIDTH),
        hidden=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        activation=activation,
        eps=1e-5,
        preset=preset,
        resize="bicubic_antialias",
    )
    own_query = "visual.attn_pool_contrastive.query" in shapes
    vision["arguments"]["final_norm"] = own_query  # else the norm follows the pooling
    vision["queries"] = _queries(shapes, towers["vision"], own_query)
    words = shapes["text.token_embedding.weight"]
    text = text_tower(
        words,
        shapes["text.positional_embedding"][0] - 1,
        layers=count_layers(shapes, r"text\.transformer\.resblocks\.(\d+)\."),
        heads=towers["text"].get("heads", 8 if towers["text"] else max(1, words[1] // HEAD_WIDTH)),
        hidden=shapes["text.transformer.resblocks.0.mlp.c_fc.weight"][0],
        activation=activation,
        eps=1e-5,
        pool="token",
    )
    sees = "text" if towers["text"].get("correct_cls_mask") else "text_late"
    said = towers["multimodal"]
    decoder = {
        "kind": "multimodal",
        "cross": "behind",
        "layers": count_layers(shapes, r"text_decoder\.resblocks\.(\d+)\."),
        "heads": said.get("heads", 8 if said else text["heads"]),
        "hidden": shapes["text_decoder.resblocks.0.mlp.c_fc.weight"][0],
        "cross_hidden": shapes["text_decoder.cross_attn.0.mlp.c_fc.weight"][0],
    }
    tree = coca_tree(
        vision,
        text | {"token_sees": sees, "pad": towers["text"].get("pad_id", _PAD)},
        decoder,
        {"width": shapes["visual.proj"][1], "bias": False},
        preset.transform.model_dump(exclude_defaults=True, exclude={"image_size"}),
    )
    assumed = [] if towers["vision"] else ["no open_clip_config.json: heads of width 64, gelu, 8 heads of the pooler"]
    if not config.get("preprocess_cfg"):
        assumed.append("image preprocessing of OpenAI's CLIP (no preprocess_cfg)")
    return Recipe(tree, tuple(assumed))


def _queries(shapes: Shapes, tower: Mapping[str, Any], own_query: bool) -> dict[str, Any]:
    """`model.vision.queries`: the attention poolers, of which one may be for contrast alone."""
    number, width = shapes["visual.attn_pool.query"]
    layout = tower.get("attentional_pool", "parallel")
    return {
        "layout": {"cascade": "cascaded"}.get(layout, layout) if own_query else "split",
        "number": number,
        "width": width,
        "heads": tower.get("attn_pooler_heads", _POOLER_HEADS),
        "norm": not own_query,
    }


def coca_tree(
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    decoder: Mapping[str, Any],
    embed: Mapping[str, Any],
    transform: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the recipe of a CoCa: contrast of the pooled vectors, captions by the text that the text tower reads."""
    return {
        "model": {
            "vision": dict(vision),
            "text": dict(text),
            "fusion": {"kind": "none"},
            "decoder": dict(decoder),
            "embed": dict(embed),
        },
        "objectives": {
            "itc": {"positives": "diagonal"},
            "lm": {"view": "clean", "head": "bare", "tied": False, "weight": CAPTION_WEIGHT},
        },
        "data": {
            "max_length": text["max_length"],
            "tokenizer": clip_words(text["vocabulary_size"]),
            "transform": dict(transform),
        },
    }


def _pooler(theirs: str, ours: str) -> tuple[Pair, ...]:
    """Names of an attention pooling; torch stores its projections in one where all widths are equal."""
    parts = ("query", "key", "value")
    return (
        Pair(theirs + "query", ours + "query"),
        Pair(theirs + "ln_q.{p}", ours + "query_norm.{p}"),
        Pair(theirs + "ln_k.{p}", ours + "token_norm.{p}"),
        Pair(theirs + "attn.in_proj_{p}", tuple(f"{ours}attention.{name}.{{p}}" for name in parts)),
        *(Pair(f"{theirs}attn.{name[0]}_proj_weight", f"{ours}attention.{name}.weight") for name in parts),
        Pair(theirs + "attn.out_proj.{p}", ours + "attention.out.{p}"),
    )


def _blocks() -> tuple[Pair, ...]:
    """Names of the decoder's blocks and of those that read the image."""
    block: dict[Names, Names] = {
        "ln_1": "attention_norm",
        "attn.in_proj_{p}": tuple(f"{name}.{{p}}" for name in QUERY_KEY_VALUE),
        "attn.out_proj": "attention.out",
    }
    cross: dict[Names, Names] = {
        "ln_1": "cross_norm",
        "ln_1_kv": "memory_norm",
        "attn.in_proj_{p}": tuple(f"cross.{name}.{{p}}" for name in ("query", "key", "value")),
        "attn.out_proj": "cross.out",
    }
    feed: dict[Names, Names] = {"ln_2": "feed_norm", "mlp.c_fc": "feed.up", "mlp.c_proj": "feed.down"}
    return (
        *blocks("text_decoder.resblocks.{n}.", "decoder.blocks.{n}.", block | feed),
        *blocks("text_decoder.cross_attn.{n}.", "decoder.cross_blocks.{n}.", cross | feed),
    )


def _rename(state: State) -> Renamed:
    # The norm behind the image tower is that of the pooled queries, unless a query of its own reads the tower.
    own_query = "visual.attn_pool_contrastive.query" in state
    norm = () if own_query else (Pair("visual.ln_post.{p}", "vision.queries.tokens.norm.{p}"),)
    axes = state["logit_scale"].dim() if "logit_scale" in state else 0
    table = (
        *norm,
        *(one for one in image_names() if own_query or one.theirs != "visual.ln_post.{p}"),
        *text_names("text.", linear=False),
        Pair("text.cls_emb", "text.token"),
        *_pooler("visual.attn_pool.", "vision.queries.tokens."),
        *_pooler("visual.attn_pool_contrastive.", "vision.queries.contrast."),
        *_blocks(),
        Pair("text_decoder.ln_final.{p}", "decoder.final_norm.{p}"),
        Pair("text_decoder.text_projection", "objectives.lm.head.weight", **transposed()),
        *scalar_pairs(axes=axes),
    )
    return rename_pairs(table, state, {r"(text|text_decoder)\.attn_mask": "a buffer"})


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    return {"visual.attn_pool.query", "text.cls_emb", "text_decoder.cross_attn.0.ln_1_kv.weight"} <= shapes.keys()


FAMILY = Family("open_clip_coca", _recognise, _recipe, _rename)
