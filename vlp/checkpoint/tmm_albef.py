"""torchmultimodal's ALBEF (examples/albef): retrieval and VQA, each with momentum copies.

Its vision tower has torchvision's names, its text layers torchmultimodal's own; the fusion is a stack of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers
from vlp.checkpoint.names import Pair, blocks, rename_pairs
from vlp.checkpoint.tmm_parts import heads_of, sections_of
from vlp.data.presets import albef_blip

_VISION_SECTIONS = ("vision_encoder_args", "vision_encoder", "vision", "image_encoder", "image")
_TEXT_SECTIONS = ("text_encoder_args", "text_encoder", "text")
RETRIEVAL, VQA = "model_with_similarity.", "answer_decoder."
_SELF: dict[str | tuple[str, ...], str | tuple[str, ...]] = {
    "attention.query": "attention.query",
    "attention.key": "attention.key",
    "attention.value": "attention.value",
    "attention.output": "attention.out",
    "attention_layernorm": "attention_norm",
    "feedforward.model.0": "feed.up",
    "feedforward.model.2": "feed.down",
    "feedforward.model.3": "feed.down",  # where there is a dropout in between
    "feedforward_layernorm": "feed_norm",
}
_CROSS: dict[str | tuple[str, ...], str | tuple[str, ...]] = {
    "cross_attention.query": "cross.query",
    "cross_attention.key": "cross.key",
    "cross_attention.value": "cross.value",
    "cross_attention.output": "cross.out",
    "cross_attention_layernorm": "cross_norm",
}
_VIT: dict[str | tuple[str, ...], str | tuple[str, ...]] = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention.in_proj_{p}": "attn.qkv.{p}",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


def recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    """Whether a file is torchmultimodal's ALBEF: its vision tower within a feature extractor, beside a fusion stack."""
    return any(name.endswith("vision_encoder.encoder.conv_proj.weight") for name in shapes) and any(
        ".multimodal_encoder.layer.0.cross_attention." in name for name in shapes
    )


def _prefix(shapes: Shapes) -> str:
    """What stands before ``vision_encoder``."""
    return min(n for n in shapes if n.endswith("vision_encoder.encoder.conv_proj.weight")).split("vision_encoder.")[0]


def recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    """Return what a file is in our words; ``config`` has the arguments of the example's YAML."""
    albef = _prefix(shapes)
    vision, assumed = _vision(shapes, f"{albef}vision_encoder.encoder.", config)
    embed = f"{albef}text_encoder.embeddings."
    words, width = shapes[f"{embed}word_embeddings.weight"]
    text_layers = count_layers(shapes, re.escape(f"{albef}text_encoder.encoder.layer.") + r"(\d+)\.")
    fusion_layers = count_layers(shapes, re.escape(f"{albef}multimodal_encoder.layer.") + r"(\d+)\.")
    arguments = next(iter(sections_of(config, _TEXT_SECTIONS)), {})
    heads, said = heads_of(config, _TEXT_SECTIONS, width)
    if not said:
        assumed = (*assumed, f"{heads} heads in the text layers (64 a head)")
    stack = {
        "width": width,
        "heads": heads,
        "hidden": shapes[f"{albef}text_encoder.encoder.layer.0.feedforward.model.0.weight"][0],
        "eps": arguments.get("layer_norm_eps", 1e-12),
        "dropout": arguments.get("dropout", 0.1),
    }
    model: dict[str, Any] = {
        "vision": vision,
        "text": {
            "kind": "text",
            **stack,
            "layers": text_layers,
            "vocabulary_size": words,
            "max_length": shapes[f"{embed}position_embeddings.weight"][0],
            "segments": shapes[f"{embed}token_type_embeddings.weight"][0],
        },
        "fusion": {"kind": "dual_stream", "attention": "cross", **stack, "layers": fusion_layers, "dropout": 0.0},
    }
    distill = {"distill": config.get("alpha", 0.4)}
    objectives: dict[str, Any] = {}
    queue = next((shape[1] for name, shape in shapes.items() if name.endswith("image_queue")), 0)
    if queue:
        projection = next(shape for name, shape in shapes.items() if name.endswith("vision_proj.weight"))
        model["embed"] = {"width": projection[0]}
        objectives["itc"] = {"queue": queue, "positives": "id", "min_scale": 1e-6, "max_scale": 1e6, **distill}
        objectives["itm"] = {"exclude": "diagonal", "score": "logit"}
    if any(VQA in name for name in shapes):
        model["decoder"] = {"kind": "causal", **stack, "layers": fusion_layers, "share": "none", "memory": "text"}
        model["decoder"]["dropout"] = 0.0
        objectives["lm"] = {"memory": "fused", "view": "lm:answer", "mean": "texts", "first_word": "twice"} | distill
        objectives["lm"]["tied"] = False
    data = {
        "max_length": 25 if "lm" in objectives else 30,
        "tokenizer": {"source": "bert-base-uncased", "clean": "albef", "max_words": 30},
        "transform": albef_blip(vision["image_size"]).transform.model_dump(exclude_defaults=True),
    }
    return Recipe({"model": model, "objectives": objectives, "data": data}, assumed)


