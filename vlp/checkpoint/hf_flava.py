"""transformers' FLAVA: the model, or the model with its pretraining heads and image codebook.

Numbers of heads, activations and epsilons stand in config.json alone. No loss reads the poolers of a pretraining file,
whose matching has one of its own; a file without heads keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint import flava
from vlp.checkpoint.bert_stack import without_copies, word_head
from vlp.checkpoint.clip import HEAD_WIDTH, scalar_pairs
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, shapes_of
from vlp.checkpoint.hf_clip import BUFFERS, activation_of, preset_of, section, unstated
from vlp.checkpoint.names import Pair, blocks, rename_pairs
from vlp.data.presets import albef_blip

_PARTS = {"image_model": "image_config", "text_model": "text_config", "multimodal_model": "multimodal_config"}
_NAMED = flava.Parts(*_PARTS)
_LAYER: dict[str, str | tuple[str, ...]] = {
    "norm_before": "layernorm_before",
    "norm_after": "layernorm_after",
    "query_key_value": tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "attention_out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_HEADS = {"mim_head": "mim", "mlm_head": "mlm", "mmm_image_head": "mmm_image", "mmm_text_head": "mmm_text"}
_WEIGHTS = {
    "mim": "mim_weight",
    "mlm": "mlm_weight",
    "itm": "itm_weight",
    "itc": "global_contrastive_weight",
    "mmm_image": "mmm_image_weight",
    "mmm_text": "mmm_text_weight",
}
_CODEBOOK = "image_codebook.blocks."
_UNREAD = {r"flava\.(image|text|multimodal)_model\.pooler\..*": "no loss reads it"}


def _plain(names: Mapping[str, Any]) -> dict[str, Any]:
    """Take off the name of the model within that with the heads."""
    return {name.removeprefix("flava."): value for name, value in names.items()}


def _pretrained(names: Mapping[str, Any]) -> bool:
    return "itm_head.seq_relationship.weight" in names


def _stack(shapes: Shapes, config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Sizes of one of the three stacks."""
    said = section(config, _PARTS[part])
    layer = f"{part}.encoder.layer.0."
    width = shapes[f"{part}.layernorm.weight"][0]
    return {
        "layers": count_layers(shapes, re.escape(f"{part}.encoder.layer.") + r"(\d+)\."),
        "heads": said.get("num_attention_heads", 12 if said else max(1, width // HEAD_WIDTH)),
        "hidden": shapes[f"{layer}intermediate.dense.weight"][0],
        "activation": activation_of(said, "gelu"),
        "eps": said.get("layer_norm_eps", 1e-12),
    }


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    trained, shapes = _pretrained(shapes), _plain(shapes)
    preset, assumed = preset_of(config, albef_blip(224))
    tree = flava.tree(shapes, _NAMED, {part: _stack(shapes, config, part) for part in _PARTS}, preset, trained)
    model = tree["model"]
    if _CODEBOOK + "input.weight" in shapes:
        model["codebook"] = _codebook(shapes)
    if trained:
        said, text = section(config, "image_config"), model["text"]
        activation = model["vision"]["arguments"].get("act_layer", "gelu")
        head = {"activation": activation, "eps": said.get("layer_norm_eps", 1e-12)}
        weights = {name: config[key] for name, key in _WEIGHTS.items() if key in config}
        tree["objectives"] = flava.losses(shapes["mim_head.decoder.weight"][0], weights, head)
        for name in ("mlm", "mmm_text"):
            tree["objectives"][name] |= {"activation": text["activation"], "eps": text["eps"]}
    stated = unstated(config, "image_config", "heads of width 64, gelu and epsilon 1e-12")
    return Recipe(tree, (*stated, *assumed))


def _codebook(shapes: Shapes) -> dict[str, int]:
    return {
        "codes": shapes[_CODEBOOK + "output.conv.weight"][0],
        "width": shapes[_CODEBOOK + "input.weight"][0],
        "blocks": count_layers(shapes, re.escape(_CODEBOOK) + r"group_1\.group\.block_(\d+)\.") - 1,
    }


def _table(pooler: str, codebook_blocks: int) -> tuple[Pair, ...]:
    """Names of a file's weights there and here; ``pooler`` is that of the fused vector there."""
    pairs = [
        *flava.tower_pairs(_NAMED, pooler),
        Pair("itm_head.seq_relationship.{p}", "objectives.itm.head.{p}"),
        scalar_pairs()[0],
    ]
    for part, ours, names in (
        ("image_model", flava.IMAGE_BLOCK, flava.VIT_BLOCK),
        ("text_model", flava.TEXT_BLOCK, flava.OWN_BLOCK),
        ("multimodal_model", flava.FUSED_BLOCK, flava.OWN_BLOCK),
    ):
        pairs += blocks(part + ".encoder.layer.{n}.", ours, {_LAYER[one]: names[one] for one in _LAYER})
    for theirs, ours in _HEADS.items():
        pairs += word_head(f"{theirs}.", f"objectives.{ours}.head.")
        pairs.append(Pair(f"{theirs}.decoder.weight", f"objectives.{ours}.head.decoder.weight"))
    kinds = {"weight": "weight", "bias": "bias"}
    return (*pairs, *flava.codebook_pairs(_CODEBOOK, "group.", "res_path.path.", codebook_blocks, kinds))


def _rename(state: State) -> Renamed:
    trained = _pretrained(state)
    left = {
        name: reason for name in state for pattern, reason in _UNREAD.items() if trained and re.fullmatch(pattern, name)
    }
    stored = {name.removeprefix("flava."): name for name in state}
    whole, copies = without_copies(
        {name: one for name, one in _plain(state).items() if stored[name] not in left},
        {f"{head}.decoder.bias": f"{head}.bias" for head in _HEADS},
    )
    number = count_layers(shapes_of(state), re.escape(_CODEBOOK) + r"group_1\.group\.block_(\d+)\.") - 1
    found = rename_pairs(_table("itm_head.pooler." if trained else "multimodal_model.pooler.", number), whole, BUFFERS)
    return Renamed(found.state, found.ignored | left | copies, tuple(stored[name] for name in found.unexpected))


FAMILY = Family(
    "hf_flava",
    lambda shapes, config: (
        {
            "image_model.embeddings.position_embeddings",
            "multimodal_model.layernorm.weight",
            "image_to_mm_projection.weight",
        }
        <= _plain(shapes).keys()
    ),
    _recipe,
    _rename,
)
