"""UNITER's cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from encoders.types import Batch, Regions, Texts
from objectives.answer import answer_terms
from objectives.base import Fuse, Fused
from objectives.itm import match_terms
from objectives.mlm import word_loss
from objectives.mrm import region_terms
from objectives.rank import margin_terms
from objectives.wra import transport_distance
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.loaded import Loaded

OBJECTIVES = {"mlm": ("mlm",), "mrc": ("mrc",), "mrfr": ("mrfr",), "itm_ot": ("itm", "wra")}
PASSES = {"mlm": Fuse(text="masked"), "mrc": Fuse("masked"), "mrfr": Fuse("masked"), "itm_ot": Fuse(rows="itm")}


def task(case: Case) -> str:
    """Return what of UNITER the case is."""
    return case.name.removeprefix("uniter_")


def keeps(case: Case) -> tuple[Tensor, Tensor]:
    """Return which words [M, L] and regions [M, R] of the recorded rows are read: those that are packed."""
    inputs = case.inputs
    words = inputs["input_ids"].shape[1]
    places = torch.arange(words + inputs["img_feat"].shape[1])
    packed = (inputs["gather_index"][..., None] == places) & (inputs["attn_masks"] == 1)[..., None]
    keep = packed.any(1)
    return keep[:, :words], keep[:, words:]


def batch(case: Case, loaded: Loaded) -> Batch:
    """Return a row of theirs as a text with its image; a pair of rows as a text with two."""
    inputs = case.inputs
    text_keep, image_keep = keeps(case)
    regions = Regions(
        inputs["img_feat"],
        inputs["img_pos_feat"],
        image_keep,
        masked=inputs.get("img_masks"),
        segments=inputs.get("img_type_ids"),
        targets=region_targets(case),
    )
    ids = inputs["input_ids"]
    number = torch.arange(len(ids))
    texts = {"clean": Texts(ids, text_keep, positions=inputs["position_ids"])}
    if "txt_labels" in inputs:
        labels = torch.where(inputs["txt_labels"] == -1, -100, inputs["txt_labels"])
        texts["masked"] = Texts(ids, text_keep, positions=inputs["position_ids"], labels=labels)
    own, targets = number, {}
    if task(case) == "itm_ot":  # another image is the own one of a text whose recorded image is false
        own = torch.where(inputs["targets"] == 1, number, number.roll(1))
    elif task(case) == "vqa":
        targets["answer_scores"] = inputs["targets"]
    elif "nlvr2" in case.name:
        texts = {"clean": Texts(ids[::2], text_keep[::2], positions=inputs["position_ids"])}
        own = number.view(-1, 2)
        targets["answer_scores"] = torch.eye(2)[inputs["targets"]]
    return Batch({"clean": regions, "masked": regions}, texts, own, targets)


def region_targets(case: Case) -> dict[str, Tensor]:
    """Return what was recorded of the masked regions, laid out over all of them."""
    found = {}
    for name, ours in (("label_targets", "classes"), ("feat_targets", "features")):
        if name in case.inputs:
            masked = case.inputs["img_masks"]
            laid = case.inputs[name].new_zeros(*masked.shape, case.inputs[name].shape[-1])
            laid[masked] = case.inputs[name]
            found[ours] = laid
    return found


def fused(ran: Ran) -> Fused:
    """Return the pass that the case recorded."""
    return ran[PASSES.get(task(ran.case), Fuse())]


def layer(number: int) -> Output:
    """Return an encoder layer's states in their packed order."""

    def read(ran: Ran) -> Tensor:
        sides = fused(ran)
        states = torch.cat([sides.text.layers[number + 1], sides.image.layers[number + 1]], 1)  # type: ignore[union-attr, index]
        index = ran.case.inputs["gather_index"]
        return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))

    return read


def words(ran: Ran) -> Tensor:
    """Return the states of the words that are to be predicted, [K, D]."""
    return fused(ran).text.states[ran.case.inputs["txt_labels"] != -1]  # type: ignore[union-attr]


def each_word(ran: Ran) -> Tensor:
    """Return the loss of each word by itself."""
    labels = ran.case.inputs["txt_labels"]
    found = zip(words(ran), labels[labels != -1], strict=True)
    head: Any = ran.model.objectives["mlm"].head
    return torch.stack([word_loss(head, state[None, None], label[None, None], None).loss for state, label in found])


def regions_of(name: str, target: str) -> Output:
    """Return what an objective predicts of the masked regions."""

    def read(ran: Ran) -> Tensor:
        predict: Any = ran.model.objectives[name].predict
        return predict(fused(ran).image.states)[target][ran.case.inputs["img_masks"]]  # type: ignore[union-attr]

    return read


