"""Text infilling (BART): what is missing, and the loss by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SIZES, VOCABULARY, tiny_batch, tiny_model
from torch.nn import functional as F

from encoders.types import Vocabulary
from objectives import InfillConfig
from objectives.base import Draw, ViewText
from objectives.infill import GIVEN, WHOLE_TEXT, InfillView
from vlp.data.batch import pad_texts
from vlp.decoder import DecoderConfig
from vlp.model import build_model

MASK = 3
WORDS = Vocabulary(VOCABULARY, pad=0, cls=1, sep=2, mask=MASK, bos=1, eos=2)


def given(ids: list[int], starts: list[bool], position: int = 0, probability: float = 0.3) -> list[int]:
    view = InfillView(probability, 3.0)
    made = view.make(np.array(ids), np.array(starts), WORDS, Draw(0).sample("infill:given", position))
    assert made.labels is None
    return made.ids.tolist()


def test_a_third_of_the_words_is_missing_whole_and_in_spans() -> None:
    """Twenty words of two pieces each: what is left is in order, never half a word, and spans hold 3."""
    pieces = list(range(5, 45))
    ids, starts = [1, *pieces, 2], [False, *[True, False] * 20, False]
    masks = Counter[int]()
    for position in range(400):
        found = given(ids, starts, position)
        left = [i for i in found if i != MASK]
        assert left[0] == 1 and left[-1] == 2 and left == [*sorted(left[:-1]), 2]
        assert len(left) == 2 + 40 - 2 * 6 and all((i + 1 in left) for i in left[1:-1] if i % 2)
        masks[found.count(MASK)] += 1
    assert 2.0 < sum(n * times for n, times in masks.items()) / 400 < 4.0 and min(masks) >= 1


def test_every_word_can_be_missing_and_short_texts_keep_their_ends() -> None:
    ids, starts = [1, 5, 6, 7, 2], [False, True, True, True, False]
    missing = [set(ids) - set(given(ids, starts, position)) for position in range(60)]
    assert set().union(*missing) == {5, 6, 7} and all(len(one) == 1 for one in missing)
    assert given([1, 2], [False, False]) == [1, 2]
    assert [i for i in given([1, 5, 2], [False, True, False]) if i != MASK] == [1, 2]
    with pytest.raises(ValueError, match="needs a tokenizer with a mask token"):
        InfillView(0.3, 3.0).make(
            np.array(ids), np.array(starts), replace(WORDS, mask=None), Draw(0).sample("infill:given", 0)
        )


@pytest.mark.parametrize("alone", [False, True])
def test_loss_as_written_by_hand(alone: bool) -> None:
    small = tiny_model("single_stream", ("itm",))
    config = small.config.model_copy(update={"decoder": DecoderConfig(**SIZES, memory="both")})
    model = build_model(config, {"infill": InfillConfig(alone=alone)}).eval()
    batch, made = tiny_batch(3), {}
    for name, view in model.text_views().items():
        texts: list[ViewText] = []
        for position, (ids, keep) in enumerate(zip(batch.texts["clean"].ids, batch.texts["clean"].keep, strict=True)):
            row = ids[keep].numpy()
            starts = ~np.isin(row, [1, 2])
            texts.append(view.make(row, starts, WORDS, Draw(0).sample(name, position)))
        made[name] = pad_texts(texts, view.attention, 0, 8)
    batch = replace(batch, texts={**batch.texts, **made})
    if alone:
        batch = replace(batch, images={})
    objective, text = model.objectives["infill"], batch.texts[WHOLE_TEXT]
    assert torch.equal(text.ids, batch.texts["clean"].ids) and not torch.equal(made[GIVEN].ids, text.ids)
    states = model.run([objective.written], batch)[objective.written].states
    terms = [
        F.cross_entropy(objective.head(states[row, at]), text.labels[row, at])
        for row, at in (text.labels != -100).nonzero().tolist()
    ]
    output = model.losses(batch, Draw(0))["infill"]
    torch.testing.assert_close(output.loss, torch.stack(terms).mean())
    assert objective.count(batch) == len(terms)


def test_it_needs_a_fusion_and_a_decoder() -> None:
    for fusion, said in (("none", "needs a fusion"), ("single_stream", "needs a decoder")):
        with pytest.raises(ValueError, match=f"objective infill {said}"):
            tiny_model(fusion, {"infill": InfillConfig()})
