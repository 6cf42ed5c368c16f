"""BLIP's own checkpoints (Li et al. 2022): pretraining, retrieval and matching, captioning, VQA, NLVR2, features.

One BERT stack with cross-attention in every layer is text tower (cross-attention skipped), fusion, and, in pretraining,
all of the decoder but its self-attention; finetuned files hold those parts of it that their task needs, the decoder on
its own. What a file does not say are the heads of the attentions and how it was trained; ``config=`` takes the authors'
own keys: those of their YAML, with ``med_config`` (the content of med_config.json) and ``vit`` (arguments of their
VisionTransformer) as mappings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from vlp.checkpoint.albef import SIDES, VISION, VIT, bert_recipe, vit_recipe
from vlp.checkpoint.bert_stack import (
    LAYER,
    Stack,
    decoder_stack,
    embeddings,
    read_stack,
    split_stack,
    without_copies,
    word_head,
    word_head_copies,
)
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, names_there
from vlp.checkpoint.names import Pair, blocks, rename_pairs
from vlp.data.presets import albef_blip

ENCODER, DECODER = "text_encoder.", "text_decoder.bert."
WORDS = "embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions."
_MERGE_FROM = 6
"""NLVR2: the first layer whose two cross-attentions are merged by a linear layer."""
TEMPERATURE = 0.07
PUBLISHED_WORDS = 30_524
"""bert-base-uncased's 30,522, [DEC] and [ENC]."""
_A_PICTURE_OF = (1037, 3861, 1997)
"""The prompt of the published captioning models in that vocabulary."""
TOKENIZER = {"source": "bert-base-uncased", "added_tokens": ["[DEC]", "[ENC]"], "bos_token": "[DEC]"}
_IGNORED = {
    r"text_(encoder|decoder)(_m)?\.(bert\.)?embeddings\.position_ids": "counted anew",
    r"text_encoder(_m)?\.pooler\..*": "of BERT, never used",
}
_TWINS: dict[str | tuple[str, ...], str | tuple[str, ...]] = {
    f"crossattention.{theirs}": f"cross.twins.{place}.{ours}"
    for place in (0, 1)
    for theirs, ours in (
        (f"self{place}.query", "query"),
        (f"self{place}.key", "key"),
        (f"self{place}.value", "value"),
        (f"output.dense{place}", "out"),
    )
}
_TWINS |= {"crossattention.output.LayerNorm": "cross_norm", "crossattention.output.merge_layer": "cross.merge"}


def recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    """Whether a file is BLIP's: unlike ALBEF's, its texts have no token types and every layer cross-attention."""
    return f"{VISION}.pos_embed" in shapes and any(
        f"{part}{WORDS}" in shapes and f"{part}embeddings.token_type_embeddings.weight" not in shapes
        for part in (ENCODER, DECODER)
    )


def recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    """Return what a file is in our words."""
    encodes, decodes = ENCODER + WORDS in shapes, DECODER + WORDS in shapes
    text = read_stack(shapes, ENCODER if encodes else DECODER)
    vision, assumed = vit_recipe(shapes, VISION, _mapping(config, "vit"))
    stack, more = bert_recipe(text, {"bert_config": _mapping(config, "med_config")})
    notes = [*assumed, *more]
    model: dict[str, Any] = {
        "vision": vision,
        "text": text_recipe(text, stack) | {"fused_first": _fused_first(shapes, text, notes) if encodes else None},
        "fusion": {"kind": "none"},
        "momentum": config.get("momentum", 0.995),
    }
    if encodes:
        model["fusion"] = {"kind": "dual_stream", "attention": "cross", **stack, "layers": text.layers}
    if _two_images(shapes):
        model["fusion"] |= {"images": "parallel", "merge_from": _MERGE_FROM}
    if "vision_proj.weight" in shapes:
        model["embed"] = {"width": shapes["vision_proj.weight"][0], "temperature": TEMPERATURE}
    if decodes:
        layers = read_stack(shapes, DECODER).layers
        shared = "embeddings" if not encodes else "all_but_self_attention" if _pretrained(shapes) else "none"
        memory = "text" if shared == "none" else "image"
        model["decoder"] = {"kind": "causal", **stack, "layers": layers, "share": shared, "memory": memory}
    objectives = _objectives(shapes, config, text, notes)
    return Recipe({"model": model, "objectives": objectives, "data": _data(shapes, vision)}, tuple(notes))


