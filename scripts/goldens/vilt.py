"""The cases of ViLT: the authors' and transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from encoders.types import Batch, Images, Texts
from objectives.base import Fuse
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.loaded import Loaded

CLEAN, MASKED, PAIRS, RANKED = Fuse(), Fuse(text="masked"), Fuse(rows="itm"), Fuse(rows="rank")
_LOSSES = {"loss_mlm": "mlm", "loss_itm": "itm", "loss_itm_wpa": "wra", "loss_irtr": "rank"}
_LOSSES |= {"loss_vqa": "answer", "loss_nlvr2": "relate"}


def pixels_of(given: Mapping[str, Tensor]) -> Tensor:
    """The authors' images behind each other: own, second or false ones."""
    names = ("image.0", "image_0.0", "image_1.0", "false_image_0.0")
    return torch.cat([given[name] for name in names if name in given])


def texts_of(given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and mask of the authors' texts, false ones behind the own."""
    prefixes = [prefix for prefix in ("text", "false_text_0", "false_text_1") if f"{prefix}_ids" in given]
    ids, masks = (torch.cat([given[f"{prefix}_{part}"] for prefix in prefixes]) for part in ("ids", "masks"))
    return ids, masks.bool()


def index_of(given: Mapping[str, Tensor], texts: int) -> Tensor | None:
    """Image of each text: a false text counts as another image's."""
    own = torch.arange(len(given["text_ids"]))
    if "image_1.0" in given:
        return torch.stack([own, own + len(own)], 1)
    false = [own.roll(-number) for number in range(1, texts // len(own))]
    return torch.cat([own, *false]) if false or "false_image_0.0" in given else None


def authors_batch(case: Case, loaded: Loaded, patch: int | None = None) -> Batch:
    """The recorded inputs of a case of ViLT's or METER's authors; with ``patch`` images are zero at padding."""
    given = case.inputs
    ids, keep = texts_of(given)
    pixels = pixels_of(given)
    shown = None if patch is None else (pixels != 0).any(1)[:, ::patch, ::patch].flatten(1)
    texts = {"clean": Texts(ids, keep)}
    if "loss_mlm" in case.outputs:
        texts["masked"] = Texts(given["text_ids_mlm"], keep, labels=given["text_labels_mlm"])
    targets: dict[str, Tensor] = {}
    if "vqa_targets" in case.outputs:
        targets["answer_scores"] = case.outputs["vqa_targets"]
    if "answers" in given:
        targets["answer_scores"] = torch.eye(2)[given["answers"]]
    return Batch({"clean": Images(pixels, shown)}, texts, index_of(given, len(ids)), targets)


def authors_draws(case: Case) -> dict[str, Tensor]:
    """Which images are replaced by which, and the false texts of each image."""
    own = torch.arange(len(case.inputs["text_ids"]))
    if "loss_irtr" in case.outputs:
        return {"rank.own": own, "rank.false": torch.stack([own + len(own), own + 2 * len(own)], 1).flatten()}
    if "replay.itm_perm" not in case.inputs:
        return {}
    return {"itm.replace": case.inputs["replay.itm_perm"] >= len(own) // 2, "itm.image": own + len(own)}


def authors_passes(case: Case) -> list[Fuse]:
    """What the recorded outputs are read from."""
    found = {"mlm_logits": MASKED, "itm_logits": PAIRS, "score": RANKED}
    return [one for name, one in found.items() if name in case.outputs] or [CLEAN]


def authors_objectives(case: Case) -> list[str]:
    """The objectives whose losses were recorded."""
    return [name for output, name in _LOSSES.items() if output in case.outputs]


def authors_settings(case: Case) -> dict[str, object]:
    """As many false texts as were drawn."""
    return {"objectives": {"rank": {"negatives": 2}}} if "loss_irtr" in case.outputs else {}


HEADS: dict[str, Output] = {
    "mlm_logits": lambda ran: ran.head("mlm", ran[MASKED].text.states),
    "mlm_labels": lambda ran: ran.case.inputs["text_labels_mlm"],
    "mlm_ids": lambda ran: ran.batch.texts["masked"].ids,
    "itm_logits": lambda ran: ran.head("itm", ran[PAIRS].pooled),
    "itm_labels": lambda ran: (ran.results.rows["itm"].image_index < len(ran.batch.texts["clean"].ids)).float(),
    "score": lambda ran: ran.head("rank", ran[RANKED].pooled),
    "vqa_logits": lambda ran: ran.head("answer", ran[CLEAN].pooled),
    "vqa_targets": lambda ran: ran.batch.targets["answer_scores"],
    "nlvr2_logits": lambda ran: ran.head("relate", ran[CLEAN].pooled),
    "nlvr2_labels": lambda ran: ran.batch.targets["answer_scores"].argmax(1),
}
"""Outputs of the heads and their labels, as ViLT's and METER's authors name them."""


def _loss(name: str) -> Output:
    return lambda ran: ran.loss(name)


LOSSES: dict[str, Output] = {output: _loss(name) for output, name in _LOSSES.items()}


def text_keep(case: Case) -> Tensor:
    """[B, L] of the texts."""
    return case.inputs["text_masks" if "text_masks" in case.inputs else "attention_mask"].bool()


# ViLT takes the patches that hold image in their order, then draws some at padding; here all stay where they are.


def _chosen(ran: Ran) -> Tensor:
    """[B, 1 + P] positions of the reference's image tokens among ours."""
    rows, columns = ran.case.outputs["patch_index"].unbind(-1)
    return torch.cat([torch.zeros_like(rows[:, :1]), 1 + rows * _grid(ran)[1] + columns], 1)


def _grid(ran: Ran) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = pixels_of(ran.case.inputs).shape[2:]
    return height // ran.case.config["patch_size"], width // ran.case.config["patch_size"]


def _image(ran: Ran, states: Tensor) -> Tensor:
    """Our image states in the reference's order."""
    return states.take_along_dim(_chosen(ran)[..., None], 1)


def _joint(ran: Ran, layer: int) -> Tensor:
    """States of a layer, text first."""
    fused = ran[CLEAN]
    return torch.cat([fused.text.layers[layer], _image(ran, fused.image.layers[layer])], 1)


def _infer_keep(case: Case) -> dict[str, Tensor]:
    if "image_masks" not in case.outputs:
        return {"mlm_logits": text_keep(case)} if "mlm_logits" in case.outputs else {}
    text, image = text_keep(case), case.outputs["image_masks"].bool()
    found = {"text_feats": text, "image_feats": image, "patch_index": image[:, 1:]}
    return found | {f"block.{n}": torch.cat([text, image], 1) for n in range(3)}


def _patch_index(ran: Ran) -> Tensor:
    """Row and column of the patches at the chosen positions."""
    every = torch.cartesian_prod(*(torch.arange(size) for size in _grid(ran)))
    return every[_chosen(ran)[:, 1:] - 1]


_OUTPUTS: dict[str, Output] = {
    "text_feats": lambda ran: ran[CLEAN].text.states,
    "image_feats": lambda ran: _image(ran, ran[CLEAN].image.states),
    "cls_feats": lambda ran: ran[CLEAN].pooled,
    "raw_cls_feats": lambda ran: ran[CLEAN].text.states[:, 0],
    "image_masks": lambda ran: ran[CLEAN].image.keep.take_along_dim(_chosen(ran), 1).long(),
    "patch_index": _patch_index,
    **{f"block.{n}": partial(_joint, layer=n + 1) for n in range(3)},
    **HEADS,
    **LOSSES,
}

# transformers' port takes the patches in the same way, but does not say which.


def _hf_batch(case: Case, loaded: Loaded) -> Batch:
    given, patch = case.inputs, case.config["patch_size"]
    pixels, mask = given["pixel_values"], given["pixel_mask"].bool()
    index = None
    if pixels.dim() == 5:  # two images a text
        index = torch.arange(pixels.shape[0] * pixels.shape[1]).view(pixels.shape[:2])
        pixels, mask = pixels.flatten(0, 1), mask.flatten(0, 1)
    text = Texts(given["input_ids"], given["attention_mask"].bool(), segments=given["token_type_ids"])
    texts, targets, labels = {"clean": text}, {}, given.get("labels")
    if labels is not None and "mlm" in loaded.model.objectives:
        texts["masked"] = replace(text, labels=labels)
    elif labels is not None:
        targets["answer_scores"] = labels if labels.is_floating_point() else torch.eye(2)[labels]
    return Batch({"clean": Images(pixels, mask[:, ::patch, ::patch].flatten(1))}, texts, index, targets)


def _hf_joint(ran: Ran, layer: int | None = None) -> Tensor:
    """States of a layer (None: after the norm): text, then image tokens, those at padding behind."""
    fused = ran[CLEAN]
    text, image = (side.states if layer is None else side.layers[layer] for side in (fused.text, fused.image))
    order = (~fused.image.keep).int().argsort(stable=True)[..., None]
    joint = torch.cat([text, image.take_along_dim(order, 1)], 1)
    return joint[:, : ran.case.outputs["joint_mask"].shape[1]]


def _hf_logits(ran: Ran) -> Tensor:
    (name,) = ran.model.objectives
    return ran.head(name, ran[MASKED].text.states if name == "mlm" else ran[CLEAN].pooled)


def _hf_keep(case: Case) -> dict[str, Tensor]:
    if "joint_mask" in case.outputs:
        names = ("last_hidden_state", *(f"hidden_states.{n}" for n in range(case.config["num_hidden_layers"] + 1)))
        return dict.fromkeys(names, case.outputs["joint_mask"].bool())
    words = case.outputs["logits"].shape[:2] == case.inputs["input_ids"].shape
    return {"logits": text_keep(case)} if words else {}


def _hf_outputs(case: Case) -> Mapping[str, Output]:
    layers = range(case.config["num_hidden_layers"] + 1)
    return {
        "last_hidden_state": _hf_joint,
        "pooler_output": lambda ran: ran[CLEAN].pooled,
        "joint_mask": _hf_mask,
        **{f"hidden_states.{n}": partial(_hf_joint, layer=n) for n in layers},
        "logits": _hf_logits,
        "loss": lambda ran: ran.loss(*ran.model.objectives),
    }


def _hf_mask(ran: Ran) -> Tensor:
    """1 = real, padding of the image behind."""
    text, image = ran[CLEAN].text.keep, ran[CLEAN].image.keep
    joint = torch.cat([text, image.int().sort(descending=True, stable=True).values.bool()], 1)
    return joint[:, : ran.case.outputs["joint_mask"].shape[1]].long()


ADAPTERS = {
    r"vilt_(?!posembed).*": Adapter(
        batch=lambda case, loaded: authors_batch(case, loaded, case.config["patch_size"]),
        outputs=lambda case: _OUTPUTS,
        passes=authors_passes,
        keep=_infer_keep,
        draws=authors_draws,
        settings=authors_settings,
        objectives=authors_objectives,
    ),
    r"hf_vilt.*": Adapter(
        batch=_hf_batch,
        outputs=_hf_outputs,
        passes=lambda case: [MASKED if "ForMaskedLM" in case.meta["reference"] else CLEAN],
        keep=_hf_keep,
        objectives=lambda case: None if "loss" in case.outputs else (),
    ),
}