def region_loss(name: str, target: str, kind: Any, recorded: str) -> Output:
    """Return the terms of a loss of regions."""
    return lambda ran: region_terms(kind, regions_of(name, target)(ran), ran.case.inputs[recorded])


def distances(label: int) -> Output:
    """Return the transport distances of the rows of this label."""

    def read(ran: Ran) -> Tensor:
        sides = fused(ran)
        states = sides.text.states, sides.image.states  # type: ignore[union-attr]
        return transport_distance(*states, *keeps(ran.case))[ran.case.inputs["targets"] == label]

    return read


def related(ran: Ran) -> Tensor:
    """Return the verdicts on pairs of images."""
    objective: Any = ran.model.objectives["relate"]
    return objective.logits(fused(ran)) if ran.case.name.endswith("attn") else objective.head(fused(ran).pooled)


def by(objective: str) -> Output:
    """Return an objective's head on the pooled rows."""
    return lambda ran: ran.head(objective, fused(ran).pooled)


def loss(*names: str) -> Output:
    """Return these objectives' weighted loss."""
    return lambda ran: ran.loss(*names)


def metric(name: str, which: str) -> Output:
    """Return a part of an objective's loss."""
    return lambda ran: ran.losses[name].metrics[which]


def recorded_labels(read: Output) -> Output:
    """Return the cross-entropy of each row's recorded label."""
    return lambda ran: match_terms(read(ran), ran.case.inputs["targets"])[0]


OUTPUTS: dict[str, Mapping[str, Output]] = {
    "mlm": {
        "loss_mlm": loss("mlm"),
        "scores": lambda ran: ran.head("mlm", words(ran)),
        "raw": each_word,
        **{f"layer.{n}": layer(n) for n in range(24)},
    },
    "mrc": {
        "loss_mrckl": metric("mrc", "classes_kl"),
        "loss_mrc": metric("mrc", "classes_best_class"),
        "pred": regions_of("mrc", "classes"),
        "raw_kl": region_loss("mrc", "classes", "kl", "label_targets"),
        "raw_ce": region_loss("mrc", "classes", "best_class", "label_targets"),
    },
    "mrfr": {
        "loss_mrfr": loss("mrfr"),
        "pred": regions_of("mrfr", "features"),
        "raw": region_loss("mrfr", "features", "mse", "feat_targets"),
    },
    "itm_ot": {
        "loss_itm": loss("itm"),
        "loss_ot": loss("wra"),
        "scores": by("itm"),
        "raw": recorded_labels(by("itm")),
        "ot_pos": distances(1),
        "ot_neg": distances(0),
    },
    "itm_rank": {
        "loss": loss("rank"),
        "scores": by("rank"),
        "raw": lambda ran: margin_terms(by("rank")(ran).view(-1, 2), 0.2),
    },
    "vqa": {
        "loss": loss("answer"),
        "scores": by("answer"),
        "raw": lambda ran: answer_terms(by("answer")(ran), ran.case.inputs["targets"]),
    },
    "nlvr2_paired": {"loss": loss("relate"), "scores": related, "raw": recorded_labels(related)},
    "nlvr2_paired_attn": {"loss": loss("relate"), "scores": related, "raw": recorded_labels(related)},
}


def settings(case: Case) -> Mapping[str, Any]:
    """Return how the case was trained: both losses of classes at once; pairs that the data give."""
    if task(case) == "mrc":
        return {"objectives": {"mrc": {"targets": {"classes": {"losses": ["kl", "best_class"]}}}}}
    if task(case) == "itm_rank":
        return {"objectives": {"rank": {"scheme": "given", "negatives": 1}}}
    return {}


def draws(case: Case) -> Mapping[str, Tensor]:
    """Return the recorded images in place of drawn ones."""
    if task(case) != "itm_ot":
        return {}
    return {"itm.image": torch.arange(len(case.inputs["targets"])), "itm.replace": case.inputs["targets"] == 0}


ADAPTERS = {
    r"uniter_.*": Adapter(
        batch=batch,
        outputs=lambda case: OUTPUTS[task(case)],
        passes=lambda case: [PASSES.get(task(case), Fuse())],
        keep=lambda case: {name: case.inputs["attn_masks"] == 1 for name in case.outputs if name.startswith("layer.")},
        draws=draws,
        settings=settings,
        objectives=lambda case: OBJECTIVES.get(task(case)),
    )
}
