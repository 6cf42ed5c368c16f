"""transformers' BridgeTower: the model alone, and with its heads for masked words, matching and contrast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlp.checkpoint.bert_stack import LAYER, embeddings
from vlp.checkpoint.clip import HEAD_WIDTH, TOWER, image_pairs, patch_tower
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers
from vlp.checkpoint.hf_clip import activation_of, preset_of, section
from vlp.checkpoint.meter import cross_names, last_image_layer, visual_blocks
from vlp.checkpoint.names import Pair, blocks
from vlp.checkpoint.vilt import HEADS, rename_read
from vlp.data.presets import Preset, meter_clip

_MARK = "cross_modal_text_layernorm.weight"
_OFFSET = 2
"""RoBERTa's first position: its padding id and one more."""
_LENGTH = 50
"""Words of a text, as published."""
_SCALE = 4
"""Width of the image tower's feed-forward over its own, which config.json does not say."""


def _prefix(names: Mapping[str, Any]) -> str:
    """What stands before the model's own names: nothing in a file of the model alone."""
    return "bridgetower." if f"bridgetower.{_MARK}" in names else ""


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    return f"{_prefix(shapes)}{_MARK}" in shapes


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    prefix = _prefix(shapes)
    if config.get("share_link_tower_layers"):
        raise ValueError(
            "BridgeTower checkpoint: config.json says share_link_tower_layers true, which vlp does not read"
        )
    preset, assumed = preset_of(config, meter_clip(288))
    if not set(config) - {"preprocessor_config"}:
        assumed = ("no config.json: heads of width 64, gelu and epsilon 1e-5, as published", *assumed)
    text = _text(shapes, prefix, section(config, "text_config"))
    vision = _vision(shapes, prefix, section(config, "vision_config"), preset)
    if vision["depth"] != text["layers"]:
        raise ValueError(
            f"BridgeTower checkpoint: towers of {vision['depth']} and {text['layers']} layers, which cannot be bridged"
        )
    model = {"vision": vision, "text": text, "fusion": _fusion(shapes, prefix, config, text)}
    if "itc_text_head.fc.weight" in shapes:
        model["embed"] = {"width": shapes["itc_text_head.fc.weight"][0]}
    data = {
        "max_length": min(_LENGTH, text["max_length"]),
        "tokenizer": {"source": "BridgeTower/bridgetower-base"},
        "transform": preset.transform.model_dump(exclude_defaults=True, exclude={"image_size"}),
    }
    return Recipe({"model": model, "objectives": _objectives(shapes, config), "data": data}, assumed)


