"""transformers' BridgeTower."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from encoders.types import Batch, Images, Modality, Texts
from objectives.base import Embed, Encode, Fuse, Pass
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.loaded import Loaded

CLEAN, MASKED, PAIRS = Fuse(), Fuse(text="masked"), Fuse(rows="itm")
_LAYERS = range(12)


def _batch(case: Case, loaded: Loaded) -> Batch:
    given = case.inputs
    text = Texts(given["input_ids"], given["attention_mask"].bool())
    texts, index = {"clean": text}, None
    if "mlm" in loaded.model.objectives:
        texts["masked"] = Texts(text.ids, text.keep, labels=given.get("labels"))
    if "itm" in loaded.model.objectives:  # every text stands beside its own image, or beside another's
        own = torch.arange(len(text.ids))
        index = torch.where(given["labels"] == 1, own, own.roll(1)) if "labels" in given else own
    return Batch({"clean": Images(given["pixel_values"])}, texts, index)  # which has no padding there


def _draws(case: Case) -> dict[str, Tensor]:
    labels = case.inputs.get("labels")
    if labels is None or labels.dim() > 1:
        return {}
    return {"itm.replace": labels == 0, "itm.image": torch.arange(len(labels))}


def _passes(case: Case) -> list[Pass]:
    labels = case.inputs.get("labels")
    if labels is not None:
        return [MASKED if labels.dim() > 1 else PAIRS]
    return [CLEAN, Encode("image"), Encode("text"), *([Embed("image"), Embed("text")] if _contrasts(case) else [])]


def _contrasts(case: Case) -> bool:
    return "cross_embeds" in case.outputs


def _pair(ran: Ran) -> Tensor:
    return ran.head("fused_itc", ran[CLEAN].pooled, "embed")


def _logits(ran: Ran) -> Tensor:
    if "mlm" in ran.model.objectives:
        return ran.head("mlm", ran[MASKED].text.states)
    if "itm" in ran.model.objectives:
        return ran.head("itm", ran[PAIRS].pooled)
    return torch.stack([ran[Embed("text")], ran[Embed("image")], _pair(ran)], 1)


def _tower(ran: Ran, side: Modality, layer: int) -> Tensor:
    return ran[Encode(side)].layers[layer]


def _tokens_first(ran: Ran, layer: int) -> Tensor:
    """As they stand there: [N, B, D]."""
    return _tower(ran, "image", layer).transpose(0, 1)


def _stream(ran: Ran, side: str, layer: int) -> Tensor:
    return getattr(ran[CLEAN], side).layers[layer + 1]


_OUTPUTS: dict[str, Output] = {
    "loss": lambda ran: ran.loss(*ran.model.objectives),
    "logits": _logits,
    "text_embeds": lambda ran: ran[Embed("text")],
    "image_embeds": lambda ran: ran[Embed("image")],
    "cross_embeds": _pair,
    "text_features": lambda ran: ran[CLEAN].text.states,
    "image_features": lambda ran: ran[CLEAN].image.states,
    "pooler_output": lambda ran: ran[CLEAN].pooled,
    **{f"text_hidden_states.{n}": partial(_tower, side="text", layer=n) for n in _LAYERS},
    **{f"image_hidden_states.{n}": partial(_tokens_first, layer=n) for n in _LAYERS},
    **{f"cross_{side}.{n}": partial(_stream, side=side, layer=n) for side in ("text", "image") for n in _LAYERS},
}


def _keep(case: Case) -> Mapping[str, Tensor]:
    words = case.inputs["attention_mask"].bool()
    names = ["text_features", *(f"{name}.{n}" for name in ("text_hidden_states", "cross_text") for n in _LAYERS)]
    if "logits" in case.outputs and case.outputs["logits"].shape[:2] == words.shape and not _contrasts(case):
        names.append("logits")
    return {name: words for name in names if name in case.outputs}


ADAPTERS = {r"hf_bridgetower.*": Adapter(_batch, lambda case: _OUTPUTS, _passes, _keep, _draws)}
