"""Captions with words changed: each operation by itself, what is drawn, the file of synonyms, and the loader's view."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from test_loader import MemoryReader

from objectives.multiview_itc import EditedView
from vlp.data.edits import EditConfig, edit, replaced, shortened, swapped
from vlp.data.fetch import pair_example
from vlp.data.loader import DataConfig, Loader
from vlp.data.tokenizer import TokenizerConfig, build_tokenizer
from vlp.data.transforms import ImageTransformConfig

WORDS = ["a", "small", "dog", "runs", "on", "green", "grass"]


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def edits(config: EditConfig, text: str = " ".join(WORDS), number: int = 600) -> list[str]:
    return [edit(text, config, random(seed)) for seed in range(number)]


def test_two_words_change_places():
    for seed in range(20):
        found = swapped(WORDS, 1, random(seed))
        assert sum(one != other for one, other in zip(found, WORDS, strict=True)) == 2
        assert sorted(found) == sorted(WORDS)


def test_a_share_of_the_words_is_left_out():
    counts = [len(shortened(WORDS, 0.3, random(seed))) for seed in range(400)]
    assert np.mean(counts) == pytest.approx(7 * 0.7, abs=0.2)
    assert Counter(len(shortened(WORDS, 0.999, random(seed))) for seed in range(50)) == {1: 50}
    assert shortened(WORDS, 0.0, random()) == WORDS


def test_words_get_synonyms_wherever_they_stand():
    table = {"dog": ("hound", "puppy"), "grass": ("lawn",)}
    found = {" ".join(replaced(["Dog,", "a", "dog", "on", "grass."], table, 1, random(seed))) for seed in range(40)}
    assert found == {"hound, a hound on grass.", "puppy, a puppy on grass.", "Dog, a dog on lawn."}
    assert replaced(["stone"], table, 1, random()) == ["stone"]
    both = " ".join(replaced(["dog", "grass"], table, 5, random()))
    assert both in {"hound lawn", "puppy lawn"}


def test_operations_are_drawn_alike(tmp_path):
    kinds = Counter(
        "swap" if len(text.split()) == 7 and text != " ".join(WORDS) else "short"
        for text in edits(EditConfig(delete=0.9))
    )
    assert kinds["swap"] == pytest.approx(300, abs=50)
    table = tmp_path / "synonyms.tsv"
    table.write_text("dog\thound\tpuppy\n\nalone\n", encoding="utf-8")
    config = EditConfig(delete=0.9, synonyms=str(table))
    assert sum("hound" in text or "puppy" in text for text in edits(config)) == pytest.approx(200, abs=50)
    assert set(edits(EditConfig(), "dog", 20)) == {"dog"}
    assert set(edits(config, "dog", 60)) == {"dog", "hound", "puppy"}


def test_mistakes_in_the_file_of_synonyms(tmp_path):
    def message(path) -> str:
        with pytest.raises(ValueError) as error:
            edits(EditConfig(synonyms=str(path)))
        return str(error.value)

    assert "cannot be read" in message(tmp_path / "none.tsv")
    (tmp_path / "lines.tsv").write_text("dog hound\n", encoding="utf-8")
    assert "no line has a word, a tab and a synonym" in message(tmp_path / "lines.tsv")


def loaded(config: EditConfig) -> list[str]:
    tokenizer = build_tokenizer(TokenizerConfig(size=256, min_frequency=1), [" ".join(WORDS)])
    reader = MemoryReader(12, texts={i: [" ".join(WORDS)] for i in range(12)})
    data = DataConfig(edits=config, workers=0, transform=ImageTransformConfig(image_size=4))
    loader = Loader(reader, pair_example, tokenizer, {"edited": EditedView()}, data, seed=3, global_batch=4)
    batches = [batch for (batch,) in loader.steps(0, 12)]
    assert {tokenizer.decode(row) for batch in batches for row in batch.texts["clean"].ids} == {" ".join(WORDS)}
    return [tokenizer.decode(row) for batch in batches for row in batch.texts["edited"].ids]


def test_the_loader_changes_words_by_position():
    found = loaded(EditConfig())
    assert len(set(found)) > 4 and loaded(EditConfig()) == found != loaded(EditConfig(delete=0.9))
