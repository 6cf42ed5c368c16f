"""ViLT (Kim et al. 2021) as its authors save it: a Lightning checkpoint of pretraining, VQA, NLVR2 or retrieval.

Sizes come from the weights; the number of heads is the one of ``config["num_heads"]``, else width / 64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlp.checkpoint.bert_stack import embeddings
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers
from vlp.checkpoint.names import Pair, rename_pairs
from vlp.data.presets import Preset
from vlp.data.presets import vilt as vilt_preset

POOLED_HEADS = ("itm_score", "rank_output", "vqa_classifier", "nlvr2_classifier", "snli_classifier")
"""Heads of ViLT and METER that read the pooled vector."""
RELATIONS = ("False", "True")
"""NLVR2: whether the text is true of the two images."""
ENTAILMENTS = ("contradiction", "neutral", "entailment")
"""SNLI-VE."""


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    return {"transformer.patch_embed.proj.weight", "transformer.blocks.0.mlp.fc1.weight"} <= shapes.keys() and (
        "text_embeddings.word_embeddings.weight" in shapes
    )


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    assumed: list[str] = []
    width, _, patch, _ = shapes["transformer.patch_embed.proj.weight"]
    side = math.isqrt(shapes["transformer.pos_embed"][1] - 1) * patch
    heads = num_heads(config, width, assumed)
    words, _ = shapes["text_embeddings.word_embeddings.weight"]
    length, _ = shapes["text_embeddings.position_embeddings.weight"]
    objectives = head_objectives(shapes, assumed)
    if "itm" in objectives:
        objectives["wra"] = {}
    tree = vilt_tree(
        width=width,
        heads=heads,
        layers=count_layers(shapes, r"transformer\.blocks\.(\d+)\."),
        hidden=shapes["transformer.blocks.0.mlp.fc1.weight"][0],
        patch=patch,
        side=side,
        words=words,
        length=length,
        segments=shapes["text_embeddings.token_type_embeddings.weight"][0],
        modalities=shapes["token_type_embeddings.weight"][0],
        fusion={"eps": 1e-6},
        objectives=objectives,
        preset=vilt_preset(side),
    )
    return Recipe(tree, tuple(assumed))


def vilt_tree(
    *,
    width: int,
    heads: int,
    layers: int,
    hidden: int,
    patch: int,
    side: int,
    words: int,
    length: int,
    segments: int,
    modalities: int,
    fusion: Mapping[str, Any],
    objectives: Mapping[str, Any],
    preset: Preset,
    text: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the recipe of a ViLT; ``side`` is that of the square which the stored positions are of."""
    vision = {"model": "vit_base_patch32_384", "image_size": preset.transform.side, "position_size": side}
    vision |= {"patch_size": patch, "width": width, "heads": heads, "depth": 0, "mean": preset.mean, "std": preset.std}
    stack = {"width": width, "heads": heads}
    return {
        "model": {
            "vision": vision | {"position_resize": "bilinear_corners"},
            "text": stack
            | {"layers": 0, "vocabulary_size": words, "max_length": length, "segments": segments, **(text or {})},
            "fusion": {
                "kind": "single_stream",
                **stack,
                "layers": layers,
                "hidden": hidden,
                "norm": "pre",
                "images": "each" if modalities > 2 else "one",
                **fusion,
            },
        },
        "objectives": dict(objectives),
        "data": {
            "max_length": length,
            "tokenizer": {"source": "bert-base-uncased"},
            "transform": preset.transform.model_dump(exclude_defaults=True, exclude={"image_size"}),
        },
    }


