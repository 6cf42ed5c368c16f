"""transformers' CLIP, AltCLIP and ChineseCLIP: CLIP's image tower with three kinds of text towers.

Numbers of heads, activation, epsilon and the kind of pooling stand in config.json alone.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.bert_stack import LAYER, embeddings
from vlp.checkpoint.clip import (
    HEAD_WIDTH,
    IMAGE_BLOCK,
    IMAGE_PROJECTION,
    QUERY_KEY_VALUE,
    TEXT_BLOCK,
    TEXT_PROJECTION,
    TOWER,
    clip_words,
    image_pairs,
    patch_tower,
    scalar_pairs,
    softmax_loss,
    text_tower,
    two_towers,
)
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, names_there
from vlp.checkpoint.names import Names, Pair, blocks, rename_pairs
from vlp.data.presets import Preset, albef_blip, hf_processor, meter_clip

ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
"""Of transformers -> ours."""
BUFFERS = {r"(.*\.)?position_ids": "a buffer of counted positions"}
_LAYERS: dict[Names, Names] = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_PROJECTIONS = (
    Pair("visual_projection.weight", IMAGE_PROJECTION + "weight"),
    Pair("text_projection.weight", TEXT_PROJECTION + "weight"),
    scalar_pairs()[0],
)


def image_blocks(prefix: str) -> tuple[Pair, ...]:
    """Return the pairs of the layers of CLIP's and SigLIP's image towers."""
    return blocks(prefix + "encoder.layers.{n}.", IMAGE_BLOCK, {**_LAYERS, SPLIT: "attn.qkv"})


def text_blocks(prefix: str) -> tuple[Pair, ...]:
    """Return the pairs of the layers of CLIP's and SigLIP's text towers."""
    layers: dict[Names, Names] = {
        "layer_norm1": "attention_norm",
        "layer_norm2": "feed_norm",
        "self_attn.out_proj": "attention.out",
        "mlp.fc1": "feed.up",
        "mlp.fc2": "feed.down",
    }
    layers |= dict(zip(SPLIT, QUERY_KEY_VALUE, strict=True))
    return blocks(prefix + "encoder.layers.{n}.", TEXT_BLOCK, layers)


def text_ends(prefix: str) -> tuple[Pair, ...]:
    """Return the pairs of these text towers outside their layers."""
    return (
        Pair(prefix + "embeddings.token_embedding.weight", "text.embeddings.word.weight"),
        Pair(prefix + "embeddings.position_embedding.weight", "text.embeddings.position.weight"),
        Pair(prefix + "final_layer_norm.{p}", "text.final_norm.{p}"),
    )


_IMAGE = (
    Pair("vision_model.embeddings.patch_embedding.weight", TOWER + "patch_embed.proj.weight"),
    *image_pairs(
        "vision_model.",
        "embeddings.position_embedding.weight",
        "embeddings.class_embedding",
        ("pre_layrnorm", "post_layernorm"),  # spelt so
    ),
    *image_blocks("vision_model."),
)
CLIP_NAMES = (*_IMAGE, *text_ends("text_model."), *text_blocks("text_model."), *_PROJECTIONS)
BERT_NAMES = (*embeddings("text_model.", "text."), *blocks("text_model.encoder.layer.{n}.", TEXT_BLOCK, LAYER))
"""A text tower that is BERT (ChineseCLIP, ALIGN)."""
_CHINESE_NAMES = (*_IMAGE, *BERT_NAMES, *_PROJECTIONS)
_ALT_NAMES = (
    *_IMAGE,
    *embeddings("text_model.roberta.", "text."),
    *blocks("text_model.roberta.encoder.layer.{n}.", TEXT_BLOCK, LAYER),
    Pair("text_model.pre_LN.{p}", "text.project.norm.{p}"),
    Pair("text_model.transformation.{p}", "text.project.dense.{p}"),
    *_PROJECTIONS,
)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a tower's part of config.json; older files hold what was set in a second one."""
    older, found = config.get(f"{name}_dict") or {}, config.get(name) or {}
    return ChainMap(older, found)


