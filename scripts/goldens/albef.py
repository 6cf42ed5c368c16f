"""salesforce/ALBEF: pretraining, retrieval, VQA, NLVR2 with its own pretraining, SNLI-VE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from downstream.metrics.retrieval import topk_chunked
from encoders.types import Batch, Images, Texts
from objectives.base import Decode, Embed, Encode, Fuse, Pass, Rows
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.loaded import Loaded
from vlp.rank import rank_answers, share_probability

IMAGE, TEXT = Encode("image"), Encode("text")
TAUGHT_IMAGE = Encode("image", teacher=True)
MASKED, TAUGHT_MASKED = Fuse(text="masked"), Fuse(text="masked", teacher=True)
FALSE = Fuse(rows="itm")
WRITTEN, TAUGHT_WRITTEN = Decode(Fuse(), "lm:answer"), Decode(Fuse(), "lm:answer", teacher=True)
FEATURES = {
    "image_feat": Embed("image"),
    "text_feat": Embed("text"),
    "image_feat_m": Embed("image", teacher=True),
    "text_feat_m": Embed("text", teacher=True),
}


def config(case: Case) -> dict[str, Any]:
    """The authors' YAML, with the two files that it names."""
    return {**case.config, "bert_config": case.config["_bert"], "vit": case.config["_vit"]}


def texts(case: Case, name: str, **more: Any) -> Texts:
    """The recorded text ``name``."""
    return Texts(case.inputs[f"{name}.input_ids"], case.inputs[f"{name}.attention_mask"].bool(), **more)


def shifted(ids: Tensor, keep: Tensor) -> Tensor:
    """Labels of a written text: the next id, none at its end and at padding."""
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].where(keep[:, 1:], labels[:, 1:])
    return labels


def taught(case: Case, *objectives: str) -> dict[str, Any]:
    """The recorded share of the teacher; zero as the beginning of a ramp, so that there still is a teacher."""
    share = float(case.inputs["alpha"])
    found = {"distill": share} if share else {"distill": 0.4, "distill_ramp": 1}
    return {"objectives": dict.fromkeys(objectives, found)}


def contrast_batch(case: Case, loaded: Loaded) -> Batch:
    views = {"clean": texts(case, "text")}
    if "replay.mlm_labels" in case.inputs:
        masked, labels = case.inputs["replay.mlm_input_ids"], case.inputs["replay.mlm_labels"]
        views["masked"] = Texts(masked, views["clean"].keep, labels=labels)
    return Batch({"clean": Images(case.inputs["image"])}, views, image_id=case.inputs.get("idx"))


def contrast_draws(case: Case) -> dict[str, Tensor]:
    return {"itm.image": case.inputs["replay.neg_image_idx"], "itm.text": case.inputs["replay.neg_text_idx"]}


def contrast_outputs(case: Case) -> Mapping[str, Output]:
    found: dict[str, Output] = {
        "image_embeds": lambda ran: ran[IMAGE].states,
        "image_embeds_m": lambda ran: ran[TAUGHT_IMAGE].states,
        "text_embeds": lambda ran: ran[TEXT].states,
        "fusion_pos": lambda ran: ran[Fuse()].text.states,
        "fusion_neg": lambda ran: ran[FALSE].text.states,
        "itm_logits": lambda ran: torch.cat([ran.head("itm", ran[one].pooled) for one in (Fuse(), FALSE)]),
        "mlm_logits": lambda ran: ran.head("mlm", ran[MASKED].text.states),
        "mlm_logits_m": lambda ran: ran.results.teacher_head("mlm")(ran[TAUGHT_MASKED].text.states),
        "loss_ita": lambda ran: ran.loss("itc"),
        "loss_itm": lambda ran: ran.loss("itm"),
        "loss_mlm": lambda ran: ran.loss("mlm"),
        "after_image_queue": lambda ran: queue(ran).image.T,
        "after_text_queue": lambda ran: queue(ran).text.T,
        "after_idx_queue": lambda ran: queue(ran).image_id[None],
        "after_queue_ptr": lambda ran: queue(ran).pointer,
        "after.visual_encoder_m.blocks.0.attn.qkv.weight": lambda ran: teacher(
            ran, "vision.vit.blocks.0.attn.qkv.weight"
        ),
        "after.text_encoder_m.bert.encoder.layer.3.crossattention.self.key.weight": lambda ran: teacher(
            ran, "fusion.blocks.1.cross.key.weight"
        ),
        "after.text_proj_m.bias": lambda ran: teacher(ran, "embed.main.text.bias"),
    }
    return found | {name: lambda ran, one=one: ran[one] for name, one in FEATURES.items()}


def queue(ran: Ran) -> Any:
    return ran.model.objectives["itc"].queue


