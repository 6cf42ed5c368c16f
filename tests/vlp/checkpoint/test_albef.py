"""ALBEF's checkpoints: recorded cases, and stand-ins by a reference of our own for those that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from albef_reference import Names, State, bert, followed, linear, some_texts, vit, word_logits
from standins import GOLDENS, stand_in, verdict
from torch import Tensor
from torch.nn import functional as F

import vlp
from scripts.goldens.albef import config as authors_config
from scripts.goldens.base import Case

RECORDED = ["albef_pretrain", "albef_retrieval", "albef_vqa_rank", "albef_vqa_train_nodistill"]
WIDTH, MEMORY, HEADS, LAYERS, SPLIT = 16, 24, 4, 4, 2
ALPHA = 0.4
FILE = {"file": "model.pth", "key": "model"}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()
    assert found.compared > 0.8 * found.recorded


def config(**more: Any) -> dict[str, Any]:
    bert_config = {"num_attention_heads": HEADS, "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-12}
    return {"distill": True, "_bert": bert_config, "_vit": {"num_heads": HEADS}, **more}


def names(layers: int = LAYERS, split: int = SPLIT, memory: int = MEMORY) -> Names:
    made = Names()
    made.vit("visual_encoder.", memory, 2, 8, 17)
    made.bert("text_encoder.", WIDTH, layers, split, memory)
    return made


def text_inputs(name: str, ids: Tensor, keep: Tensor) -> State:
    return {f"{name}.input_ids": ids, f"{name}.attention_mask": keep.long()}


@pytest.mark.parametrize("task", ["ve", "nlvr"])
def test_verdicts(tmp_path: Path, task: str) -> None:
    two = task == "nlvr"
    made = names(18, 6) if two else names()
    made.linear("cls_head.0", WIDTH, WIDTH)
    made.linear("cls_head.2", 2 if two else 3, WIDTH)
    if two:
        made.share_keys("text_encoder.", 6, 18)
    made.add_twins("visual_encoder", "text_encoder", "cls_head")
    ids, keep = some_texts(3)
    pixels, targets = torch.randn(6 if two else 3, 3, 32, 32), torch.tensor([0, 1, 1] if two else [2, 0, 1])

    def predict(weights: State) -> tuple[Tensor, Tensor]:
        images = vit(weights, "visual_encoder.", pixels, HEADS)
        hidden = bert(weights, "text_encoder.", ids, keep, HEADS, images.split(3))
        return hidden, linear(weights, "cls_head.2", linear(weights, "cls_head.0", hidden[:, 0]).relu())

    def reference(leaves: State) -> State:
        state = made.tied(leaves)
        hidden, prediction = predict(state)
        with torch.no_grad():
            _, believed = predict(followed(state))
        soft = -(prediction.log_softmax(1) * believed.softmax(1)).sum(1).mean()
        loss = (1 - ALPHA) * F.cross_entropy(prediction, targets) + ALPHA * soft
        return {"prediction": prediction, "hidden": hidden, "loss": loss}

    given = {"image": pixels, **text_inputs("text", ids, keep), "targets": targets, "alpha": torch.tensor(ALPHA)}
    found = verdict(stand_in(tmp_path / f"albef_{task}", made.state, given, reference, config(), **FILE))
    assert found.passed, found.line()
    assert found.gradients > 50


def test_text_assignment(tmp_path: Path) -> None:
    made = names(18, 6)
    made.linear("vision_proj", 8, MEMORY)
    made.linear("text_proj", 8, WIDTH)
    made.linear("ta_head", 3, WIDTH)
    made.state["temp"] = torch.tensor(0.07)
    made.share_keys("text_encoder.", 6, 18)
    ids, keep = some_texts(4)
    given = {"image": torch.randn(4, 3, 32, 32), **text_inputs("text", ids, keep)}
    # Draws of each row (its own is shown if > 1/3, the other image or two others, its own comes first if > 1/2), and
    # the two images and the label that they make.
    draws = [([0.9], [2], [0.7]), ([0.5], [3], [0.2]), ([0.1], [3, 1]), ([0.4], [0], [0.6])]
    pairs, labels = torch.tensor([[0, 2], [3, 1], [3, 1], [3, 0]]), torch.tensor([0, 1, 2, 0])
    for number, value in enumerate(one for row in draws for one in row):
        given[f"draw.{number:03d}.any"] = torch.tensor(value)

    def reference(leaves: State) -> State:
        state = made.tied(leaves)
        images = vit(state, "visual_encoder.", given["image"], HEADS)
        hidden = bert(state, "text_encoder.", ids, keep, HEADS, (images[pairs[:, 0]], images[pairs[:, 1]]))
        prediction = linear(state, "ta_head", hidden[:, 0])
        return {"prediction": prediction, "loss": F.cross_entropy(prediction, labels)}

    case = stand_in(tmp_path / "albef_pretrain_nlvr", made.state, given, reference, config(), **FILE)
    found = verdict(case)
    assert found.passed, found.line()
    assert any("text_proj" in one for one in vlp.load(case.weights, config=authors_config(case)).report.ignored)


def test_vqa_with_a_teacher(tmp_path: Path) -> None:
    made = names(memory=WIDTH)
    made.bert("text_decoder.bert.", WIDTH, 6, 0, WIDTH)
    made.word_head("text_decoder.cls.predictions.", "text_decoder.bert.embeddings.word_embeddings.weight", WIDTH)
    made.add_twins("visual_encoder", "text_encoder", "text_decoder")
    (ids, keep), (answer, answer_keep) = some_texts(3), some_texts(5, 6, seed=2)
    owner, weights = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0.6, 0.4, 1.0, 0.3, 0.7])
    pixels = torch.randn(3, 3, 32, 32)
    labels = answer[:, 1:].masked_fill(answer[:, 1:] == 0, -100)

    def write(weights: State) -> tuple[Tensor, Tensor]:
        images = vit(weights, "visual_encoder.", pixels, HEADS)
        question = bert(weights, "text_encoder.", ids, keep, HEADS, (images,))
        states = bert(
            weights, "text_decoder.bert.", answer, answer_keep, HEADS, (question[owner],), keep[owner], causal=True
        )
        return question, word_logits(weights, "text_decoder.cls.predictions.", states)

    def reference(leaves: State) -> State:
        state = made.tied(leaves)
        question, logits = write(state)
        with torch.no_grad():
            soft = write(followed(state))[1][:, :-1].softmax(-1)
        hard = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none").view(5, -1).sum(1)
        distilled = (-(soft * logits[:, :-1].log_softmax(-1)).sum(-1) * (labels != -100)).sum(1)
        each = (1 - ALPHA) * hard + ALPHA * distilled
        loss = (weights * each).sum() / 3
        return {"question_states": question, "answer_logits": logits, "answer_loss": each, "loss": loss}

    given = {
        "image": pixels,
        **text_inputs("question", ids, keep),
        **text_inputs("answer", answer, answer_keep),
        **{f"k.{row}": (owner == row).sum() for row in range(3)},
        "weights": weights,
        "alpha": torch.tensor(ALPHA),
    }
    found = verdict(stand_in(tmp_path / "albef_vqa_train", made.state, given, reference, config(), **FILE))
    assert found.passed, found.line()


def test_sizes_that_a_file_cannot_tell_are_assumed_and_said(tmp_path: Path) -> None:
    case = Case(GOLDENS / "albef_retrieval")
    told = vlp.load(case.weights, config=authors_config(case)).report
    assert not any("heads" in note for note in told.notes)
    assumed = vlp.load(case.weights).report
    assert sum("heads" in note for note in assumed.notes) == 2
    assert any("position_ids" in name for name in assumed.ignored)


def test_a_damaged_copy_is_refused(tmp_path: Path) -> None:
    state = torch.load(GOLDENS / "albef_pretrain" / "model.pth", weights_only=True)["model"]
    state["text_encoder.cls.predictions.decoder.weight"] = state["text_encoder.cls.predictions.decoder.weight"] + 1
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="one weight in this family, but differ"):
        vlp.load(tmp_path / "model.pth")


def test_a_file_without_heads_and_twins_loads(tmp_path: Path) -> None:
    state = torch.load(GOLDENS / "albef_retrieval" / "model.pth", weights_only=True)["model"]
    bare = {n: t for n, t in state.items() if n.startswith(("visual_encoder.", "text_encoder."))}
    torch.save(bare, tmp_path / "bare.pth")
    loaded = vlp.load(tmp_path / "bare.pth")
    assert loaded.model.teacher is None and not loaded.model.objectives and loaded.model.fusion is not None


def test_another_image_size_resizes_student_and_teacher(tmp_path: Path) -> None:
    case = Case(GOLDENS / "albef_retrieval")
    loaded = vlp.load(case.weights, settings={"model": {"vision": {"image_size": 48}}})
    assert set(loaded.report.resized) == {"vision.vit.pos_embed", "teacher.vision.vit.pos_embed"}
