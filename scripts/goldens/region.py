"""Cases of VOLTA, and of transformers' LXMERT and VisualBERT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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

# transformers


def hf_keeps(case: Case) -> dict[str, Tensor]:
    """Return which positions of each side, and of both behind each other, are real."""
    text, image = case.inputs["attention_mask"] == 1, case.inputs["visual_attention_mask"] == 1
    return {"text": text, "image": image, "both": torch.cat([text, image], 1)}


def beside(ran: Ran, number: int | None = None) -> Tensor:
    """Return the text's states and the image's behind them: the last, or a layer's."""
    sides = [getattr(fused(ran), side) for side in ("text", "image")]
    return torch.cat([side.states if number is None else side.layers[number] for side in sides], 1)


def lxmert_batch(case: Case, loaded: Loaded) -> Batch:
    """Return the recorded batch; what is said of a region counts as much as its confidence."""
    inputs = case.inputs
    targets = {}
    for theirs, ours in (("obj_label", "objects"), ("attr_label", "attributes"), ("feat_target", "features")):
        if theirs in inputs:
            targets |= {ours: inputs[theirs], f"{ours}_scores": inputs["visual_conf"]}
    regions = Regions(
        inputs["visual_feats"],
        inputs["visual_pos"],
        inputs["visual_attention_mask"] == 1,
        predict=torch.ones_like(inputs["visual_attention_mask"], dtype=torch.bool),
        targets=targets,
    )
    texts = Texts(
        inputs["input_ids"],
        inputs["attention_mask"] == 1,
        segments=inputs["token_type_ids"],
        labels=inputs.get("labels"),
    )
    answers = {}
    if "ans" in inputs:
        number = loaded.model.objective_configs["answer"].answers  # type: ignore[union-attr]
        answers = {"answer_scores": torch.eye(len(number))[inputs["ans"]], "match": inputs["matched_label"] == 1}
    return both(regions, texts, answers)


def lxmert_outputs(case: Case) -> dict[str, Output]:
    """Return how outputs are read; a layer is two sublayers of its stream, or three of both."""
    layers = case.config["num_hidden_layers"]
    language, vision, cross = (layers[part] for part in ("language", "vision", "cross_encoder"))
    found: dict[str, Output] = {
        "language_output": states("text"),
        "vision_output": states("image"),
        "pooled_output": lambda ran: fused(ran).pooled,
        "prediction_logits": words,
        "cross_relationship_score": lambda ran: ran.head("itm", fused(ran).pooled),
        "question_answering_score": lambda ran: ran.head("answer", fused(ran).pooled),
        "loss_mlm": loss("mlm"),
        "loss_matched": loss("itm"),
        "loss_qa": loss("answer"),
        "loss_visual": loss("mrm"),
        "loss": lambda ran: ran.loss("mlm", "itm", "mrm", "answer"),
    }
    for side, name, own in (("text", "language", language), ("image", "vision", vision)):
        for number in range(own + cross):
            at = 2 * (number + 1) if number < own else 2 * max(language, vision) + 3 * (number - own + 1)
            found[f"{name}_hidden_states.{number}"] = lambda ran, s=side, n=at: getattr(fused(ran), s).layers[n]
    for theirs, ours in (("obj", "objects"), ("attr", "attributes"), ("feat", "features")):
        found[f"visual_{theirs}"] = lambda ran, ours=ours: _predicted(ran)[ours]
    return found


def _predicted(ran: Ran) -> Mapping[str, Tensor]:
    predict: Any = ran.model.objectives["mrm"].predict
    return predict(fused(ran).image.states)  # type: ignore[union-attr]


def lxmert_keep(case: Case) -> dict[str, Tensor]:
    """Return the real positions of each output."""
    real = hf_keeps(case)
    sides = {"language": "text", "prediction": "text", "vision": "image", "visual": "image"}
    return {name: real[side] for name in case.outputs if (side := sides.get(name.split("_")[0]))}


ALIGNED = Fuse("aligned", "masked")


def visualbert_batch(case: Case, loaded: Loaded) -> Batch:
    """Return the recorded batch, and the regions aligned with words as a view of their own."""
    inputs = case.inputs
    regions = Regions(
        inputs["visual_embeds"],
        inputs["visual_embeds"][..., :0],
        inputs["visual_attention_mask"] == 1,
        segments=inputs["visual_token_type_ids"],
    )
    texts = Texts(
        inputs["input_ids"],
        inputs["attention_mask"] == 1,
        segments=inputs["token_type_ids"],
        labels=inputs.get("labels"),
    )
    targets = {"match": inputs["sentence_image_labels"] == 0} if "sentence_image_labels" in inputs else {}
    found = both(regions, texts, targets)
    if "alignment" not in case.outputs:
        return found
    aligned = replace(regions, positions=case.outputs["alignment"])
    return replace(found, images={**found.images, "aligned": aligned})


def visualbert_outputs(case: Case) -> dict[str, Output]:
    """Return how outputs are read."""
    return {
        "last_hidden_state": beside,
        "last_hidden_state_with_alignment": lambda ran: torch.cat(
            [ran[ALIGNED].text.states, ran[ALIGNED].image.states], 1
        ),
        "pooler_output": lambda ran: fused(ran).pooled,
        "prediction_logits": lambda ran: ran.head("mlm", beside(ran)),
        "seq_relationship_logits": lambda ran: ran.head("itm", fused(ran).pooled).flip(-1),
        "loss": lambda ran: ran.loss("mlm", "itm"),
        **{f"hidden_states.{n}": lambda ran, n=n: beside(ran, n) for n in range(case.config["num_hidden_layers"] + 1)},
    }


LXMERT = Adapter(batch=lxmert_batch, outputs=lxmert_outputs, passes=lambda case: [PASS], keep=lxmert_keep)
VISUALBERT = Adapter(
    batch=visualbert_batch,
    outputs=visualbert_outputs,
    passes=lambda case: [PASS, ALIGNED] if "alignment" in case.outputs else [PASS],
    keep=lambda case: {name: hf_keeps(case)["both"] for name in case.outputs if wide(case.outputs[name])},
    ignored={"alignment": "what the second run was given"},
)


def wide(output: Tensor) -> bool:
    """Whether an output is of every position."""
    return output.dim() == 3


ADAPTERS = {r"volta_.*": VOLTA, r"hf_lxmert.*": LXMERT, r"hf_visualbert.*": VISUALBERT}
