"""X-VLM's checkpoints (Zeng et al. 2022): pretraining, retrieval, VQA, NLVR2 and grounding, over Swin, CLIP or DeiT.

``config=`` takes the authors' own keys: those of their YAML, with ``vision_config`` and ``text_config`` (there paths of
JSON files) as mappings of what those files hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.albef import VIT, bert_recipe, vit_recipe
from vlp.checkpoint.bert_stack import (
    decoder_stack,
    read_stack,
    shared_keys,
    split_model,
    split_stack,
    without_copies,
    word_head,
    word_head_copies,
)
from vlp.checkpoint.clip import patch_tower
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, names_there, shapes_of
from vlp.checkpoint.names import Pair, added_axes, blocks, rename_pairs
from vlp.checkpoint.swin import swin_buffers, swin_pairs, swin_side, swin_tower
from vlp.data.presets import albef_blip

VISION = "vision_encoder."
REGION_DEPTH = 4
"""Blocks of a ViT that see only a region, in the authors' code and configs."""
_CLIP: dict[str | tuple[str, ...], str | tuple[str, ...]] = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "attn.qkv",
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_IGNORED = {
    r"text_(encoder|decoder)\.(bert\.)?embeddings\.position_ids": "counted anew",
    r"vision_encoder\.position_ids": "counted anew",
    **swin_buffers(VISION),
}


def recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    """Whether a file is X-VLM's: a ``vision_encoder`` beside a BERT whose upper layers read it."""
    words = any(f"text_encoder.{one}embeddings.word_embeddings.weight" in shapes for one in ("", "bert."))
    return words and _tower(shapes) is not None


def _tower(shapes: Shapes) -> str | None:
    marks = {
        "layers.0.blocks.0.attn.relative_position_bias_table": "swin",
        "class_embedding": "clip",
        "cls_token": "deit",
    }
    return next((kind for mark, kind in marks.items() if VISION + mark in shapes), None)


def recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    """Return what a file is in our words."""
    text = read_stack(shapes, _text_prefix(shapes))
    vision, assumed = _vision(shapes, config)
    stack, more = bert_recipe(text, {"bert_config": config.get("text_config", {})})
    model = {"vision": vision, **split_model(shapes, text, stack)}
    if "cls_head.0.weight" in shapes:
        model["fusion"]["images"] = "alternate"
    objectives = _objectives(shapes, config)
    data = {
        "max_length": config.get("max_tokens", 40),
        "tokenizer": {
            "source": "bert-base-uncased",
            "clean": "albef_question" if "lm" in objectives else "albef",
            "max_words": config.get("max_words", 40),
        },
        "transform": albef_blip(vision["image_size"]).transform.model_dump(exclude_defaults=True),
    }
    return Recipe({"model": model, "objectives": objectives, "data": data}, (*assumed, *more))


def _text_prefix(shapes: Shapes) -> str:
    """What stands before the text stack's names: ``bert.`` in pretraining."""
    bert = "text_encoder.bert."
    return bert if f"{bert}embeddings.word_embeddings.weight" in shapes else "text_encoder."


