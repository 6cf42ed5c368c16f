"""LM: prompts are given and not learned; losses by text, with weights and owners; ranking of given answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CLS, SEP, SIZES, VOCABULARY, tiny_batch, tiny_model
from torch.nn import functional as F

from encoders.types import Batch, Texts, Vocabulary
from objectives import LmConfig
from objectives.base import Decode, Draw, Encode, Fuse
from objectives.lm import CausalView
from vlp.decoder import DecoderConfig
from vlp.model import Model, build_model
from vlp.passes import memory_of
from vlp.rank import rank_answers

WORDS = Vocabulary(VOCABULARY, 0, CLS, SEP, None, 4, SEP)
ANSWERED = Decode(Fuse(), "lm:answer")


def test_prompt_is_read_and_not_predicted() -> None:
    made = CausalView(prompt=(10, 11)).make(np.array([CLS, 20, 21, SEP]), np.ones(4, bool), WORDS, None)
    assert made.ids.tolist() == [4, 10, 11, 20, 21, SEP]
    assert made.labels.tolist() == [-100, -100, 20, 21, SEP, -100]
    plain = CausalView().make(np.array([CLS, 20, SEP]), np.ones(3, bool), WORDS, None)
    assert plain.ids.tolist() == [4, 20, SEP] and plain.labels.tolist() == [20, SEP, -100]


def questions(*, label_at: bool = False) -> tuple[Model, Batch]:
    """Three questions with two, none and three answers."""
    settings = LmConfig(memory="fused", view="lm:answer", mean="texts", label_smoothing=0.1)
    config = tiny_model("dual_stream", {"lm": settings}).config
    decoder = DecoderConfig(**SIZES, share="none", memory="text")
    model = build_model(config.model_copy(update={"decoder": decoder}), {"lm": settings})
    batch, written = tiny_batch(3, ("clean",)), tiny_batch(5, ("causal",)).texts["causal"]
    assert written.labels is not None
    found = (written.labels != -100).flatten().nonzero()[:, 0]
    at = F.pad(found, (0, -len(found) % 8), value=-1) if label_at else None
    owner, weight = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0.3, 1.0, 0.5, 0.25, 2.0])
    answers = replace(written, owner=owner, weight=weight, label_at=at)
    return model, replace(batch, texts={**batch.texts, "lm:answer": answers})


@pytest.mark.parametrize("label_at", [False, True])
def test_losses_by_text(label_at: bool) -> None:
    model, batch = questions(label_at=label_at)
    loss = model.losses(batch, Draw(0))["lm"].loss
    lm, answers = model.objectives["lm"], batch.texts["lm:answer"]
    fused = model.run({Fuse()}, batch)[Fuse()].text
    total = 0.0
    for row, (owner, weight) in enumerate(zip([0, 0, 2, 2, 2], [0.3, 1.0, 0.5, 0.25, 2.0], strict=True)):
        one = Texts(answers.ids[row : row + 1], answers.keep[row : row + 1], "causal")
        states = model.decoder(one, replace(fused, states=fused.states[[owner]], keep=fused.keep[[owner]])).states
        words = F.cross_entropy(lm.head(states)[0], answers.labels[row], reduction="none", label_smoothing=0.1)
        total = total + weight * words.sum()
    torch.testing.assert_close(loss, total / 3)
    assert lm.count(batch) == 3


def test_output_words_are_the_decoders() -> None:
    model, _ = questions()
    assert model.objectives["lm"].head.decoder.weight is model.decoder.embeddings.word.weight
    assert model.decoder.embeddings.word.weight is not model.text.embeddings.word.weight


def test_texts_of_an_image_read_that_image() -> None:
    model = tiny_model("none", ("itc", "lm")).eval()
    batch, written = tiny_batch(3, ("clean",)), tiny_batch(4, ("causal",)).texts["causal"]
    owner = torch.tensor([2, 0, 0, 1])
    batch = replace(batch, texts={**batch.texts, "causal": replace(written, owner=owner)})
    decoded = Decode(Encode("image"))
    found = model.run({decoded}, batch)[decoded].states
    seen = model.run({Encode("image")}, batch)[Encode("image")]
    torch.testing.assert_close(
        found, model.decoder(written, replace(seen, states=seen.states[owner], keep=None)).states
    )


@pytest.mark.parametrize("twice", [False, True])
def test_ranking_is_that_of_all_answers(twice: bool) -> None:
    model, batch = questions()
    model = model.eval()
    answers = replace(batch.texts["lm:answer"], owner=None, weight=None)
    fused = model.run({Fuse()}, batch)[Fuse()]
    memory, lm, count = memory_of(fused, "text"), model.objectives["lm"], len(answers.ids)
    index = torch.arange(3).repeat_interleave(count)
    every = replace(answers, ids=answers.ids.repeat(3, 1), keep=answers.keep.repeat(3, 1))
    with torch.no_grad():
        logits = lm.head(model.decoder(every, memory, index).states)
    words = F.cross_entropy(logits.transpose(1, 2), answers.labels.repeat(3, 1), reduction="none", label_smoothing=0.1)
    first = logits[:, 0].log_softmax(1).gather(1, every.ids[:, 1:2])[:, 0].view(3, count)
    wanted = -words.sum(1).view(3, count) + (first if twice else 0)
    rows, scores = rank_answers(model, memory, answers, count, first_twice=twice)
    torch.testing.assert_close(scores, wanted.gather(1, rows))
    assert torch.equal(rows[:, 0], wanted.argmax(1))
    fewer, _ = rank_answers(model, memory, answers, 2, first_twice=twice)
    for row, likeliest in zip(fewer, first.topk(2).indices, strict=True):
        assert set(row.tolist()) == set(likeliest.tolist())
    with pytest.raises(ValueError, match="k 6 of 5 answers"):
        rank_answers(model, memory, answers, 6)