def _vision(shapes: Shapes, prefix: str, tower: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    visual = f"{prefix}vision_model.visual."
    patches = f"{visual}embeddings.patch_embedding.weight"
    width = shapes[patches][0]
    return patch_tower(
        shapes,
        patches,
        f"{visual}embeddings.position_embedding.weight",
        layers=count_layers(shapes, rf"{visual}transformer\.resblocks\.(\d+)\."),
        heads=max(1, width // HEAD_WIDTH),
        hidden=_SCALE * width,
        activation="quick_gelu",
        eps=tower.get("layer_norm_eps", 1e-5),
        preset=preset,
    )


def _text(shapes: Shapes, prefix: str, tower: Mapping[str, Any]) -> dict[str, Any]:
    words, rows, types = (
        shapes[f"{prefix}text_model.embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    layer = f"{prefix}text_model.encoder.layer."
    return {
        "width": words[1],
        "layers": count_layers(shapes, rf"{layer}(\d+)\."),
        "heads": tower.get("num_attention_heads", 12 if tower else max(1, words[1] // HEAD_WIDTH)),
        "hidden": shapes[f"{layer}0.intermediate.dense.weight"][0],
        "activation": activation_of(tower, "gelu"),
        "eps": tower.get("layer_norm_eps", 1e-5),
        "vocabulary_size": words[0],
        "max_length": rows[0] - _OFFSET,
        "position_offset": _OFFSET,
        "segments": types[0],
    }


def _fusion(shapes: Shapes, prefix: str, config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Its layers are of the text tower's kind; its own epsilon is that of the norms between."""
    stack = {name: text[name] for name in ("heads", "activation", "eps")}
    return {
        "kind": "bridge",
        **stack,
        "width": shapes[f"{prefix}{_MARK}"][0],
        "layers": count_layers(shapes, rf"{prefix}cross_modal_text_layers\.(\d+)\."),
        "hidden": shapes[f"{prefix}cross_modal_text_layers.0.intermediate.dense.weight"][0],
        "link": config.get("link_tower_type", "add"),
        "link_eps": config.get("layer_norm_eps", 1e-5),
        "one_projection": f"{prefix}cross_modal_text_transform.weight" in shapes,
        "pooler": "concat",
    }


def _objectives(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "mlm_score.bias" in shapes:
        found["mlm"] = {
            "tied": "mlm_score.decoder.weight" not in shapes,
            "activation": activation_of(config, "gelu"),
            "eps": config.get("layer_norm_eps", 1e-5),
        }
    if "itm_score.fc.weight" in shapes:
        found["itm"] = {"scheme": "replace_image", "exclude": "diagonal"}
    if "itc_text_head.fc.weight" in shapes:
        found["fused_itc"] = {"positives": "diagonal"}
    return found


def _names(prefix: str) -> tuple[Pair, ...]:
    visual, text = f"{prefix}vision_model.visual.", f"{prefix}text_model."
    both = [
        pair
        for side in ("text", "image")
        for pair in (
            Pair(f"{prefix}cross_modal_{side}_transform.{{p}}", f"fusion.{side}_project.0.{{p}}"),
            Pair(f"{prefix}cross_modal_{side}_transform.{{n}}.{{p}}", f"fusion.{side}_project.{{n}}.{{p}}"),
            Pair(f"{prefix}cross_modal_{side}_layernorm.{{p}}", f"fusion.{side}_norm.{{p}}"),
            Pair(
                f"{prefix}cross_modal_{side}_link_tower.{{n}}.LayerNorm.{{p}}", f"fusion.{side}_links.{{n}}.norm.{{p}}"
            ),
            Pair(f"{prefix}cross_modal_{side}_link_tower.{{n}}.scaled_factor", f"fusion.{side}_links.{{n}}.factor"),
            Pair(f"{prefix}cross_modal_{side}_link_tower.{{n}}.beta", f"fusion.{side}_links.{{n}}.share"),
        )
    ]
    return (
        *embeddings(text, "text."),
        *blocks(f"{text}encoder.layer.{{n}}.", "text.blocks.{n}.", LAYER),
        Pair(f"{visual}embeddings.patch_embedding.weight", TOWER + "patch_embed.proj.weight"),
        *image_pairs(
            visual, "embeddings.position_embedding.weight", "embeddings.class_embedding", ("ln_pre", "ln_post")
        ),
        *visual_blocks(visual),
        *both,
        *cross_names(prefix),
        *HEADS,
        Pair("itc_text_head.fc.{p}", "embed.main.text.{p}"),
        Pair("itc_cross_modal_head.fc.{p}", "objectives.fused_itc.head.{p}"),
        Pair("logit_scale", "embed.main.logit_scale", lambda scale: scale.reshape(1)),
    )


_IGNORED = {
    r"(bridgetower\.)?(text_model|vision_model\.visual)\.embeddings\.(position|token_type)_ids": "counted",
    r"(bridgetower\.)?text_model\.pooler\..+": "not read",
    r"(bridgetower\.)?vision_model\.visual\.ln_separate\..+": "not read",
}


def _image_projection(state: State, prefix: str) -> dict[str, Tensor]:
    """The contrastive head of the image reads what the fusion projects: both maps as one."""
    head, bias = state["itc_image_head.fc.weight"], state["itc_image_head.fc.bias"]
    project = f"{prefix}cross_modal_image_transform."
    shift = state[f"{project}bias"] + state[f"{prefix}token_type_embeddings.weight"][1]
    return {"embed.main.image.weight": head @ state[f"{project}weight"], "embed.main.image.bias": head @ shift + bias}


def _rename(state: State) -> Renamed:
    prefix = _prefix(state)
    left = dict(_IGNORED)
    if "mlm_score.bias" in state:
        left[last_image_layer(state, prefix)] = "no head of the file reads it"
    own = {name: tensor for name, tensor in state.items() if not name.startswith("itc_image_head.")}
    found = rename_read(_names(prefix), own, left)
    more = _image_projection(state, prefix) if len(own) < len(state) else {}
    return Renamed({**found.state, **more}, found.ignored, found.unexpected)


FAMILY = Family("hf_bridgetower", _recognise, _recipe, _rename)
