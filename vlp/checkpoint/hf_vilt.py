"""transformers' ViLT: the model alone, and with its heads for masked words, VQA, NLVR2 and retrieval; in and out.

One epsilon for all norms (1e-12 as published, where the authors have 1e-6 in the blocks), which config.json states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlp.checkpoint.bert_stack import embeddings, without_copies
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers
from vlp.checkpoint.hf_clip import activation_of, preset_of
from vlp.checkpoint.names import Pair, blocks
from vlp.checkpoint.vilt import RELATIONS, numbered, rename_read, swap_modalities, vilt_tree
from vlp.data.presets import vilt as vilt_preset

_PATCHES = "embeddings.patch_embeddings.projection.weight"
_CLASSIFIER = "classifier.3.weight"
_NUM_IMAGES = 2


def _prefix(names: Mapping[str, Any]) -> str:
    """What stands before the model's own names: nothing in a file of the model alone."""
    return "vilt." if f"vilt.{_PATCHES}" in names else ""


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    prefix = _prefix(shapes)
    return {f"{prefix}{_PATCHES}", f"{prefix}embeddings.text_embeddings.word_embeddings.weight"} <= shapes.keys()


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    prefix = _prefix(shapes)
    width, _, patch, _ = shapes[f"{prefix}{_PATCHES}"]
    if not config.get("qkv_bias", True):
        raise ValueError("ViLT checkpoint: config.json says qkv_bias false, which vlp's single_stream cannot be")
    stated = set(config) - {"preprocessor_config"}
    assumed = () if stated else ("no config.json: heads of width 64, gelu and epsilon 1e-12, as published",)
    side = math.isqrt(shapes[f"{prefix}embeddings.position_embeddings"][1] - 1) * patch
    preset, more = preset_of(config, vilt_preset(side))
    activation, eps = activation_of(config, "gelu"), config.get("layer_norm_eps", 1e-12)
    text = f"{prefix}embeddings.text_embeddings."
    tree = vilt_tree(
        width=width,
        heads=config.get("num_attention_heads", 12 if stated else max(1, width // 64)),
        layers=count_layers(shapes, rf"{prefix}encoder\.layer\.(\d+)\."),
        hidden=shapes[f"{prefix}encoder.layer.0.intermediate.dense.weight"][0],
        patch=patch,
        side=side,
        words=shapes[f"{text}word_embeddings.weight"][0],
        length=shapes[f"{text}position_embeddings.weight"][0],
        segments=shapes[f"{text}token_type_embeddings.weight"][0],
        modalities=shapes[f"{prefix}embeddings.token_type_embeddings.weight"][0],
        text={"eps": eps},
        fusion={"eps": eps, "activation": activation},
        objectives=_objectives(shapes, config, width, activation),
        preset=preset,
    )
    return Recipe(tree, (*assumed, *more))


def _objectives(shapes: Shapes, config: Mapping[str, Any], width: int, activation: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "mlm_score.transform.dense.weight" in shapes:
        tied = "mlm_score.decoder.weight" not in shapes  # the authors' are not, whatever config.json says
        found["mlm"] = {"whole_word": True, "tied": tied, "activation": activation}
    if "rank_output.weight" in shapes:
        found["rank"] = {}
    if _CLASSIFIER in shapes:
        number, hidden = shapes[_CLASSIFIER]
        head = {"kind": "answer", "answers": _answers(config, number), "hidden": hidden}
        pair = shapes["classifier.0.weight"][1] == _NUM_IMAGES * width
        found |= {"relate": {**head, "loss": "ce"}} if pair else {"answer": head}
    return found


def _answers(config: Mapping[str, Any], number: int) -> list[str]:
    """The labels of config.json; without them (or with transformers' LABEL_0) NLVR2's two verdicts, or numbers."""
    labels = {int(key): str(label) for key, label in (config.get("id2label") or {}).items()}
    named = any(label != f"LABEL_{key}" for key, label in labels.items())
    if set(labels) == set(range(number)) and named:
        return [labels[key] for key in range(number)]
    return list(RELATIONS) if number == len(RELATIONS) else numbered(number)


def names(prefix: str) -> tuple[Pair, ...]:
    """Return the names of the model without its heads."""
    layer = prefix + "encoder.layer.{n}."
    return (
        *embeddings(f"{prefix}embeddings.text_", "text."),
        Pair(
            f"{prefix}embeddings.token_type_embeddings.weight",
            "fusion.modality.weight",
            swap_modalities,
            swap_modalities,
        ),
        Pair(f"{prefix}embeddings.cls_token", "vision.vit.cls_token"),
        Pair(f"{prefix}embeddings.position_embeddings", "vision.vit.pos_embed"),
        Pair(f"{prefix}embeddings.patch_embeddings.projection.{{p}}", "vision.vit.patch_embed.proj.{p}"),
        *blocks(
            layer,
            "fusion.blocks.{n}.",
            {
                "layernorm_before": "attention_norm",
                "attention.attention.query": "attention.query",
                "attention.attention.key": "attention.key",
                "attention.attention.value": "attention.value",
                "attention.output.dense": "attention.out",
                "layernorm_after": "feed_norm",
                "intermediate.dense": "feed.up",
                "output.dense": "feed.down",
            },
        ),
        Pair(f"{prefix}layernorm.{{p}}", "fusion.final_norm.{p}"),
        Pair(f"{prefix}pooler.dense.{{p}}", "fusion.pooler.text.{p}"),
    )


_IGNORED = {r"(vilt\.)?embeddings\.text_embeddings\.(position|token_type)_ids": "counted"}


def mlm_names(objective: str) -> tuple[Pair, ...]:
    """Return the names of the head of an objective mlm."""
    head = f"objectives.{objective}.head."
    return (
        Pair("mlm_score.transform.dense.{p}", f"{head}dense.{{p}}"),
        Pair("mlm_score.transform.LayerNorm.{p}", f"{head}norm.{{p}}"),
        Pair("mlm_score.decoder.{p}", f"{head}decoder.{{p}}"),
    )


def rank_names(objective: str) -> tuple[Pair, ...]:
    """Return the names of the head of an objective rank."""
    return (Pair("rank_output.{p}", f"objectives.{objective}.head.{{p}}"),)


def answer_names(objective: str) -> tuple[Pair, ...]:
    """Return the names of the head of an objective answer, on one image or two."""
    return (Pair("classifier.{n}.{p}", f"objectives.{objective}.head.{{n}}.{{p}}"),)


def _rename(state: State) -> Renamed:
    prefix = _prefix(state)
    left = dict(_IGNORED)
    # transformers 4 stored the bias of the words twice, transformers 5 stores the decoder's alone.
    found, copies = without_copies(state, {"mlm_score.bias": "mlm_score.decoder.bias"})
    if "mlm_score.decoder.bias" in found:
        left[rf"{prefix}pooler\..+"] = "no head of the file reads it"
    pair = _CLASSIFIER in state and state["classifier.0.weight"].shape[1] > state[f"{prefix}{_PATCHES}"].shape[0]
    table = (*names(prefix), *mlm_names("mlm"), *rank_names("rank"), *answer_names("relate" if pair else "answer"))
    renamed = rename_read(table, found, left)
    return replace(renamed, ignored={**renamed.ignored, **copies})


FAMILY = Family("hf_vilt", _recognise, _recipe, _rename)