def activation_of(tower: Mapping[str, Any], default: str) -> str:
    """Return our name of a tower's activation.

    Raises:
        ValueError: it is not known here.
    """
    name = tower.get("hidden_act", default)
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} of config.json is not known here; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def preset_of(config: Mapping[str, Any], default: Preset) -> tuple[Preset, tuple[str, ...]]:
    """Return the preprocessing by preprocessor_config.json, and what was assumed without one."""
    found = config.get("preprocessor_config")
    if found:
        return hf_processor(found), ()
    return default, ("image preprocessing as the family publishes it (no preprocessor_config.json)",)


def _vision(shapes: Shapes, config: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    tower = section(config, "vision_config")
    width = shapes["vision_model.embeddings.patch_embedding.weight"][0]
    named = (f"vision_model.encoder.{layer}.0.mlp.fc1.weight" for layer in ("layer", "layers"))
    hidden = next((shapes[name] for name in named if name in shapes), (0,))[0]
    return patch_tower(
        shapes,
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
        layers=count_layers(shapes, r"vision_model\.encoder\.layers?\.(\d+)\."),
        heads=tower.get("num_attention_heads", 12 if tower else max(1, width // HEAD_WIDTH)),
        hidden=hidden,
        activation=activation_of(tower, "quick_gelu"),
        eps=tower.get("layer_norm_eps", 1e-5),
        preset=preset,
        stated=tower.get("image_size"),
    )


def _embed(shapes: Shapes) -> dict[str, Any] | None:
    weight = shapes.get("visual_projection.weight")
    if weight is None or "text_projection.weight" not in shapes:
        return None  # the towers alone
    return {"width": weight[0], "bias": False}


def unstated(config: Mapping[str, Any], part: str, what: str) -> tuple[str, ...]:
    """Return what is assumed where config.json says nothing of a part (``text_config``), or is not there."""
    if section(config, part):
        return ()
    there = set(config) - {"preprocessor_config"}
    return (f"{f'config.json has no {part}' if there else 'no config.json'}: {what}",)


def _clip_text(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    tower = section(config, "text_config")
    words = shapes["text_model.embeddings.token_embedding.weight"]
    # Before transformers 4.31 configs said 2, which is no end of CLIP's texts: the largest id is read then.
    eos = tower.get("eos_token_id", 49407 if tower else 2)
    return text_tower(
        words,
        shapes["text_model.embeddings.position_embedding.weight"][0],
        layers=count_layers(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        heads=tower.get("num_attention_heads", 8 if tower else max(1, words[1] // HEAD_WIDTH)),
        hidden=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        activation=activation_of(tower, "quick_gelu"),
        eps=tower.get("layer_norm_eps", 1e-5),
        pool="largest" if eos == 2 else "eos",
        eos=None if eos == 2 else eos,
    )


def _clip_recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    preset, assumed = preset_of(config, meter_clip(224))
    text = _clip_text(shapes, config)
    words = clip_words(text["vocabulary_size"])
    tree = two_towers(_vision(shapes, config, preset), text, _embed(shapes), softmax_loss(), preset, words)
    missing = "heads of width 64, quick_gelu and epsilon 1e-5, as OpenAI's"
    return Recipe(tree, (*unstated(config, "text_config", missing), *assumed))


def bert_tower(
    shapes: Shapes, tower: Mapping[str, Any], prefix: str = "text_model.", eps: float = 1e-12
) -> dict[str, Any]:
    """Return `model.text` of a text tower that is BERT or RoBERTa, read at its first token."""
    words, types, positions = (
        shapes[f"{prefix}embeddings.{name}_embeddings.weight"] for name in ("word", "token_type", "position")
    )
    return {
        "kind": "text",
        "vocabulary_size": words[0],
        "width": words[1],
        "max_length": positions[0],
        "segments": types[0],
        "layers": count_layers(shapes, re.escape(prefix) + r"encoder\.layer\.(\d+)\."),
        "heads": tower.get("num_attention_heads", 12 if tower else max(1, words[1] // HEAD_WIDTH)),
        "hidden": shapes[f"{prefix}encoder.layer.0.intermediate.dense.weight"][0],
        "activation": activation_of(tower, "gelu"),
        "eps": tower.get("layer_norm_eps", eps),
        "dropout": tower.get("hidden_dropout_prob", 0.1),
    }


def _chinese_recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    preset, assumed = preset_of(config, albef_blip(224))
    text = bert_tower(shapes, section(config, "text_config"))
    words = {"source": "OFA-Sys/chinese-clip-vit-base-patch16"}
    tree = two_towers(_vision(shapes, config, preset), text, _embed(shapes), softmax_loss(), preset, words)
    tree["data"]["max_length"] = min(52, text["max_length"])  # as published
    missing = "heads of width 64, quick_gelu (image), gelu (text), epsilon 1e-5 and 1e-12"
    return Recipe(tree, (*unstated(config, "text_config", missing), *assumed))


def _alt_recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    preset, assumed = preset_of(config, meter_clip(224))
    tower = section(config, "text_config")
    text = bert_tower(shapes, {"num_attention_heads": 16, **tower} if tower else {}, "text_model.roberta.", 1e-5)
    first = tower.get("pad_token_id", 1) + 1  # as in RoBERTa positions are counted from the one behind padding's id
    text |= {"position_offset": first, "max_length": text["max_length"] - first}
    text["project"] = shapes["text_model.transformation.weight"][0]
    words = {"source": "BAAI/AltCLIP"}
    tree = two_towers(_vision(shapes, config, preset), text, _embed(shapes), softmax_loss(), preset, words)
    tree["data"]["max_length"] = min(77, text["max_length"])  # as published
    missing = "heads of width 64, quick_gelu (image), gelu (text) and epsilon 1e-5"
    return Recipe(tree, (*unstated(config, "text_config", missing), *assumed))


def _rename_layers(table: tuple[Pair, ...], state: State, ignored: Mapping[str, str]) -> Renamed:
    """Rename from the names on the hub: transformers 5 writes ``vision_model.encoder.layer.N`` of these two."""
    plain = {re.sub(r"^(vision_model\.encoder\.)layer\.", r"\1layers.", name): one for name, one in state.items()}
    found = rename_pairs(table, plain, ignored)
    return Renamed(found.state, found.ignored, names_there(found.unexpected, plain, state))


def _rename_clip(state: State) -> Renamed:
    return rename_pairs(CLIP_NAMES, state, BUFFERS)


def _rename_chinese(state: State) -> Renamed:
    unread = {r"text_model\.pooler\..*": "BERT's pooler, which the model does not read"}
    return _rename_layers(_CHINESE_NAMES, state, BUFFERS | unread)


def _rename_alt(state: State) -> Renamed:
    return _rename_layers(_ALT_NAMES, state, BUFFERS)


def _has_clip_tower(shapes: Shapes) -> bool:
    return "vision_model.pre_layrnorm.weight" in shapes


CLIP = Family(
    "hf_clip",
    lambda shapes, config: _has_clip_tower(shapes) and "text_model.final_layer_norm.weight" in shapes,
    _clip_recipe,
    _rename_clip,
)
CHINESE_CLIP = Family(
    "hf_chinese_clip",
    lambda shapes, config: _has_clip_tower(shapes) and "text_model.embeddings.word_embeddings.weight" in shapes,
    _chinese_recipe,
    _rename_chinese,
)
ALTCLIP = Family(
    "hf_altclip",
    lambda shapes, config: _has_clip_tower(shapes) and "text_model.transformation.weight" in shapes,
    _alt_recipe,
    _rename_alt,
)
FAMILIES = (CLIP, CHINESE_CLIP, ALTCLIP)
