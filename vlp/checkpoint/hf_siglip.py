"""transformers' SigLIP and SigLIP 2 of fixed resolution and NaFlex: no class token, pooling by attention, sigmoid loss.

The text tower attends to its padding and is read at its last place, so its tokenizer pads every text to full length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlp.checkpoint.clip import (
    HEAD_WIDTH,
    TEXT_PROJECTION,
    TOWER,
    patch_tower,
    scalar_pairs,
    sigmoid_loss,
    text_tower,
    two_towers,
)
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers
from vlp.checkpoint.hf_clip import (
    BUFFERS,
    activation_of,
    image_blocks,
    preset_of,
    section,
    text_blocks,
    text_ends,
    unstated,
)
from vlp.checkpoint.names import Pair, added_axes, rename_pairs
from vlp.data.presets import beit3, naflex

_HEAD = "vision_model.head."
_COMMON = (
    Pair("vision_model.post_layernorm.{p}", TOWER + "norm.{p}"),
    *image_blocks("vision_model."),
    Pair(_HEAD + "probe", TOWER + "attn_pool.latent"),
    Pair(_HEAD + "attention.in_proj_weight", (TOWER + "attn_pool.q.weight", TOWER + "attn_pool.kv.weight"), cut=(1, 2)),
    Pair(_HEAD + "attention.in_proj_bias", (TOWER + "attn_pool.q.bias", TOWER + "attn_pool.kv.bias"), cut=(1, 2)),
    Pair(_HEAD + "attention.out_proj.{p}", TOWER + "attn_pool.proj.{p}"),
    Pair(_HEAD + "layernorm.{p}", TOWER + "attn_pool.norm.{p}"),
    Pair(_HEAD + "mlp.{rest}", TOWER + "attn_pool.mlp.{rest}"),
    *text_ends("text_model."),
    *text_blocks("text_model."),
    Pair("text_model.head.{p}", TEXT_PROJECTION + "{p}"),
    *scalar_pairs(axes=1),
)
SIGLIP_NAMES = (
    Pair("vision_model.embeddings.patch_embedding.{p}", TOWER + "patch_embed.proj.{p}"),
    Pair("vision_model.embeddings.position_embedding.weight", TOWER + "pos_embed", **added_axes(1)),
    *_COMMON,
)
_NAFLEX_NAMES = (
    Pair("vision_model.embeddings.patch_embedding.bias", TOWER + "patch_embed.proj.bias"),
    # Rows, columns, channels of a patch there; a convolution's weight has the channels first.
    Pair(
        "vision_model.embeddings.patch_embedding.weight",
        TOWER + "patch_embed.proj.weight",
        to_ours=lambda weight: weight.unflatten(1, (_side(weight), _side(weight), 3)).permute(0, 3, 1, 2),
        to_theirs=lambda weight: weight.permute(0, 2, 3, 1).flatten(1),
    ),
    Pair("vision_model.embeddings.position_embedding.weight", TOWER + "pos_embed", **added_axes(1)),
    *_COMMON,
)
_PATCHES, _POSITIONS = (f"vision_model.embeddings.{name}_embedding.weight" for name in ("patch", "position"))


def _side(weight: Tensor) -> int:
    """Side of the patches that rows of a linear layer read."""
    return math.isqrt(weight.shape[1] // 3)


def siglip_words(vocabulary_size: int, length: int) -> dict[str, Any]:
    """Return `data.tokenizer`: SigLIP's own SentencePiece, or Gemma's, which SigLIP 2 takes."""
    first = vocabulary_size <= 32_000
    source = "google/siglip-base-patch16-224" if first else "google/siglip2-base-patch16-224"
    return {"source": source, "clean": "siglip" if first else "none", "fixed_length": length}


def _text(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    tower = section(config, "text_config")
    words = shapes["text_model.embeddings.token_embedding.weight"]
    return text_tower(
        words,
        shapes["text_model.embeddings.position_embedding.weight"][0],
        layers=count_layers(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        heads=tower.get("num_attention_heads", 12 if tower else max(1, words[1] // HEAD_WIDTH)),
        hidden=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        activation=activation_of(tower, "gelu_pytorch_tanh"),
        eps=tower.get("layer_norm_eps", 1e-6),
        pool="end",
        causal=False,
    )


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    tower = section(config, "vision_config")
    preset, assumed = preset_of(config, beit3(224))  # a squashed square, mean and std 0.5
    text = _text(shapes, config)
    width = shapes[_PATCHES][0]
    vision = patch_tower(
        shapes,
        _PATCHES,
        _POSITIONS,
        layers=count_layers(shapes, r"vision_model\.encoder\.layers\.(\d+)\."),
        heads=tower.get("num_attention_heads", 12 if tower else max(1, width // HEAD_WIDTH)),
        hidden=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        activation=activation_of(tower, "gelu_pytorch_tanh"),
        eps=tower.get("layer_norm_eps", 1e-6),
        preset=preset,
        class_token=False,
        stated=tower.get("image_size"),
    )
    words = siglip_words(text["vocabulary_size"], text["max_length"])
    tree = two_towers(vision, text, siglip_space(shapes["text_model.head.weight"][0]), sigmoid_loss(), preset, words)
    missing = unstated(config, "vision_config", "heads of width 64, gelu_pytorch_tanh and epsilon 1e-6, as published")
    return Recipe(tree, (*missing, *assumed))


def _naflex_recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    tower = section(config, "vision_config")
    width, values = shapes[_PATCHES]
    side = math.isqrt(values // 3)
    preset, assumed = preset_of(config, naflex(side, tower.get("num_patches", 256)))
    as_conv = {**shapes, _PATCHES: (width, 3, side, side)}
    fixed = _recipe(as_conv, config)
    vision = fixed.tree["model"]["vision"]
    vision |= {"position_size": vision["image_size"], "position_resize": "bilinear_antialias"}
    vision |= {"mean": preset.mean, "std": preset.std}
    model, data = fixed.tree["model"], fixed.tree["data"]
    tree = two_towers(vision, model["text"], model["embed"], sigmoid_loss(), preset, data["tokenizer"])
    missing = tuple(one for one in fixed.assumed if ": heads of width" in one)
    return Recipe(tree, (*missing, *assumed))


def siglip_space(width: int) -> dict[str, Any]:
    """Return `model.embed`: only texts are projected, the temperature begins at 0.1 and the bias at -10."""
    return {"width": width, "image": "none", "bias": True, "temperature": 0.1, "logit_bias": -10.0}


def _rename(state: State) -> Renamed:
    return rename_pairs(SIGLIP_NAMES, state, BUFFERS)


def _rename_naflex(state: State) -> Renamed:
    return rename_pairs(_NAFLEX_NAMES, state, BUFFERS)


NAFLEX = Family(
    "hf_siglip2",
    lambda shapes, config: _HEAD + "probe" in shapes and len(shapes.get(_PATCHES, ())) == 2,
    _naflex_recipe,
    _rename_naflex,
)
FAMILY = Family(
    "hf_siglip",
    lambda shapes, config: _HEAD + "probe" in shapes and len(shapes.get(_PATCHES, ())) == 4,
    _recipe,
    _rename,
)
FAMILIES = (FAMILY, NAFLEX)