def text_recipe(text: Stack, stack: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text encoder of a BLIP: bare embeddings, as the fusion is the tower."""
    sizes = {"vocabulary_size": text.vocabulary, "max_length": text.positions, "segments": text.segments}
    return {"kind": "text", **stack, "layers": 0, **sizes, "padding_id": 0}


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of the authors' configuration; in their YAML it may be a name or a path."""
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


def _two_images(shapes: Shapes) -> bool:
    return f"{ENCODER}encoder.layer.0.crossattention.self0.key.weight" in shapes


def _pretrained(shapes: Shapes) -> bool:
    """Whether a file holds all losses, so that encoder and decoder share their weights."""
    return DECODER + WORDS in shapes and "itm_head.weight" in shapes


def _fused_first(shapes: Shapes, text: Stack, notes: list[str]) -> int | None:
    """[ENC], the last word, begins what is fused; BLIP_ITM alone, whose files hold no temperature, keeps [CLS]."""
    if "itm_head.weight" in shapes and "temp" not in shapes:
        notes.append("texts begin with [CLS] when matched, as in BLIP_ITM; model.text.fused_first names [ENC]")
        return None
    return text.vocabulary - 1


def _objectives(shapes: Shapes, config: Mapping[str, Any], text: Stack, notes: list[str]) -> dict[str, Any]:
    """The losses whose heads the file holds."""
    found: dict[str, Any] = {}
    rule = "diagonal" if _pretrained(shapes) else "id"
    if "vision_proj.weight" in shapes:
        found["itc"] = {"positives": rule, "min_scale": 2.0, "max_scale": 1000.0}
        found["itc"] |= {"queue": shapes.get("image_queue", (0, 0))[1]}
        if f"{VISION}_m.pos_embed" in shapes:
            found["itc"] |= {"distill": config.get("alpha", 0.4)}
        if "temp" not in shapes:
            notes.append(f"temperature {TEMPERATURE}")
    if "itm_head.weight" in shapes:
        found["itm"] = {"exclude": rule, "floor": 1e-4 if _pretrained(shapes) else 0.0, "score": "logit"}
        if config.get("negative_all_rank"):
            found["itm"] |= {"candidates": "global"}
    if HEAD + "transform.dense.weight" in shapes:
        found["lm"] = {"label_smoothing": 0.1}
        if ENCODER + WORDS not in shapes and text.vocabulary == PUBLISHED_WORDS:
            found["lm"] |= {"prompt": _A_PICTURE_OF}
            notes.append('captions begin with "a picture of" (objectives.lm.prompt)')
        if ENCODER + WORDS in shapes and not _pretrained(shapes):
            found["lm"] |= {"memory": "fused", "view": "lm:answer", "mean": "texts"}
    if "cls_head.0.weight" in shapes:
        found["answer"] = {"answers": ["False", "True"], "loss": "ce", "head": "relu"}
    return found


def _data(shapes: Shapes, vision: Mapping[str, Any]) -> dict[str, Any]:
    question = DECODER + WORDS in shapes and ENCODER + WORDS in shapes and not _pretrained(shapes)
    return {
        "max_length": 30 if _pretrained(shapes) else 35 if ENCODER + WORDS in shapes else 40,
        "tokenizer": TOKENIZER | {"clean": "blip_question" if question else "blip", "max_words": 50},
        "transform": albef_blip(vision["image_size"]).transform.model_dump(exclude_defaults=True),
    }


def table(shapes: Shapes) -> tuple[Pair, ...]:
    """Return the names of a file's weights there and here."""
    pairs: list[Pair] = []
    for twin, ours in (("", ""), ("_m", "teacher.")):
        pairs += [
            Pair(f"{VISION}{twin}.{name}", f"{ours}vision.vit.{name}") for name in ("cls_token", "pos_embed", *VIT)
        ]
        pairs += [Pair(f"{side}_proj{twin}.{{p}}", f"{ours}embed.main.{mine}.{{p}}") for side, mine in SIDES]
        prefix = f"text_encoder{twin}."
        if _two_images(shapes):
            layers = blocks(f"{prefix}encoder.layer.{{n}}.", f"{ours}fusion.blocks.{{n}}.", {**LAYER, **_TWINS})
            pairs += [*embeddings(prefix, f"{ours}text."), *layers]
        elif prefix + WORDS in shapes:
            pairs += split_stack(prefix, ours, read_stack(shapes, prefix).layers, 0)
    pairs += [*decoder_stack(DECODER, "decoder."), *word_head(HEAD, "objectives.lm.head.")]
    return (*pairs, *_ALONE)


_ALONE = (
    Pair("itm_head.{p}", "objectives.itm.head.{p}"),
    Pair("cls_head.{n}.{p}", "objectives.answer.head.{n}.{p}"),
    Pair(
        "temp",
        "embed.main.logit_scale",
        to_ours=lambda temperature: -temperature.log().reshape(1),
        to_theirs=lambda scale: (-scale).exp().reshape(()),
    ),
    Pair("image_queue", "objectives.itc.queue.image", to_ours=lambda x: x.T, to_theirs=lambda x: x.T),
    Pair("text_queue", "objectives.itc.queue.text", to_ours=lambda x: x.T, to_theirs=lambda x: x.T),
    Pair("queue_ptr", "objectives.itc.queue.pointer"),
    Pair("ptr_queue", "objectives.itc.queue.pointer"),
    Pair("idx_queue", "objectives.itc.queue.image_id", lambda x: x.reshape(-1), lambda x: x.reshape(1, -1)),
)


def _copies(state: State) -> dict[str, str]:
    """What a file stores twice: tied words, and in pretraining all that encoder and decoder share."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if not _pretrained(shapes):
        return word_head_copies(HEAD, DECODER + WORDS)
    found = {
        name: ENCODER + name.removeprefix(DECODER)
        for name in state
        if name.startswith(DECODER) and ".attention." not in name and "position_ids" not in name
    }
    return found | word_head_copies(HEAD, ENCODER + WORDS)


def rename(state: State) -> Renamed:
    """Rename a file's weights to ours."""
    whole, left = without_copies(state, _copies(state))
    found = rename_pairs(table({name: tuple(tensor.shape) for name, tensor in whole.items()}), whole, _IGNORED)
    if "vision_proj.weight" in whole and "temp" not in whole:
        found.state["embed.main.logit_scale"] = torch.tensor([-math.log(TEMPERATURE)])
    return Renamed(found.state, found.ignored | left, names_there(found.unexpected, whole, state))


FAMILY = Family("blip", recognise, recipe, rename)