def teacher(ran: Ran, name: str) -> Tensor:
    return ran.model.teacher.get_parameter(name)  # type: ignore[union-attr]


def contrast_keep(case: Case) -> dict[str, Tensor]:
    keep = case.inputs["text.attention_mask"].bool()
    found = dict.fromkeys(("text_embeds", "fusion_pos", "mlm_logits", "mlm_logits_m"), keep)
    return found | {"fusion_neg": torch.cat([keep, keep[case.inputs["replay.neg_text_idx"]]])}


def contrast_passes(case: Case) -> list[Pass]:
    found: list[Pass] = [IMAGE, TEXT, TAUGHT_IMAGE, Fuse(), FALSE, *FEATURES.values()]
    return found + ([MASKED, TAUGHT_MASKED] if "replay.mlm_labels" in case.inputs else [])


PRETRAIN = Adapter(
    contrast_batch,
    contrast_outputs,
    contrast_passes,
    contrast_keep,
    contrast_draws,
    config,
    lambda case: taught(case, "itc", "mlm"),
)
RETRIEVAL = Adapter(
    contrast_batch,
    contrast_outputs,
    contrast_passes,
    contrast_keep,
    contrast_draws,
    config,
    lambda case: taught(case, "itc") if case.config["distill"] else {},
)


# Two images per text, and verdicts.


def verdict_batch(case: Case, loaded: Loaded) -> Batch:
    answers = len(loaded.model.objective_configs["answer"].answers)  # type: ignore[union-attr]
    targets = {"answer_scores": torch.eye(answers)[case.inputs["targets"]]}
    rows = torch.arange(len(targets["answer_scores"]))
    # All first images, then all second ones.
    pairs = torch.stack([rows, rows + len(rows)], 1) if len(case.inputs["image"]) > len(rows) else None
    return Batch({"clean": Images(case.inputs["image"])}, {"clean": texts(case, "text")}, pairs, targets)


VERDICT = Adapter(
    verdict_batch,
    lambda case: {
        "prediction": lambda ran: ran.head("answer", ran[Fuse()].pooled),
        "hidden": lambda ran: ran[Fuse()].text.states,
        "loss": lambda ran: ran.loss("answer"),
    },
    lambda case: [Fuse()],
    lambda case: {"hidden": case.inputs["text.attention_mask"].bool()},
    config=config,
    settings=lambda case: taught(case, "answer") if case.config.get("distill") else {},
)


def assign_draws(case: Case) -> dict[str, Tensor]:
    """The reference draws sample by sample: whether its image is shown, the other image (or two), the order."""
    recorded = iter([case.inputs[name] for name in sorted(case.inputs) if name.startswith("draw.")])
    rows: list[dict[str, Tensor]] = []
    for _ in range(len(case.inputs["image"])):
        shown, others = next(recorded), next(recorded)
        order = next(recorded) if len(others) == 1 else shown
        rows.append({"shown": shown[0], "other": others[0], "second": others[-1], "order": order[0]})
    return {f"assign.{name}": torch.stack([row[name] for row in rows]) for name in rows[0]}


ASSIGN = Adapter(
    lambda case, loaded: Batch({"clean": Images(case.inputs["image"])}, {"clean": texts(case, "text")}),
    lambda case: {
        "prediction": lambda ran: ran.head("assign", ran[Fuse(rows="assign")].pooled),
        "loss": lambda ran: ran.loss("assign"),
    },
    lambda case: [Fuse(rows="assign")],
    draws=assign_draws,
    config=config,
)


# Questions, whose answers are written or ranked.


def question_batch(case: Case, loaded: Loaded) -> Batch:
    views = {"clean": texts(case, "question")}
    if "weights" in case.inputs:
        answer = texts(case, "answer")
        numbers = answers_of(case, len(views["clean"].ids))
        views["lm:answer"] = texts(
            case,
            "answer",
            attention="causal",
            labels=shifted(answer.ids, answer.keep),
            owner=torch.arange(len(numbers)).repeat_interleave(numbers),
            weight=case.inputs["weights"],
        )
    return Batch({"clean": Images(case.inputs["image"])}, views)


def answers_of(case: Case, questions: int) -> Tensor:
    """How many answers each question has; X-VLM's case says it in its notes."""
    recorded = [case.inputs.get(f"k.{row}") for row in range(questions)]
    return torch.tensor([2, 1, 2] if None in recorded else [int(one) for one in recorded if one is not None])


def answer_losses(ran: Ran) -> Tensor:
    return ran.model.objectives["lm"].losses(ran.results, ran.batch)  # type: ignore[operator]


