"""Span corruption (T5, VL-T5): what is hidden and written, by an independent reading of both, and the loss by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SIZES, VOCABULARY, tiny_batch, tiny_model
from torch.nn import functional as F

from encoders.types import Batch, Vocabulary
from objectives import SpanCorruptionConfig
from objectives.base import Decode, Draw, Fuse, draws_of
from objectives.span_corruption import GIVEN, WRITTEN, SpanView
from vlp.data.batch import pad_texts
from vlp.decoder import DecoderConfig
from vlp.model import Model, build_model

SENTINELS = tuple(range(VOCABULARY - 1, VOCABULARY - 9, -1))
WORDS = Vocabulary(VOCABULARY, pad=0, cls=1, sep=2, mask=3, bos=1, eos=2, sentinels=SENTINELS)
T5 = replace(WORDS, cls=0, sep=2, bos=0)
"""Texts begin with no id, and what is written with pad."""


def make(part: str, ids: np.ndarray, position: int, words: Vocabulary = WORDS, starts=None, **settings):
    view = SpanView(part, **{"probability": 0.15, "span_length": 3.0, "whole_word": False, **settings})
    starts = np.ones(len(ids), dtype=bool) if starts is None else starts
    return view.make(ids, starts, words, Draw(0).sample(draws_of(f"any {part}", view), position))


def spans(written: list[int], words: Vocabulary) -> dict[int, list[int]]:
    """What is written behind each sentinel."""
    assert written[0] == words.bos and written[-1] == words.eos
    found: dict[int, list[int]] = {}
    for each in written[1:-1]:
        if each in words.sentinels:
            found[each] = []
        else:
            found[list(found)[-1]].append(each)
    return found


def put_back(given: list[int], hidden: dict[int, list[int]]) -> list[int]:
    return [one for each in given for one in hidden.get(each, [each])]


@pytest.mark.parametrize("words", [WORDS, T5], ids=["framed", "t5"])
@pytest.mark.parametrize("settings", [{}, {"span_length": None}, {"span_length": 1.0, "probability": 0.5}])
@pytest.mark.parametrize("length", [1, 2, 5, 17])
def test_what_is_written_fills_the_sentinels(words, settings, length):
    text = np.arange(4, 4 + length)
    ids = np.concatenate([[1], text, [2]]) if words is WORDS else np.append(text, 2)
    for position in range(30):
        given, written = (make(part, ids, position, words, **settings) for part in ("given", "written"))
        hidden = spans(written.ids.tolist(), words)
        assert list(hidden) == list(words.sentinels[: len(hidden)]) and all(hidden.values())
        assert [one for one in given.ids.tolist() if one in words.sentinels] == list(hidden)
        assert put_back(given.ids.tolist(), hidden) == ids.tolist()
        assert given.labels is None and written.labels.tolist() == [*written.ids[1:], -100]
        places = np.flatnonzero(np.isin(given.ids, words.sentinels))
        assert (np.diff(places) > 1).all(), "neighbours are one span"


def test_shares_and_lengths_of_spans():
    ids = np.arange(4, 44)
    words = replace(T5, sentinels=tuple(range(100, 140)))
    for settings, number, mean in (
        ({"probability": 0.3}, 12, 3.0),
        ({"probability": 0.3, "span_length": 2.0}, 12, 2.0),
        ({"probability": 0.31, "span_length": None}, 12, None),
    ):
        first = set()
        for position in range(40):
            hidden = spans(make("written", ids, position, words, **settings).ids.tolist(), words)
            lengths = [len(one) for one in hidden.values()]
            assert sum(lengths) == number
            assert mean is None or np.mean(lengths) == mean
            first.add(next(iter(hidden.values()))[0])
        assert len(first) > 5, "places are drawn"


def test_whole_words_are_hidden():
    """Of three words, of two, three and one piece, one is hidden as a whole."""
    ids, starts = np.array([1, 10, 11, 12, 13, 14, 15, 2]), np.array([0, 1, 0, 1, 0, 0, 1, 0], dtype=bool)
    found = set()
    for position in range(30):
        settings = {"starts": starts, "whole_word": True, "span_length": None}
        hidden = spans(make("written", ids, position, **settings).ids.tolist(), WORDS)
        found.add(tuple(next(iter(hidden.values()))))
        assert len(hidden) == 1
    assert found == {(10, 11), (12, 13, 14), (15,)}


def test_what_has_no_sentinel_stays():
    ids, words = np.arange(4, 34), replace(T5, sentinels=(60, 61))
    for position in range(10):
        given, written = (
            make(part, ids, position, words, probability=0.5, span_length=1.0) for part in ("given", "written")
        )
        hidden = spans(written.ids.tolist(), words)
        assert list(hidden) == [60, 61] and put_back(given.ids.tolist(), hidden) == ids.tolist()


def test_an_empty_text_and_a_tokenizer_without_sentinels():
    empty = make("written", np.array([1, 2]), 0)
    assert empty.ids.tolist() == [1, 2] and empty.labels.tolist() == [2, -100]
    assert make("given", np.array([1, 2]), 0).ids.tolist() == [1, 2]
    with pytest.raises(ValueError, match="needs a tokenizer with sentinels, which this one has not; use T5's"):
        make("given", np.arange(1, 9), 0, replace(WORDS, sentinels=()))


def model_of(**settings) -> Model:
    small = tiny_model("single_stream", ("itm",))
    config = small.config.model_copy(update={"decoder": DecoderConfig(**SIZES, memory="both")})
    return build_model(config, {"span_corruption": SpanCorruptionConfig(**settings)})


def batch_of(model: Model, number: int = 4) -> Batch:
    batch, texts = tiny_batch(number), {}
    clean = batch.texts["clean"]
    for name, view in model.text_views().items():
        made = []
        for position, (ids, keep) in enumerate(zip(clean.ids, clean.keep, strict=True)):
            own = ids[keep].numpy()
            made.append(view.make(own, np.ones(len(own), bool), WORDS, Draw(0).sample(draws_of(name, view), position)))
        texts[name] = pad_texts(made, view.attention, 0, 8)
    return replace(batch, texts={**batch.texts, **texts})


@pytest.mark.parametrize(("head", "scale"), [("bare", 1.0), ("scaled", SIZES["width"] ** -0.5)])
def test_loss_by_hand(head, scale):
    model = model_of(head=head, mask_probability=0.5).eval()
    batch = batch_of(model)
    with torch.no_grad():
        found = model.losses(batch, Draw(0))["span_corruption"]
        name = Decode(Fuse("clean", GIVEN), WRITTEN)
        states = model.run([name], batch)[name].states
        labels = batch.texts[WRITTEN].labels
        logits = states * scale @ model.decoder.word_embedding.T
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(found.loss, expected, atol=1e-6)
    assert model.objectives["span_corruption"].count(batch).item() == (labels != -100).sum().item()


def test_texts_alone_and_what_it_needs():
    model = model_of(alone=True)
    alone = replace(batch_of(model), images={})
    assert model.losses(alone, Draw(0))["span_corruption"].loss.isfinite()
    small = tiny_model("single_stream", ("itm",))
    with pytest.raises(ValueError, match="needs a fusion that reads the text and a decoder that writes"):
        build_model(small.config, {"span_corruption": SpanCorruptionConfig()})
