"""VLMo's cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from encoders.types import Batch, Images, Texts
from objectives.base import Embed, Encode, Fuse
from objectives.itc import similarities
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.fusion.multiway import Multiway
from vlp.fusion.positions import RelativePositions
from vlp.loaded import Loaded

IMAGE, TEXT = Embed("image"), Embed("text")
IMAGE_VL, TEXT_VL = Embed("image", branch="vl"), Embed("text", branch="vl")
MASKED = Fuse(text="masked")


def _batch(case: Case, loaded: Loaded) -> Batch:
    given = case.inputs
    keep = given["text_masks"].bool()
    texts = {"clean": Texts(given["text_ids"], keep)}
    if "loss_mlm" in case.outputs:
        texts["masked"] = Texts(given["text_ids_mlm"], keep, labels=given["text_labels_mlm"])
    pair = "image_1.0" in given
    pixels = torch.cat([given["image_0.0"], given["image_1.0"]]) if pair else given["image.0"]
    rows = torch.arange(len(keep))
    targets = {"answer_scores": case.outputs["vqa_targets"]} if "vqa_targets" in case.outputs else {}
    if pair:
        targets = {"answer_scores": torch.eye(2)[given["answers"]]}
    return Batch(
        images={"clean": Images(pixels)},
        texts=texts,
        image_of_text=torch.stack([rows, rows + len(rows)], 1) if pair else None,
        targets=targets,
    )


def _text_keep(*names: str) -> Callable[[Case], Mapping[str, Tensor]]:
    return lambda case: {name: case.inputs["text_masks"].bool() for name in names if name in case.outputs}


def _logits(ran: Ran) -> Tensor:
    return similarities(ran[IMAGE], ran[TEXT], ran.results.scales["main"])


def _scale(name: str) -> Output:
    return lambda ran: ran.losses[name].metrics["scale"]


def _index(num_image: int, length: int) -> Output:
    return lambda ran: _positions(ran).index(num_image, length)


def _positions(ran: Ran) -> RelativePositions:
    fusion = ran.model.fusion
    assert isinstance(fusion, Multiway) and fusion.positions is not None
    return fusion.positions


def _joint_index(ran: Ran) -> Tensor:
    """Text first, as floats."""
    return _positions(ran).index(17, 12).roll((12, 12), (0, 1)).float()


def _infer(case: Case) -> Mapping[str, Output]:
    return {
        "text_feats": lambda ran: ran[Fuse()].text.states,
        "image_feats": lambda ran: ran[Fuse()].image.states,
        "cls_feats": lambda ran: ran[Fuse()].pooled,
        "text_only_feats": lambda ran: ran[Encode("text")].states,
        "text_cls": lambda ran: ran[TEXT],
        "text_vl_cls": lambda ran: ran[TEXT_VL],
        "image_only_feats": lambda ran: ran[Encode("image")].states,
        "image_cls": lambda ran: ran[IMAGE],
        "image_vl_cls": lambda ran: ran[IMAGE_VL],
        "relative_position_index": _index(17, 0),
        "text_relative_position_index": _index(0, 12),
        "text_imag_relative_position_index": _joint_index,
    }


def _masked_words(objective: str = "mlm") -> Mapping[str, Output]:
    read = MASKED if objective == "mlm" else Encode("text", "masked")
    return {
        "mlm_logits": lambda ran: ran.head("mlm", ran[read].text.states if read is MASKED else ran[read].states),
        "mlm_labels": lambda ran: ran.batch.texts["masked"].labels,
        "mlm_ids": lambda ran: ran.batch.texts["masked"].ids,
        "loss_mlm": lambda ran: ran.loss("mlm"),
    }


def _contrast(prefix: str) -> Mapping[str, Output]:
    return {
        f"{prefix}_i2t_logits": _logits,
        f"{prefix}_t2i_logits": lambda ran: _logits(ran).T,
        f"{prefix}_labels": lambda ran: torch.arange(ran.batch.num_texts),
        f"{prefix}_logit_scale": _scale("itc"),
    }


def _pretrain(case: Case) -> Mapping[str, Output]:
    matched = torch.tensor([1.0, 0.0, 0.0])
    return {
        **_masked_words(),
        **_contrast("itc"),
        "itc_logit_vl_scale": _scale("itc_vl"),
        "loss_itc": lambda ran: ran.loss("itc", "itc_vl"),
        "itm_logits": lambda ran: ran.head("itm", torch.cat([ran[Fuse()].pooled, ran[Fuse(rows="itm")].pooled])),
        "itm_labels": lambda ran: matched.repeat_interleave(ran.batch.num_texts),
        "loss_itm": lambda ran: ran.loss("itm"),
    }


ADAPTERS: dict[str, Adapter] = {
    "vlmo_(plus_)?infer": Adapter(
        _batch,
        _infer,
        passes=lambda case: (Fuse(), Encode("text"), Encode("image"), TEXT, IMAGE, TEXT_VL, IMAGE_VL),
        keep=_text_keep("text_feats", "text_only_feats"),
    ),
    "vlmo_pretrain": Adapter(
        _batch,
        _pretrain,
        passes=lambda case: (MASKED, TEXT, IMAGE, Fuse(), Fuse(rows="itm")),
        keep=_text_keep("mlm_logits"),
        draws=lambda case: {
            "itm.image": case.inputs["replay.neg_image_idx"],
            "itm.text": case.inputs["replay.neg_text_idx"],
        },
    ),
    "vlmo_textmlm": Adapter(
        _batch,
        lambda case: _masked_words("alone"),
        passes=lambda case: (Encode("text", "masked"),),
        keep=_text_keep("mlm_logits"),
    ),
    "vlmo_irtr": Adapter(
        _batch,
        lambda case: {**_contrast("irtr"), "loss_irtr": lambda ran: ran.loss("itc")},
        passes=lambda case: (TEXT, IMAGE),
    ),
    "vlmo_vqa": Adapter(
        _batch,
        lambda case: {
            "vqa_logits": lambda ran: ran.head("answer", ran[Fuse()].pooled),
            "vqa_targets": lambda ran: ran.batch.targets["answer_scores"],
            "loss_vqa": lambda ran: ran.loss("answer"),
        },
        passes=lambda case: (Fuse(),),
    ),
    "vlmo_nlvr2": Adapter(
        _batch,
        lambda case: {
            "nlvr2_logits": lambda ran: ran.head("relate", ran[Fuse()].pooled),
            "nlvr2_labels": lambda ran: ran.case.inputs["answers"],
            "loss_nlvr2": lambda ran: ran.loss("relate"),
        },
        passes=lambda case: (Fuse(),),
    ),
}
"""Which adapter reads which cases."""
