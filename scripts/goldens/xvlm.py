"""zengyan-97/X-VLM: pretraining on images and on regions over three towers, retrieval, VQA, NLVR2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from encoders.types import Batch, Images, Texts
from objectives.base import WHOLE, Embed, Encode, Fuse, Pass
from scripts.goldens.albef import FALSE, contrast_draws, question_batch, shifted, texts
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.loaded import Loaded
from vlp.rank import rank_answers, share_probability

IMAGE, TEXT, PICTURE = Encode("image"), Encode("text"), Encode("image", WHOLE)
MASKED, BOXED = Fuse(text="masked"), Fuse(WHOLE, rows="box")


def config(case: Case) -> dict[str, Any]:
    """The authors' YAML, with the two files that it names."""
    return {**case.config, "text_config": case.config["_bert"], "vision_config": case.config["_vision"]}


def batch(case: Case, loaded: Loaded) -> Batch:
    given = case.inputs
    clean = Texts(given["text_ids"], given["text_atts"].bool())
    views = {"clean": clean}
    if "masked_ids" in given:
        labels = torch.full_like(clean.ids, -100)
        row, place = (given["masked_ids"] != -100).nonzero(as_tuple=True)
        labels[row, given["masked_pos"][row, place]] = given["masked_ids"][row, place]
        views["masked"] = Texts(given["text_ids_masked"], clean.keep, labels=labels)
    images, targets = Images(given["image"]), {}
    if "image_atts" in given:
        images = replace(images, owner=given["idx_to_group_img"], keep=given["image_atts"][:, 1:].bool())
        targets = {"box": given["target_bbox"], "has_box": given["is_image"] == 0}
    return Batch({"clean": images}, views, targets=targets, image_id=given.get("idx"))


def outputs(case: Case) -> Mapping[str, Output]:
    return {
        "image_embeds": lambda ran: ran[IMAGE].states,
        "image_embeds_fullatts": lambda ran: ran[PICTURE].states,
        "text_embeds": lambda ran: ran[TEXT].states,
        "image_feat": lambda ran: ran[Embed("image")],
        "text_feat": lambda ran: ran[Embed("text")],
        "itm_logits": lambda ran: torch.cat([ran.head("itm", ran[one].pooled) for one in (Fuse(), FALSE)]),
        "mlm_logits": lambda ran: ran.head("mlm", at_masked(ran)),
        "bbox_pred": lambda ran: ran.model.objectives["box"].boxes(ran[BOXED].pooled),
        "loss_itc": lambda ran: ran.loss("itc"),
        "loss_itm": lambda ran: ran.loss("itm"),
        "loss_mlm": lambda ran: ran.loss("mlm"),
        "loss_bbox": lambda ran: ran.losses["box"].metrics["l1"],
        "loss_giou": lambda ran: ran.losses["box"].metrics["giou"],
    }


def at_masked(ran: Ran) -> Tensor:
    """Fused states at the recorded places, padded ones included."""
    states, place = ran[MASKED].text.states, ran.case.inputs["masked_pos"]
    return states[torch.arange(len(states))[:, None], place]


def passes(case: Case) -> list[Pass]:
    found: list[Pass] = [IMAGE, TEXT, Embed("image"), Embed("text"), Fuse(), FALSE]
    found += [MASKED] if "masked_ids" in case.inputs else []
    return found + ([PICTURE, BOXED] if "image_atts" in case.inputs else [])


def keep(case: Case) -> dict[str, Tensor]:
    found = {"text_embeds": case.inputs["text_atts"].bool()}
    if "image_atts" in case.inputs:
        found["image_embeds"] = case.inputs["image_atts"].bool()
    return found


def wanted(case: Case) -> list[str] | None:
    """Batches of whole images have no boxes."""
    if "masked_ids" not in case.inputs:
        return None
    return ["itc", "itm", "mlm", *(["box"] if "image_atts" in case.inputs else [])]


CONTRAST = Adapter(batch, outputs, passes, keep, contrast_draws, config, objectives=wanted)


def verdict_batch(case: Case, loaded: Loaded) -> Batch:
    """All first images, then all second ones."""
    rows = torch.arange(len(case.inputs["targets"]))
    targets = {"answer_scores": torch.eye(2)[case.inputs["targets"]]}
    text = Texts(case.inputs["text_ids"], case.inputs["text_atts"].bool())
    pairs = torch.stack([rows, rows + len(rows)], 1)
    return Batch({"clean": Images(case.inputs["image"])}, {"clean": text}, pairs, targets)


VERDICT = Adapter(
    verdict_batch,
    lambda case: {
        "prediction": lambda ran: ran.head("answer", ran[Fuse()].pooled),
        "loss": lambda ran: ran.loss("answer"),
    },
    lambda case: [Fuse()],
    config=config,
)


def ranked(ran: Ran) -> tuple[Tensor, Tensor]:
    answers = texts(ran.case, "cand")
    answers = replace(answers, labels=shifted(answers.ids, answers.keep))
    return rank_answers(ran.model, ran[Fuse()].text, answers, 4)


VQA = Adapter(
    question_batch,
    lambda case: {
        "topk_ids": lambda ran: ranked(ran)[0],
        "topk_probs": lambda ran: share_probability(ranked(ran)[1]),
        "loss": lambda ran: ran.loss("lm"),
    },
    lambda case: [Fuse()],
    config=config,
)

ADAPTERS = {
    r"xvlm_pretrain_(swin|clip|deit)_(image|region)": CONTRAST,
    r"xvlm_retrieval": CONTRAST,
    r"xvlm_nlvr": VERDICT,
    r"xvlm_vqa": VQA,
}
