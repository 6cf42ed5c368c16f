"""Prefix language modelling (SimVLM): where texts are cut, what sees what, and the loss by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SIZES, VOCABULARY, tiny_batch, tiny_model
from torch.nn import functional as F

from encoders.types import Vocabulary
from objectives import PrefixLmConfig
from objectives.base import Decode, Draw, Fuse, draws_of
from objectives.prefix_lm import GIVEN, REST, WHOLE_TEXT, PrefixView
from vlp.data.batch import pad_texts
from vlp.decoder import DecoderConfig
from vlp.model import Model, build_model

WORDS = Vocabulary(VOCABULARY, pad=0, cls=1, sep=2, mask=3, bos=1, eos=2)
IDS = np.array([1, 10, 11, 12, 13, 2])


def make(part: str, position: int):
    view = PrefixView(part)
    return view.make(IDS, np.ones(6, dtype=bool), WORDS, Draw(0).sample(draws_of(f"any {part}", view), position))


def model_of(memory: str) -> Model:
    small = tiny_model("single_stream", ("itm",))
    decoder = DecoderConfig(**SIZES, memory="both") if memory == "fused" else None
    config = small.config.model_copy(update={"decoder": decoder})
    return build_model(config, {"prefix_lm": PrefixLmConfig(memory=memory)})


def batch_of(model: Model, n: int = 4):
    batch, texts = tiny_batch(n), {}
    for name, view in model.text_views().items():
        clean = [
            ids[keep].numpy() for ids, keep in zip(batch.texts["clean"].ids, batch.texts["clean"].keep, strict=True)
        ]
        made = [
            view.make(ids, np.ones(len(ids), bool), WORDS, Draw(0).sample(draws_of(name, view), position))
            for position, ids in enumerate(clean)
        ]
        texts[name] = pad_texts(made, view.attention, 0, 8)
    return replace(batch, texts={**batch.texts, **texts})


def test_parts_are_cut_at_the_same_place_and_every_place_is_drawn():
    found = set()
    for position in range(60):
        given, rest, whole = (make(part, position) for part in ("given", "rest", "whole"))
        number = len(given.ids) - 1
        found.add(number)
        assert given.labels is None and given.ids.tolist() == [1, *IDS[1 : 1 + number]]
        assert rest.ids.tolist() == [1, *IDS[1 + number : 5], 2]
        assert rest.labels.tolist() == [*IDS[1 + number : 5], 2, -100]
        assert whole.ids.tolist() == [1, 10, 11, 12, 13, 2] and whole.prefix == number + 1
        assert whole.labels.tolist() == [-100] * number + [*IDS[1 + number : 5], 2, -100]
    assert found == {0, 1, 2, 3}


def test_a_text_without_words_has_nothing_given():
    view = PrefixView("rest").make(np.array([1, 2]), np.zeros(2, bool), WORDS, Draw(0).sample("prefix_lm", 0))
    assert view.ids.tolist() == [1, 2] and view.labels.tolist() == [2, -100]


@pytest.mark.parametrize("memory", ["fused", "beside"])
def test_loss_as_written_by_hand(memory):
    model = model_of(memory).eval()
    batch = batch_of(model)
    objective, text = model.objectives["prefix_lm"], batch.texts[REST if memory == "fused" else WHOLE_TEXT]
    states = model.run([objective.written], batch)[objective.written]
    states = states.states if memory == "fused" else states.text.states
    terms = [
        F.cross_entropy(objective.head(states[row, at]), text.labels[row, at])
        for row in range(4)
        for at in range(text.labels.shape[1])
        if text.labels[row, at] != -100
    ]
    found = model.losses(batch, Draw(0))["prefix_lm"]
    torch.testing.assert_close(found.loss, torch.stack(terms).mean())
    assert objective.count(batch) == len(terms)


def test_the_decoder_reads_image_and_beginning():
    model = model_of("fused").eval()
    batch = batch_of(model)
    written, fused = Decode(Fuse(text=GIVEN), REST), Fuse(text=GIVEN)
    found = model.run([written], batch)
    sides = found[fused]
    memory = torch.cat([sides.image.states, sides.text.states], 1)
    seen = []
    model.decoder.blocks[0].register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    model.run([written], batch)
    torch.testing.assert_close(seen[0]["memory"], memory)
    keep = torch.cat([torch.ones(memory.shape[0], sides.image.states.shape[1]).bool(), batch.texts[GIVEN].keep], 1)
    assert torch.equal(seen[0]["memory_mask"].squeeze(), keep)


@pytest.mark.parametrize("memory", ["fused", "beside"])
def test_what_is_written_does_not_see_its_future(memory):
    """Changing the last word changes no loss of the words before it, changing a given one does."""
    model = model_of(memory).eval()
    batch = batch_of(model)
    objective, name = model.objectives["prefix_lm"], REST if memory == "fused" else WHOLE_TEXT

    def states(ids):
        changed = replace(batch, texts={**batch.texts, name: replace(batch.texts[name], ids=ids)})
        found = model.run([objective.written], changed)[objective.written]
        return found.states if memory == "fused" else found.text.states

    ids, keep = batch.texts[name].ids, batch.texts[name].keep
    last = keep.sum(1) - 1
    other = ids.scatter(1, last[:, None], 7)
    before, after = states(ids), states(other)
    for row in range(4):
        assert torch.equal(before[row, : last[row]], after[row, : last[row]])
        assert not torch.equal(before[row, last[row]], after[row, last[row]])


@pytest.mark.parametrize("memory", ["fused", "beside"])
def test_it_starts_at_chance_learns_and_trains_every_weight(memory):
    model = model_of(memory)
    batch = batch_of(model, 8)
    assert model.objectives["prefix_lm"].chance(8) == math.log(VOCABULARY)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = model(batch, Draw(0))
        loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.25) and losses[-1] < 0.3 * losses[0]


def test_what_cannot_be_is_refused():
    small = tiny_model("dual_stream", ("itm",)).config
    for fusion, memory, said in (
        ("co", "beside", "left to right"),
        ("none", "fused", "needs a fusion"),
        ("single_stream", "fused", "needs a decoder"),
    ):
        config = small.model_copy(
            update={"fusion": tiny_model(fusion, ("itc",) if fusion == "none" else ("itm",)).config.fusion}
        )
        with pytest.raises(ValueError, match=said):
            build_model(config, {"prefix_lm": PrefixLmConfig(memory=memory)})
