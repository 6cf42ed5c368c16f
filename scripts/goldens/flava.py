"""FLAVA's cases, transformers' and torchmultimodal's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from encoders.types import Batch, Images, Texts
from objectives.base import Embed, Encode, Fuse, Pass
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.loaded import Loaded

IMAGE, TEXT, FUSED = Encode("image"), Encode("text"), Fuse()
IMAGE_MASKED, TEXT_MASKED, FUSED_MASKED = Encode("image", "masked"), Encode("text", "masked"), Fuse("masked", "masked")
EMBEDS = (Embed("image"), Embed("text"))


def _images(given: Mapping[str, Tensor]) -> dict[str, Images]:
    pixels = given.get("pixel_values", given.get("image"))
    if pixels is None:
        return {}
    hidden = given.get("bool_masked_pos", given.get("image_patches_mask"))
    if hidden is None:
        return {"clean": Images(pixels)}
    names = {"codebook_pixel_values": "codebook_pixels", "codes": "codes"}
    targets = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    return {"clean": Images(pixels), "masked": Images(pixels, masked=hidden.flatten(1), targets=targets)}


def _texts(given: Mapping[str, Tensor], pad: int = 0) -> dict[str, Texts]:
    ids = given.get("input_ids", given.get("text"))
    if ids is None:
        return {}
    keep = given["attention_mask"].bool() if "attention_mask" in given else ids != pad
    texts = {"clean": Texts(ids, keep)}
    masked = given.get("input_ids_masked", given.get("text_masked"))
    if masked is not None:
        labels = given["mlm_labels"]
        texts["masked"] = Texts(masked, keep, labels=torch.where(labels < 0, -100, labels))
    return texts


def _batch(case: Case, loaded: Loaded) -> Batch:
    given = case.inputs
    targets = {"match": given["itm_labels"]} if "itm_labels" in given else {}
    return Batch(_images(given), _texts(given, case.config.get("pad_token_id", 0)), targets=targets)


def _true(ran: Ran) -> Tensor:
    return ran.case.inputs["itm_labels"] != 0


def _joint(ran: Ran, wanted: Fuse) -> Tensor:
    return torch.cat([ran[wanted].image.states, ran[wanted].text.states], 1)


def _patches(ran: Ran, objective: str, states: Tensor, rows: Tensor | None = None) -> Tensor:
    """Scores of the hidden patches of these rows."""
    hidden = ran.batch.images["masked"].masked
    chosen = hidden if rows is None else hidden & rows[:, None]
    return ran.head(objective, states[:, -hidden.shape[1] :][chosen])


def _words(ran: Ran, objective: str, states: Tensor, rows: Tensor | None = None) -> Tensor:
    """Scores of the hidden words of these rows."""
    hidden = ran.batch.texts["masked"].labels != -100
    return ran.head(objective, states[hidden if rows is None else hidden & rows[:, None]])


def _codes(ran: Ran) -> Tensor:
    hidden = ran.case.inputs["bool_masked_pos"]
    return ran.model.codebook.codes(ran.batch.images["masked"], hidden.shape[1:]).unflatten(1, hidden.shape[1:])


def _logits(ran: Ran) -> Tensor:
    return ran.model.space().logits(ran[EMBEDS[0]], ran[EMBEDS[1]])


def _projected(side: str, states: Tensor, ran: Ran) -> Tensor:
    return ran.model.space().project(side, states)


def _loss(*names: str) -> Output:
    return lambda ran: ran.loss(*names)


_MODEL: dict[str, Output] = {
    "image_embeddings": lambda ran: ran[IMAGE].states,
    "text_embeddings": lambda ran: ran[TEXT].states,
    "multimodal_embeddings": lambda ran: _joint(ran, FUSED),
    "image_pooler": lambda ran: ran[IMAGE].pooled,
    "text_pooler": lambda ran: ran[TEXT].pooled,
    "multimodal_pooler": lambda ran: ran[FUSED].pooled,
    "image_features": lambda ran: _projected("image", ran[IMAGE].states, ran),
    "text_features": lambda ran: _projected("text", ran[TEXT].states, ran),
}
_PRETRAINING: dict[str, Output] = {
    **_MODEL,
    "loss": lambda ran: ran.loss(*ran.losses),
    "codebook_indices": _codes,
    "itm_logits": lambda ran: ran.head("itm", ran[FUSED_MASKED].pooled),
    "mmm_image_logits": lambda ran: _patches(ran, "mmm_image", ran[FUSED_MASKED].image.states, _true(ran)),
    "mmm_text_logits": lambda ran: _words(ran, "mmm_text", ran[FUSED_MASKED].text.states, _true(ran)),
    "mim_logits": lambda ran: _patches(ran, "mim", ran[IMAGE_MASKED].states),
    "mlm_logits": lambda ran: _words(ran, "mlm", ran[TEXT_MASKED].states),
    "contrastive_logits_per_image": lambda ran: _logits(ran)[_true(ran)],
    "contrastive_logits_per_text": lambda ran: _logits(ran).T[_true(ran)],
    "image_masked_embeddings": lambda ran: ran[IMAGE_MASKED].states,
    "text_masked_embeddings": lambda ran: ran[TEXT_MASKED].states,
    "multimodal_masked_embeddings": lambda ran: _joint(ran, FUSED_MASKED)[_true(ran)],
    **{f"loss_{name}": _loss(name) for name in ("itm", "mim", "mlm", "mmm_image", "mmm_text")},
    "loss_global_contrastive": _loss("itc"),
}
_AUTHORS: dict[str, Output] = {
    **_PRETRAINING,
    "image_sequence": lambda ran: ran[IMAGE].states,
    "text_sequence": lambda ran: ran[TEXT].states,
    "multimodal_masked": lambda ran: _joint(ran, FUSED_MASKED),
    "projected_image": lambda ran: _projected("image", ran[IMAGE].states[:, 0], ran),
    "projected_text": lambda ran: _projected("text", ran[TEXT].states[:, 0], ran),
}


def _passes(case: Case) -> list[Pass]:
    """What the recorded inputs suffice for."""
    image, text = bool(_images(case.inputs)), bool(_texts(case.inputs))
    found: list[Pass] = []
    for view in _images(case.inputs) or _texts(case.inputs):
        found += [Encode("image", view)] if image else []
        found += [Encode("text", view)] if text else []
        found += [Fuse(view, view)] if image and text else []
    return [*found, *(EMBEDS if image and text else ())]


def _keep(case: Case) -> dict[str, Tensor]:
    texts = _texts(case.inputs)
    if not texts:
        return {}
    keep = texts["clean"].keep
    found = dict.fromkeys(("text_embeddings", "text_features", "text_masked_embeddings", "text_sequence"), keep)
    wide = case.outputs.get("multimodal_embeddings", case.outputs.get("multimodal_masked"))
    if wide is not None:
        shown = torch.ones(len(keep), wide.shape[1] - keep.shape[1], dtype=torch.bool)
        found |= dict.fromkeys(("multimodal_embeddings", "multimodal_masked"), torch.cat([shown, keep], 1))
    if "multimodal_masked_embeddings" in case.outputs:
        true = keep[case.inputs["itm_labels"] != 0]
        shown = torch.ones(len(true), case.outputs["multimodal_masked_embeddings"].shape[1] - true.shape[1]).bool()
        found["multimodal_masked_embeddings"] = torch.cat([shown, true], 1)
    return found


ADAPTERS: dict[str, Adapter] = {
    "hf_flava": Adapter(_batch, lambda case: _MODEL, passes=_passes, keep=_keep, objectives=lambda case: ()),
    "hf_flava_pretrain.*": Adapter(_batch, lambda case: _PRETRAINING, passes=_passes, keep=_keep),
    "tmm_flava_.*": Adapter(_batch, lambda case: _AUTHORS, passes=_passes, keep=_keep),
}