def _vision(shapes: Shapes, prefix: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    width, _, patch, _ = shapes[f"{prefix}conv_proj.weight"]
    layers = f"{prefix}encoder.layers.encoder_layer_"
    arguments = next(iter(sections_of(config, _VISION_SECTIONS)), {})
    heads, said = heads_of(config, _VISION_SECTIONS, width)
    assumed = () if said else (f"{heads} heads in the vision tower (64 a head)",)
    preset = albef_blip()
    return {
        "kind": "patch",
        "model": "vit_base_patch16_224",
        "image_size": round((shapes[f"{prefix}encoder.pos_embedding"][1] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "width": width,
        "depth": count_layers(shapes, re.escape(layers) + r"(\d+)\."),
        "heads": heads,
        "eps": arguments.get("layer_norm_eps", 1e-6),
        "mean": preset.mean,
        "std": preset.std,
        "position_resize": "bicubic",
        "arguments": {"mlp_ratio": shapes[f"{layers}0.mlp.0.weight"][0] / width},
    }, assumed


def _table(albef: str, twin: str) -> tuple[Pair, ...]:
    ours = "teacher." if twin else ""
    heads = "teacher.heads." if twin else "objectives."
    vision, text = f"{albef}vision_encoder{twin}.encoder.", f"{albef}text_encoder{twin}."
    answer = f"{VQA.rstrip('.')}{twin}."
    vit = f"{ours}vision.vit."
    return (
        Pair(f"{vision}class_token", f"{vit}cls_token"),
        Pair(f"{vision}encoder.pos_embedding", f"{vit}pos_embed"),
        Pair(f"{vision}conv_proj.{{p}}", f"{vit}patch_embed.proj.{{p}}"),
        Pair(f"{vision}encoder.ln.{{p}}", f"{vit}norm.{{p}}"),
        *blocks(f"{vision}encoder.layers.encoder_layer_{{n}}.", f"{vit}blocks.{{n}}.", _VIT),
        *_embeddings(f"{text}embeddings.", f"{ours}text.embeddings."),
        *blocks(f"{text}encoder.layer.{{n}}.", f"{ours}text.blocks.{{n}}.", _SELF),
        *blocks(f"{albef}multimodal_encoder{twin}.layer.{{n}}.", f"{ours}fusion.blocks.{{n}}.", _SELF | _CROSS),
        *_embeddings(f"{answer}text_embeddings.", f"{ours}decoder.embeddings."),
        *blocks(f"{answer}multimodal_encoder.layer.{{n}}.", f"{ours}decoder.blocks.{{n}}.", _SELF | _CROSS),
        Pair(f"{answer}prediction_head.dense.{{p}}", f"{heads}lm.head.dense.{{p}}"),
        Pair(f"{answer}prediction_head.layer_norm.{{p}}", f"{heads}lm.head.norm.{{p}}"),
        Pair(f"{answer}prediction_head.decoder.{{p}}", f"{heads}lm.head.decoder.{{p}}"),
        Pair(f"{RETRIEVAL}vision_proj{twin}.{{p}}", f"{ours}embed.main.image.{{p}}"),
        Pair(f"{RETRIEVAL}text_proj{twin}.{{p}}", f"{ours}embed.main.text.{{p}}"),
    )


def _embeddings(theirs: str, ours: str) -> tuple[Pair, ...]:
    return (
        Pair(f"{theirs}word_embeddings.weight", f"{ours}word.weight"),
        Pair(f"{theirs}position_embeddings.weight", f"{ours}position.weight"),
        Pair(f"{theirs}token_type_embeddings.weight", f"{ours}segment.weight"),
        Pair(f"{theirs}layer_norm.{{p}}", f"{ours}norm.{{p}}"),
    )


_ALONE = (
    Pair("itm_head.{p}", "objectives.itm.head.{p}"),
    Pair(f"{RETRIEVAL}temp", "embed.main.logit_scale", to_ours=lambda temperature: -temperature.log().reshape(1)),
    Pair(f"{RETRIEVAL}image_queue", "objectives.itc.queue.image", to_ours=lambda x: x.T),
    Pair(f"{RETRIEVAL}text_queue", "objectives.itc.queue.text", to_ours=lambda x: x.T),
    Pair(f"{RETRIEVAL}queue_ptr", "objectives.itc.queue.pointer"),
    Pair(f"{RETRIEVAL}idx_queue", "objectives.itc.queue.image_id", to_ours=lambda x: x[0]),
)


def rename(state: State) -> Renamed:
    """Rename a file's weights to ours."""
    albef = _prefix({name: tuple(one.shape) for name, one in state.items()})
    return rename_pairs((*_table(albef, ""), *_table(albef, "_m"), *_ALONE), state)


FAMILY = Family("tmm_albef", recognise, recipe, rename)
