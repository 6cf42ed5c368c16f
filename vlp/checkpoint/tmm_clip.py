"""torchmultimodal's CLIP: two stacks of torch's own transformer layers, QuickGELU in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.clip import (
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
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers
from vlp.checkpoint.names import Pair, blocks, rename_pairs, transposed
from vlp.checkpoint.tmm_parts import heads_of
from vlp.data.presets import meter_clip

_IMAGE, _TEXT, _SCALE = "encoder_a.", "encoder_b.", "loss.logit_scale"
_IMAGE_SECTIONS = ("encoder_a", "image", "vision", "image_encoder", "vision_encoder")
_TEXT_SECTIONS = ("encoder_b", "text", "text_encoder")
_NAMES = (
    Pair(_IMAGE + "conv.weight", TOWER + "patch_embed.proj.weight"),
    *image_pairs(_IMAGE, "positional_embedding", "cls_token_embedding", ("ln_pre", "ln_post")),
    *blocks(
        _IMAGE + "encoder.layers.{n}.",
        IMAGE_BLOCK,
        {
            "norm1": "norm1",
            "norm2": "norm2",
            "self_attn.in_proj_{p}": "attn.qkv.{p}",
            "self_attn.out_proj": "attn.proj",
            "linear1": "mlp.fc1",
            "linear2": "mlp.fc2",
        },
    ),
    Pair(_IMAGE + "projection", IMAGE_PROJECTION + "weight", **transposed()),
    Pair(_TEXT + "token_embedding.weight", "text.embeddings.word.weight"),
    Pair(_TEXT + "positional_embedding", "text.embeddings.position.weight"),
    *blocks(
        _TEXT + "encoder.layers.{n}.",
        TEXT_BLOCK,
        {
            "norm1": "attention_norm",
            "norm2": "feed_norm",
            "self_attn.in_proj_{p}": tuple(f"{name}.{{p}}" for name in QUERY_KEY_VALUE),
            "self_attn.out_proj": "attention.out",
            "linear1": "feed.up",
            "linear2": "feed.down",
        },
    ),
    Pair(_TEXT + "ln_final.{p}", "text.final_norm.{p}"),
    Pair(_TEXT + "projection.weight", TEXT_PROJECTION + "weight"),
)


def _plain(names: Mapping[str, Any]) -> dict[str, Any]:
    """Take off the name of the model within the module that also holds the loss."""
    return {name.removeprefix("model."): value for name, value in names.items()}


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    shapes = _plain(shapes)
    preset = meter_clip(224)
    width, words = shapes[_IMAGE + "conv.weight"][0], shapes[_TEXT + "token_embedding.weight"]
    image_heads, image_said = heads_of(config, _IMAGE_SECTIONS, width)
    text_heads, text_said = heads_of(config, _TEXT_SECTIONS, words[1])
    vision = patch_tower(
        shapes,
        _IMAGE + "conv.weight",
        _IMAGE + "positional_embedding",
        layers=count_layers(shapes, r"encoder_a\.encoder\.layers\.(\d+)\."),
        heads=image_heads,
        hidden=shapes[_IMAGE + "encoder.layers.0.linear1.weight"][0],
        activation="quick_gelu",
        eps=1e-5,
        preset=preset,
    )
    text = text_tower(
        words,
        shapes[_TEXT + "positional_embedding"][0],
        layers=count_layers(shapes, r"encoder_b\.encoder\.layers\.(\d+)\."),
        heads=text_heads,
        hidden=shapes[_TEXT + "encoder.layers.0.linear1.weight"][0],
        activation="quick_gelu",
        eps=1e-5,
        pool="largest",
    )
    embed = {"width": shapes[_IMAGE + "projection"][1], "bias": False}
    tree = two_towers(vision, text, embed, softmax_loss(), preset, clip_words(words[0]))
    return Recipe(tree, () if image_said and text_said else ("heads of width 64, as in its published sizes",))


def _rename(state: State) -> Renamed:
    plain, stored = _plain(state), {name.removeprefix("model."): name for name in state}
    axes = plain[_SCALE].dim() if _SCALE in plain else 0
    found = rename_pairs((*_NAMES, scalar_pairs(_SCALE, axes=axes)[0]), plain)
    return Renamed(found.state, found.ignored, tuple(stored[name] for name in found.unexpected))


FAMILY = Family(
    "tmm_clip",
    lambda shapes, config: {_IMAGE + "cls_token_embedding", _TEXT + "projection.weight"} <= _plain(shapes).keys(),
    _recipe,
    _rename,
)
