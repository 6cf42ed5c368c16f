"""False captions that are like the true one (InterBERT's hard negatives): TF-IDF, and the pairs that a loader makes."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vlp.data.alike import AlikeCaptions, alike_captions, words_of
from vlp.data.batch import caption_hash
from vlp.data.fetch import pair_example
from vlp.data.loader import DataConfig, Loader
from vlp.data.pairing import PairingConfig
from vlp.data.reader import open_reader
from vlp.data.tokenizer import TokenizerConfig, build_tokenizer

NOUNS, COLOURS, PLACES = ["dog", "cat", "bus", "cup", "tree"], ["red", "blue", "green"], ["park", "street", "room"]


def drawn(number: int) -> list[list[str]]:
    """Captions of samples, one or two each; "a" and "the" are in all of them."""
    generator = np.random.default_rng(0)

    def caption() -> str:
        noun, colour, place = (one[int(generator.integers(len(one)))] for one in (NOUNS, COLOURS, PLACES))
        return f"A {colour} {noun}, the {noun} of number {int(generator.integers(60))} in the {place}!"

    return [[caption() for _ in range(1 + n % 2)] for n in range(number)]


def cosines(captions: list[list[str]], text: str) -> np.ndarray:
    """By dense vectors: counts times ln((1 + S) / (1 + n)) + 1, of words that at most a tenth of the samples have."""
    documents = [Counter(word for one in each for word in one.lower().replace(",", "").replace("!", "").split())
                 for each in captions]  # fmt: skip
    having = Counter(word for document in documents for word in document)
    words = sorted(word for word, n in having.items() if n <= len(captions) / 10)
    assert 10 < len(words) < len(having), "some words are common, some are not"

    def vector(counts: Counter[str]) -> np.ndarray:
        found = np.array([counts[w] * (math.log((1 + len(captions)) / (1 + having[w])) + 1) for w in words])
        return found / max(float(np.linalg.norm(found)), 1e-12)

    own = vector(Counter(text.lower().replace(",", "").replace("!", "").split()))
    return np.array([vector(document) @ own for document in documents])


def test_nearest_are_those_of_the_largest_cosine() -> None:
    captions = drawn(90)
    index = alike_captions(captions)
    for number in (0, 7, 30):
        text = captions[number][-1]
        wanted = cosines(captions, text)
        wanted[number] = 0
        found = index.nearest(number, text, 10)
        order = np.argsort(-wanted.round(9), kind="stable")
        order = order[wanted[order] > 0][:10]
        np.testing.assert_allclose(wanted[found], wanted[order], rtol=1e-5)
        assert number not in found
    assert len(index.nearest(0, "the of a in", 10)) == 0, "common words say nothing"
    assert len(index.nearest(0, "unheard words", 10)) == 0


def test_what_is_equally_alike_goes_by_number() -> None:
    captions = [[f"one{n} word"] for n in range(60)] + [["rare thing"]] * 5
    index = alike_captions(captions)
    assert index.nearest(62, "rare thing", 3).tolist() == [60, 61, 63]
    assert index.nearest(0, "rare thing", 9).tolist() == [60, 61, 62, 63, 64]


def test_no_captions_at_all() -> None:
    empty = alike_captions([[], []])
    assert isinstance(empty, AlikeCaptions) and empty.nearest(0, "a word", 3).tolist() == []
    assert words_of("Don't stop, café 2!") == ["don", "t", "stop", "café", "2"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alike") / "captions.jsonl"
    path.write_text("".join(json.dumps({"captions": each}) + "\n" for each in drawn(90)))
    return path


def loader_of(table: Path, **pairing: object) -> Loader:
    texts = [caption for each in drawn(90) for caption in each]
    tokenizer = build_tokenizer(TokenizerConfig(size=400, min_frequency=1), iter(texts))
    config = DataConfig(
        train=str(table), only="text", workers=0, pairing=PairingConfig.model_validate({"false_text": 1.0, **pairing})
    )
    return Loader(open_reader(str(table), image=()), pair_example, tokenizer, {}, config, seed=3, global_batch=30)


def captions_of(loader: Loader, start: int = 0) -> list[int]:
    """Hashes of the captions of each position."""
    return [int(i) for (batch,) in loader.steps(start, 90) for i in batch.caption_id]


def test_a_loader_makes_pairs_false_by_captions_that_are_alike(table: Path) -> None:
    captions, hard = drawn(90), loader_of(table, false_from="alike", alike=5)
    of = {caption_hash(caption): n for n, each in enumerate(captions) for caption in each}
    tables = {n: cosines(captions, each[0]) for n, each in enumerate(captions) if len(each) == 1 and n < 40}
    shown, likeness = captions_of(hard), {}
    for name, found in (("alike", shown), ("any", captions_of(loader_of(table)))):
        scores = []
        for position, one in enumerate(found):
            own = hard.order.index(position)
            assert of[one] != own and one not in {caption_hash(caption) for caption in captions[own]}
            if own in tables:
                scores.append(tables[own][of[one]])
                ranks = np.sort(np.delete(tables[own], own))[::-1]
                assert name == "any" or scores[-1] >= ranks[4] - 1e-6, "among the five that are the most alike"
        likeness[name] = float(np.mean(scores))
    assert likeness["alike"] > 2 * likeness["any"]
    assert captions_of(loader_of(table, false_from="alike", alike=5), 60) == shown[60:], "a resumed run has the same"