def num_heads(config: Mapping[str, Any], width: int, assumed: list[str]) -> int:
    """Return the number of attention heads, the published width / 64 where ``num_heads`` is not given."""
    if "num_heads" not in config:
        assumed.append(f"num_heads {max(1, width // 64)}")
    return int(config.get("num_heads", max(1, width // 64)))


def head_objectives(shapes: Shapes, assumed: list[str], word_head: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the objectives whose heads a ViLT or METER file holds, with the published settings."""
    found: dict[str, Any] = {}
    if "mlm_score.bias" in shapes:
        found["mlm"] = {"whole_word": True, "tied": False, **(word_head or {})}
    if "rank_output.weight" in shapes:
        found["rank"] = {}
    elif "itm_score.fc.weight" in shapes:
        found["itm"] = {"scheme": "replace_image", "exclude": "diagonal"}
    if "vqa_classifier.3.weight" in shapes:
        number = shapes["vqa_classifier.3.weight"][0]
        assumed.append("answers are numbered, as the file does not name them; give settings objectives.answer.answers")
        found["answer"] = {"answers": numbered(number), "hidden": shapes["vqa_classifier.0.weight"][0]}
    for head, name, answers in (("nlvr2", "relate", RELATIONS), ("snli", "entail", ENTAILMENTS)):
        if f"{head}_classifier.3.weight" in shapes:
            hidden = shapes[f"{head}_classifier.0.weight"][0]
            found[name] = {"kind": "answer", "answers": list(answers), "loss": "ce", "hidden": hidden}
    return found


def numbered(answers: int) -> list[str]:
    """Return stand-ins for answers whose words are unknown."""
    return [f"answer {number}" for number in range(answers)]


def swap_modalities(rows: Tensor) -> Tensor:
    """Text, image, second image -> image, text, second image, and back."""
    return torch.cat([rows[1:2], rows[:1], rows[2:]])


HEADS = (
    Pair("mlm_score.bias", "objectives.mlm.head.decoder.bias"),
    Pair("mlm_score.decoder.weight", "objectives.mlm.head.decoder.weight"),
    Pair("mlm_score.transform.dense.{p}", "objectives.mlm.head.dense.{p}"),
    Pair("mlm_score.transform.LayerNorm.{p}", "objectives.mlm.head.norm.{p}"),
    Pair("itm_score.fc.{p}", "objectives.itm.head.{p}"),
    Pair("rank_output.{p}", "objectives.rank.head.{p}"),
    Pair("vqa_classifier.{n}.{p}", "objectives.answer.head.{n}.{p}"),
    Pair("nlvr2_classifier.{n}.{p}", "objectives.relate.head.{n}.{p}"),
    Pair("snli_classifier.{n}.{p}", "objectives.entail.head.{n}.{p}"),
)
"""Names of the heads that ViLT and METER share."""
_BLOCK, _OURS = "transformer.blocks.{n}.", "fusion.blocks.{n}."
_NAMES = (
    *embeddings("text_", "text."),
    Pair("token_type_embeddings.weight", "fusion.modality.weight", swap_modalities, swap_modalities),
    Pair("transformer.cls_token", "vision.vit.cls_token"),
    Pair("transformer.pos_embed", "vision.vit.pos_embed"),
    Pair("transformer.patch_embed.proj.{p}", "vision.vit.patch_embed.proj.{p}"),
    Pair(f"{_BLOCK}norm1.{{p}}", f"{_OURS}attention_norm.{{p}}"),
    Pair(f"{_BLOCK}attn.qkv.{{p}}", tuple(f"{_OURS}attention.{part}.{{p}}" for part in ("query", "key", "value"))),
    Pair(f"{_BLOCK}attn.proj.{{p}}", f"{_OURS}attention.out.{{p}}"),
    Pair(f"{_BLOCK}norm2.{{p}}", f"{_OURS}feed_norm.{{p}}"),
    Pair(f"{_BLOCK}mlp.fc1.{{p}}", f"{_OURS}feed.up.{{p}}"),
    Pair(f"{_BLOCK}mlp.fc2.{{p}}", f"{_OURS}feed.down.{{p}}"),
    Pair("transformer.norm.{p}", "fusion.final_norm.{p}"),
    Pair("pooler.dense.{p}", "fusion.pooler.text.{p}"),
    *HEADS,
)
_IGNORED = {r"text_embeddings\.position_ids": "counted", r"mpp_score\..+": "masked patch prediction is not read"}


def heads_left_out(names: Iterable[str], poolers: str) -> dict[str, str]:
    """Return patterns of the names that nothing reads -> reason; ``poolers`` is the pattern of the pooled vector's."""
    begins = {name.split(".")[0] for name in names}
    left = {}
    if "rank_output" in begins:
        # set_task of ViLT runs losses of weight >= 1 only, and retrieval's itm weighs 0.5: the head is as pretrained.
        left[r"itm_score\..+"] = "rank_output began as its row 1, and retrieval trains that one"
    if "mlm_score" in begins and not begins & set(POOLED_HEADS):
        left[poolers] = "no head of the file reads it"
    return left


def rename_read(table: Sequence[Pair], state: State, left: Mapping[str, str]) -> Renamed:
    """Rename by ``table`` all weights but those ``left`` out: pattern of their names -> reason."""
    ignored = {name: reason for pattern, reason in left.items() for name in state if re.fullmatch(pattern, name)}
    found = rename_pairs(table, {name: tensor for name, tensor in state.items() if name not in ignored})
    return replace(found, ignored=ignored)


def _rename(state: State) -> Renamed:
    return rename_read(_NAMES, state, _IGNORED | heads_left_out(state, r"pooler\..+"))


FAMILY = Family("vilt", _recognise, _recipe, _rename)
