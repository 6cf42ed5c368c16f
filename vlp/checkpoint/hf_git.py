"""transformers' GIT (Wang et al. 2022): CLIP's image tower, whose projected tokens stand before a causal BERT stack.

Several frames are laid behind each other there, each with an embedding of its own; here a text has one image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.bert_stack import LAYER, embeddings
from vlp.checkpoint.clip import HEAD_WIDTH, TOWER, image_pairs, patch_tower
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers
from vlp.checkpoint.hf_clip import BUFFERS, activation_of, image_blocks, preset_of, section, unstated
from vlp.checkpoint.names import Pair, blocks, rename_pairs
from vlp.data.presets import meter_clip

_WORDS = "embeddings.word_embeddings.weight"
_PATCHES = "embeddings.patch_embedding.weight"
_IGNORED = BUFFERS | {r"(git\.)?img_temporal_embedding\.\d+": "of several frames; vlp reads one image a text"}


def _plain(names: Mapping[str, Any]) -> dict[str, Any]:
    """Take off the name of the model within that with the head, and of the image tower within its wrapper."""
    return {re.sub(r"^(git\.)?(image_encoder\.vision_model\.)?", _short, name): one for name, one in names.items()}


def _short(found: re.Match[str]) -> str:
    return "vision_model." if found[2] else ""


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    plain = _plain(shapes)
    tower = section(config, "vision_config")
    preset, assumed = preset_of(config, meter_clip(224))
    image_width = plain[f"vision_model.{_PATCHES}"][0]
    eps = tower.get("layer_norm_eps", 1e-5)
    vision = patch_tower(
        plain,
        f"vision_model.{_PATCHES}",
        "vision_model.embeddings.position_embedding.weight",
        layers=count_layers(plain, r"vision_model\.encoder\.layers\.(\d+)\."),
        heads=tower.get("num_attention_heads", 12 if tower else max(1, image_width // HEAD_WIDTH)),
        hidden=plain["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        activation=activation_of(tower, "quick_gelu"),
        eps=eps,
        preset=preset,
    )
    words, width = plain[_WORDS]
    stack = {
        "width": width,
        "heads": config.get("num_attention_heads", 12 if tower else max(1, width // HEAD_WIDTH)),
        "hidden": plain["encoder.layer.0.intermediate.dense.weight"][0],
        "activation": activation_of(config, "gelu"),
        "eps": config.get("layer_norm_eps", 1e-12),
    }
    length = plain["embeddings.position_embeddings.weight"][0]
    text = {"kind": "text", "layers": 0, "vocabulary_size": words, "max_length": length, "segments": 0}
    tied = "output.weight" not in plain or bool(config.get("tie_word_embeddings"))
    tree = {
        "model": {
            "vision": vision,
            "text": text | stack,
            "fusion": {
                "kind": "single_stream",
                "layers": count_layers(plain, r"encoder\.layer\.(\d+)\."),
                **stack,
                "modality_embedding": False,
                "pooler": "cls",
                "project": "image_norm",
                "project_eps": eps,
            },
        },
        "objectives": {"lm": {"memory": "beside", "head": "linear", "tied": tied}} if "output.bias" in plain else {},
        "data": {
            "max_length": min(40, length),
            "tokenizer": {"source": "bert-base-uncased"},
            "transform": preset.transform.model_dump(exclude_defaults=True, exclude={"image_size"}),
        },
    }
    missing = "heads of width 64, quick_gelu (image), gelu (text), epsilon 1e-5 and 1e-12"
    return Recipe(tree, (*unstated(config, "vision_config", missing), *assumed))


_TABLE = (
    Pair(f"vision_model.{_PATCHES}", TOWER + "patch_embed.proj.weight"),
    *image_pairs(
        "vision_model.",
        "embeddings.position_embedding.weight",
        "embeddings.class_embedding",
        ("pre_layrnorm", "post_layernorm"),  # spelt so
    ),
    *image_blocks("vision_model."),
    *embeddings("", "text."),
    *blocks("encoder.layer.{n}.", "fusion.blocks.{n}.", LAYER),
    Pair("visual_projection.visual_projection.0.{p}", "fusion.image_project.0.{p}"),
    Pair("visual_projection.visual_projection.1.{p}", "fusion.image_project.1.{p}"),
    Pair("output.{p}", "objectives.lm.head.{p}"),
)


def _rename(state: State) -> Renamed:
    stored = dict(zip(_plain(state), state, strict=True))
    found = rename_pairs(_TABLE, _plain(state), _IGNORED)
    return Renamed(found.state, found.ignored, tuple(stored[name] for name in found.unexpected))


FAMILY = Family(
    "hf_git",
    lambda shapes, config: (
        {"visual_projection.visual_projection.0.weight", _WORDS, f"vision_model.{_PATCHES}"} <= _plain(shapes).keys()
    ),
    _recipe,
    _rename,
)
