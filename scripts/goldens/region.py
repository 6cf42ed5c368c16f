"""Cases of VOLTA, and of transformers' LXMERT and VisualBERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from encoders.types import Batch, Regions, Texts
from objectives.base import Fuse, Fused
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.loaded import Loaded

PASS = Fuse("masked", "masked")
"""The references run once, with all that is hidden."""


def both(images: Regions, texts: Texts, targets: Mapping[str, Tensor] | None = None) -> Batch:
    """Return a batch whose one view of each side is the recorded one."""
    views = ("clean", "masked")
    return Batch(dict.fromkeys(views, images), dict.fromkeys(views, texts), targets=targets or {})


def fused(ran: Ran) -> Fused:
    """Return the pass that the case recorded."""
    return ran[PASS]


def states(side: str) -> Output:
    """Return a side's last states."""
    return lambda ran: getattr(fused(ran), side).states


def words(ran: Ran) -> Tensor:
    """Return the scores of all words."""
    return ran.head("mlm", fused(ran).text.states)  # type: ignore[union-attr]


def loss(name: str) -> Output:
    """Return an objective's loss."""
    return lambda ran: ran.losses[name].loss


# VOLTA


def volta_batch(case: Case, loaded: Loaded) -> Batch:
    """Return the recorded batch; labels of regions leave out the global one, which stands first."""
    inputs = case.inputs

    def with_global(x: Tensor, fill: float = 0) -> Tensor:
        first = "first" if case.config.get("add_global_imgfeat") == "first" else None
        last = case.config.get("add_global_imgfeat") == "last"
        blank = x.new_full(x[:, :1].shape, fill)
        return torch.cat(([blank] if first else []) + [x] + ([blank] if last else []), 1)

    targets = {
        ours: with_global(inputs[theirs])
        for ours, theirs in (
            ("classes", "image_cls"),
            ("objects", "obj_labels"),
            ("objects_scores", "obj_confs"),
            ("attributes", "attr_labels"),
            ("attributes_scores", "attr_confs"),
        )
    }
    if set(case.config.get("visual_target_weights", {})) & {"6"}:
        targets.pop("objects_scores")
    regions = Regions(
        inputs["image_feat"],
        inputs["image_loc"],
        inputs["image_attention_mask"] == 1,
        predict=with_global(inputs["image_label"], -1) == 1,
        targets=targets,
    )
    labels = torch.where(inputs["masked_lm_labels"] == -1, -100, inputs["masked_lm_labels"])
    texts = Texts(inputs["input_ids"], inputs["attention_mask"] == 1, segments=inputs["token_type_ids"], labels=labels)
    return both(regions, texts, {"match": inputs["next_sentence_label"] == 0})


def pooled(side: int) -> Output:
    """Return a stream's vector before the two are multiplied."""

    def read(ran: Ran) -> Tensor:
        pooler: Any = ran.model.fusion.pooler  # type: ignore[union-attr]
        sides = fused(ran)
        return pooler.sides(sides.image.pooled, sides.text.pooled)[side]  # type: ignore[union-attr]

    return read


VOLTA = Adapter(
    batch=volta_batch,
    outputs=lambda case: {
        "sequence_t": states("text"),
        "sequence_v": states("image"),
        "pooled_t": pooled(0),
        "pooled_v": pooled(1),
        "mlm_logits": words,
        "match_logits": lambda ran: ran.head("itm", fused(ran).pooled).flip(-1),
        "loss_mlm": loss("mlm"),
        "loss_img": loss("mrm"),
        "loss_match": loss("itm"),
    },
    passes=lambda case: [PASS],
    keep=lambda case: {
        "sequence_t": case.inputs["attention_mask"] == 1,
        "mlm_logits": case.inputs["attention_mask"] == 1,
        "sequence_v": case.inputs["image_attention_mask"] == 1,
    },
)

ADAPTERS = {r"volta_.*": VOLTA}
