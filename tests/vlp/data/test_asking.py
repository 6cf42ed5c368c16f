"""Tasks as text: what stands before texts that are read, what is written for them, and that nothing else moves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from encoders.types import Batch
from objectives.base import View
from objectives.lm import CausalView
from objectives.mlm import MaskedView
from objectives.span_corruption import GIVEN, WRITTEN, SpanView
from vlp.data.asking import ask, prefixed
from vlp.data.batch import Example, collate
from vlp.data.fetch import pair_example
from vlp.data.loader import DataConfig, Loader
from vlp.data.pairing import PairingConfig
from vlp.data.reader import BadSample, Sample, open_reader
from vlp.data.shards import write_shards
from vlp.data.tokenizer import TokenizerConfig, build_tokenizer
from vlp.train.reading import check_answer

CAPTIONS = ["a red dog runs over the green hill", "two cats sleep", "what is it"]
VIEWS: dict[str, View] = {
    "masked": MaskedView(0.4, False),
    "causal": CausalView(),
    GIVEN: SpanView("given", 0.3, None, True),
    WRITTEN: SpanView("written", 0.3, None, True),
}


@pytest.fixture(scope="module")
def tokenizer():
    words = [*CAPTIONS, "span prediction: vqa: image text match: true false yes no dog cat"]
    added = tuple(f"<extra_id_{number}>" for number in range(8))
    return build_tokenizer(TokenizerConfig(size=512, min_frequency=1, added_tokens=added), words)


def test_a_tokenizer_knows_its_sentinels(tokenizer):
    words = tokenizer.vocabulary
    assert len(words.sentinels) == 8 and set(words.sentinels) <= words.special
    assert words.sentinels == tuple(range(words.size - 8, words.size))
    assert tokenizer.decode([*tokenizer.encode("two cats", 8)[0], words.sentinels[0]]) == "two cats"


def test_words_before_texts_that_are_read(tokenizer):
    """Texts that are written have none, and what is hidden and drawn is the same without them."""
    ids = tokenizer.encode("span prediction:", 9)[0][1:-1].tolist()
    plain, asked = (
        collate([Example("k", (), text, prefix=each) for text in CAPTIONS], range(3), tokenizer, VIEWS, 24, 0)
        for each in (None, "span prediction:")
    )
    for name, text in asked.texts.items():
        for row in range(3):
            found, before = [one.ids[row][one.keep[row]].tolist() for one in (text, plain.texts[name])]
            shown = before if text.attention == "causal" else [before[0], *ids, *before[1:]]
            assert found == shown, name
    labels, before = (one.texts["masked"].labels for one in (asked, plain))
    assert torch.equal(labels[:, len(ids) + 1 : before.shape[1]], before[:, 1 : before.shape[1] - len(ids)])
    assert (labels[:, : len(ids) + 1] == -100).all() and (labels != -100).sum() == (before != -100).sum() > 0
    at = asked.texts["masked"].label_at
    assert (labels.flatten()[at[at >= 0]] != -100).all()


def test_words_before_a_text_take_their_room(tokenizer):
    batch = collate([Example("k", (), CAPTIONS[0], prefix="vqa:")], [0], tokenizer, {}, 8, 0)
    text = batch.texts["clean"]
    assert text.keep.sum() == 8 and tokenizer.decode(text.ids[0]).replace(" ", "").startswith("vqa:ared")
    with pytest.raises(ValueError, match=r"data\.prefix 'image text match:' leaves no room for a text"):
        collate([Example("k", (), CAPTIONS[0], prefix="image text match:")], [0], tokenizer, {}, 4, 0)
    with pytest.raises(ValueError, match=r"leave out data\.pairing\.second"):
        collate([Example("k", (), "a", prefix="vqa:", second="b")], [0], tokenizer, {}, 12, 0)


def test_what_is_written_is_drawn_by_its_share():
    example = Example("k", (), "is it a dog")
    for field, shares in (
        ({"yes": 0.9, "no": 0.3}, {"yes": 0.75, "no": 0.25}),
        (["no", "yes", "no", "no"], {"no": 0.75, "yes": 0.25}),
        ("yes", {"yes": 1.0}),
    ):
        sample = Sample("k", (), ("is it a dog",), {"answers": field})
        found = Counter(
            ask(example, sample, "vqa:", "answers", np.random.default_rng(seed)).other_texts["lm:answer"]
            for seed in range(400)
        )
        assert found.keys() == shares.keys()
        assert all(abs(found[text] / 400 - share) < 0.08 for text, share in shares.items())
    with pytest.raises(BadSample, match="no answer, which is to be written"):
        ask(example, sample, None, "answer", np.random.default_rng(0))
    told = [replace(example, targets={"match": np.int64(match)}) for match in (0, 1, 2)]
    words = [ask(one, sample, None, "match", np.random.default_rng(0)).other_texts["lm:answer"] for one in told]
    assert words == ["false", "true", "false"]


def test_sources_ask_in_their_own_words(tokenizer, tmp_path):
    """A run of captions, questions and pairs to judge: each batch says what its source asks, and the answer."""
    for name, items in (
        ("captions", [{"caption": f"two cats sleep {n}"} for n in range(8)]),
        ("questions", [{"question": "what is it", "answers": {"dog": 1.0}} for _ in range(8)]),
    ):
        samples = [{"__key__": f"{n:02d}", "json": one} for n, one in enumerate(items)]
        write_shards(samples, str(tmp_path / f"{name}%02d.tar"))
    captions, questions = (str(tmp_path / f"{name}00.tar") for name in ("captions", "questions"))
    sources = {
        "vqa": {"train": questions, "only": "text", "text": "question", "prefix": "vqa:", "answer": "answers"},
        "match": {
            "train": captions,
            "only": "text",
            "prefix": "image text match:",
            "answer": "match",
            "pairing": {"false_text": 0.5},
        },
    }
    config = DataConfig(train=captions, only="text", prefix="span prediction:", sources=sources, mix="joint", workers=0)
    assert config.of("match").pairing == PairingConfig(false_text=0.5) and config.of("vqa").pairing is None
    alike = config.sources["match"].model_copy(update={"pairing": PairingConfig(false_text=0.5, false_from="alike")})
    with pytest.raises(ValueError, match=r"only data\.train's captions are compared; leave it out"):
        config.model_copy(update={"sources": {"match": alike}}).of("match")
    found = run(config, tokenizer)
    assert {name: {text.split(":")[0].strip() for text, _ in pairs} for name, pairs in found.items()} == {
        "main": {"span prediction"},
        "vqa": {"vqa"},
        "match": {"image text match"},
    }
    assert {answer for _, answer in found["vqa"]} == {"dog"}
    assert {answer for _, answer in found["match"]} == {"true", "false"}


def run(config: DataConfig, tokenizer) -> dict[str, list[tuple[str, str]]]:
    """What is read and what is written, by source."""
    from vlp.data.fetch import Fetch
    from vlp.data.sources import source_seed
    from vlp.data.transforms import TrainTransform

    views = {"lm:answer": CausalView()}
    given = {
        name: Fetch(
            open_reader(config.of(name).train),
            None,
            pair_example,
            tokenizer,
            views,
            config.of(name),
            TrainTransform(config.transform),
            source_seed(0, name),
            only="text",
        )
        for name in config.sources
    }
    loader = Loader(
        open_reader(config.train),
        pair_example,
        tokenizer,
        views,
        config,
        seed=0,
        global_batch=12,
        sources=given,
    )
    found: dict[str, list[tuple[str, str]]] = {}
    for batch in (batch for step in loader.steps(0, 48) for batch in step):
        assert isinstance(batch, Batch)
        read, written = ([tokenizer.decode(row) for row in batch.texts[name].ids] for name in ("clean", "lm:answer"))
        found.setdefault(batch.source, []).extend(zip(read, written, strict=True))
    return found


def test_what_is_written_must_be_said(tmp_path):
    """Else the text that is read would be copied."""
    data = DataConfig(train="captions", sources={"vqa": {"train": "questions", "answer": "answers"}})
    views = {"lm:answer": CausalView()}
    check_answer(views, data.of("vqa"), "data.sources.vqa")
    check_answer({"causal": CausalView()}, data, "data")
    with pytest.raises(ValueError, match=r"a text would be copied; set data\.answer or data\.instruct"):
        check_answer(views, data, "data")


def test_a_gallery_reads_the_words_before_texts(tokenizer):
    texts = ["two cats sleep", "a dog"]
    found = prefixed(tokenizer, texts, "vqa:", 12)
    whole = [tokenizer.encode(f"vqa: {text}", 12)[0].tolist() for text in texts]
    assert [one.ids.tolist() for one in found] == whole
    plain = [tokenizer.encode(text, 12)[0].tolist() for text in texts]
    assert [one.ids.tolist() for one in prefixed(tokenizer, texts, None, 12)] == plain


@pytest.mark.parametrize("value", [{}, [], 3, {"a": "much"}, {"a": -1.0, "b": 2.0}, {"a": 0.0}, {"a": float("nan")}])
def test_answers_that_cannot_be_drawn_are_a_bad_sample(value):
    with pytest.raises(BadSample, match="answers"):
        ask(
            Example("k", (), "q"),
            Sample("k", (), ("q",), {"answers": value}),
            None,
            "answers",
            np.random.default_rng(0),
        )


def test_answers_as_vqa_has_them():
    sample = Sample("k", (), ("q",), {"answers": [{"answer": "yes", "answer_id": 1}] * 2})
    found = ask(Example("k", (), "q"), sample, None, "answers", np.random.default_rng(0))
    assert found.other_texts == {"lm:answer": "yes"}