VQA = Adapter(
    question_batch,
    lambda case: {
        "image_embeds": lambda ran: ran[IMAGE].states,
        "question_states": lambda ran: ran[Fuse()].text.states,
        "answer_logits": lambda ran: ran.head("lm", ran[WRITTEN].states),
        "answer_loss": answer_losses,
        "loss": lambda ran: ran.loss("lm"),
    },
    lambda case: [IMAGE, Fuse(), WRITTEN, *([TAUGHT_WRITTEN] if case.config["distill"] else [])],
    lambda case: {
        "question_states": case.inputs["question.attention_mask"].bool(),
        "answer_logits": case.inputs["answer.attention_mask"].bool(),
    },
    config=config,
    settings=lambda case: taught(case, "lm") if case.config["distill"] else {},
)


def ranked(ran: Ran) -> tuple[Tensor, Tensor]:
    answers = texts(ran.case, "answer")
    answers = replace(answers, labels=shifted(answers.ids, answers.keep))
    return rank_answers(ran.model, ran[Fuse()].text, answers, int(ran.case.inputs["k_test"]))


VQA_RANK = Adapter(
    question_batch,
    lambda case: {
        "topk_ids": lambda ran: ranked(ran)[0],
        "topk_probs": lambda ran: share_probability(ranked(ran)[1]),
    },
    lambda case: [Fuse()],
    config=config,
)

# Retrieval as the repository evaluates it: the k best by embeddings, ranked by the matching head's second output.

IMAGE_OF_TEXT = {"i2t": torch.tensor([0, 0, 1, 1, 2, 3]), "t2i": torch.tensor([0, 0, 1, 1, 2, 2])}
"""The case's own pairing, which differs between its directions."""


def match_scores(ran: Ran, images_ask: bool) -> Tensor:
    """The matching logits of each query's candidates, -100 elsewhere."""
    image, text = ran[Embed("image")], ran[Embed("text")]
    queries, keys = (image, text) if images_ask else (text, image)
    _, best = topk_chunked(queries, keys, ran.case.config.get("k_test", 3))
    query, key = torch.arange(len(queries)).repeat_interleave(best.shape[1]), best.flatten()
    rows = Rows(*((query, key) if images_ask else (key, query)))
    fused = ran.model.run([Fuse(rows="search")], ran.batch, rows={"search": rows})[Fuse(rows="search")]
    found = torch.full((len(queries), len(keys)), -100.0)
    found[query, key] = ran.head("itm", fused.pooled)[:, 1]
    return found


def recalls(ran: Ran) -> Tensor:
    """R@1, 5, 10 of texts, then of images, and the mean of all, in points."""
    found: list[Tensor] = []
    for name in ("i2t", "t2i"):
        scores = match_scores(ran, name == "i2t")
        # NumPy's argsort, read backwards: of equal scores the last comes first.
        order = scores.shape[1] - 1 - scores.flip(1).argsort(dim=1, descending=True, stable=True)
        owner = IMAGE_OF_TEXT[name]
        hits = owner[order] == torch.arange(len(order))[:, None] if name == "i2t" else order == owner[:, None]
        found += [100 * hits[:, :k].any(1).float().mean() for k in (1, 5, 10)]
    return torch.stack([*found, torch.stack(found).mean()])


SEARCH = Adapter(
    lambda case, loaded: Batch({"clean": Images(case.inputs["images"])}, {"clean": texts(case, "text")}),
    lambda case: {
        "score_i2t": lambda ran: match_scores(ran, True),
        "score_t2i": lambda ran: match_scores(ran, False),
        "metrics": recalls,
    },
    lambda case: [Embed("image"), Embed("text")],
    config=config,
    objectives=lambda case: (),
)


# torchmultimodal's ALBEF.

TMM = Adapter(
    lambda case, loaded: Batch(
        {"clean": Images(case.inputs["image"])},
        {"clean": Texts(case.inputs["text"], case.inputs["mask"].bool())},
        image_id=case.inputs["idx"],
    ),
    lambda case: {
        "image_feat": lambda ran: ran[Embed("image")],
        "text_feat": lambda ran: ran[Embed("text")],
        "itm_score": lambda ran: ran.head("itm", ran[Fuse()].pooled)[:, 1],
        "loss": lambda ran: ran.loss("itc", "itm"),
    },
    lambda case: [Embed("image"), Embed("text"), Fuse()],
    draws=contrast_draws,
)

ADAPTERS = {
    r"albef_retrieval_eval": SEARCH,
    r"tmm_albef_retrieval": TMM,
    r"albef_pretrain(_alpha0)?": PRETRAIN,
    r"albef_pretrain_nlvr": ASSIGN,
    r"albef_retrieval(_nodistill)?": RETRIEVAL,
    r"albef_vqa_train(_nodistill)?": VQA,
    r"albef_vqa_rank": VQA_RANK,
    r"albef_(ve|nlvr)": VERDICT,
}