def _vision(shapes: Shapes, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    given = config.get("vision_config", {})
    given = given if isinstance(given, Mapping) else {}
    depth = {"region_depth": given.get("local_attn_depth", REGION_DEPTH)}
    if _tower(shapes) == "swin":
        side, assumed = swin_side(shapes, VISION, config.get("image_res"))
        return swin_tower(shapes, VISION, side, albef_blip(side)) | {"mean_token": True}, assumed
    if _tower(shapes) == "deit":
        found, assumed = vit_recipe(shapes, "vision_encoder", given)
        return found | depth, assumed
    width = shapes[f"{VISION}class_embedding"][0]
    heads, said = given.get("num_attention_heads"), tuple[str, ...]()
    if heads is None:
        heads = max(1, width // 64)
        said = (f"{heads} heads in the vision tower (64 a head)",)
    activation = given.get("hidden_act", "quick_gelu")
    found = patch_tower(
        shapes,
        f"{VISION}patch_embed.weight",
        f"{VISION}pos_embed.weight",
        layers=count_layers(shapes, re.escape(f"{VISION}encoder.layers.") + r"(\d+)\."),
        heads=heads,
        hidden=shapes[f"{VISION}encoder.layers.0.mlp.fc1.weight"][0],
        activation=activation,
        eps=1e-5,
        preset=albef_blip(),
        resize="bicubic",
    )
    return found | depth, said


def _objectives(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    if "text_decoder.cls.predictions.bias" in shapes:
        return {"lm": {"memory": "fused", "view": "lm:answer", "mean": "texts", "first_word": "twice"}}
    if "cls_head.0.weight" in shapes:
        return {"answer": {"answers": ("False", "True"), "loss": "ce"}}
    pretraining = "text_encoder.cls.predictions.bias" in shapes
    positives = "diagonal" if pretraining else "id"  # finetuning for retrieval knows equal images by their ids
    found: dict[str, Any] = {}
    if "vision_proj.weight" in shapes:
        found["itc"] = {"positives": positives, "min_scale": 1e-6, "max_scale": 1e6}  # not bounded in the authors' code
    if "itm_head.0.weight" in shapes:
        found["itm"] = {"exclude": positives, "floor": 1e-5, "head": "mlp", "score": "logit"}
    if pretraining:
        found["mlm"] = {"mask_probability": config.get("mask_prob", 0.25), "whole_word": True}
    if "bbox_head.0.weight" in shapes:
        found["box"] = {}
    return found


def table(shapes: Shapes) -> tuple[Pair, ...]:
    """Return the names of a file's weights there and here."""
    prefix = _text_prefix(shapes)
    text = read_stack(shapes, prefix)
    return (
        *_vision_table(shapes),
        *split_stack(prefix, "", text.layers, text.split),
        *word_head("text_encoder.cls.predictions.", "objectives.mlm.head."),
        *decoder_stack("text_decoder.bert.", "decoder."),
        *word_head("text_decoder.cls.predictions.", "objectives.lm.head."),
        Pair("vision_proj.{p}", "embed.main.image.{p}"),
        Pair("text_proj.{p}", "embed.main.text.{p}"),
        Pair("temp", "embed.main.logit_scale", to_ours=lambda temperature: -temperature.log().reshape(1)),
        Pair("itm_head.{n}.{p}", "objectives.itm.head.{n}.{p}"),
        Pair("bbox_head.{n}.{p}", "objectives.box.head.{n}.{p}"),
        Pair("cls_head.{n}.{p}", "objectives.answer.head.{n}.{p}"),
    )


def _vision_table(shapes: Shapes) -> tuple[Pair, ...]:
    if _tower(shapes) == "deit":
        names = ("cls_token", "pos_embed", *VIT)
        return tuple(Pair(f"{VISION}{name}", f"vision.vit.{name}") for name in names)
    if _tower(shapes) == "clip":
        return (
            Pair(f"{VISION}class_embedding", "vision.vit.cls_token", **added_axes(2)),
            Pair(f"{VISION}pos_embed.weight", "vision.vit.pos_embed", **added_axes(1)),
            Pair(f"{VISION}patch_embed.weight", "vision.vit.patch_embed.proj.weight"),
            Pair(f"{VISION}pre_layrnorm.{{p}}", "vision.vit.norm_pre.{p}"),
            Pair(f"{VISION}post_layernorm.{{p}}", "vision.vit.norm.{p}"),
            *blocks(f"{VISION}encoder.layers.{{n}}.", "vision.vit.blocks.{n}.", _CLIP),
        )
    return swin_pairs(shapes, VISION)


def rename(state: State) -> Renamed:
    """Rename a file's weights to ours."""
    copies: dict[str, str] = {}
    for part in ("text_encoder", "text_decoder"):
        copies |= word_head_copies(f"{part}.cls.predictions.", f"{part}.bert.embeddings.word_embeddings.weight")
    if "cls_head.0.weight" in state:
        copies |= shared_keys(state, "text_encoder.encoder.layer.")
    whole, left = without_copies(state, copies)
    found = rename_pairs(table(shapes_of(whole)), whole, _IGNORED)
    return Renamed(found.state, found.ignored | left, names_there(found.unexpected, whole, state))


FAMILY = Family("xvlm", recognise, recipe, rename)
