"""What is masked together: a segment of words, and regions that overlap an anchor (InterBERT)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SIZES, VOCABULARY

from encoders import RegionConfig, TextConfig
from encoders.types import Vocabulary
from objectives import MlmConfig, MrmConfig
from objectives.base import Draw
from objectives.mlm import MaskedView
from objectives.mrm import MaskedRegions, RegionTargetConfig
from vlp.fusion.single import SingleStreamConfig
from vlp.model import Model, ModelConfig, build_model
from vlp.show import synthetic_batch

WORDS = Vocabulary(size=50, pad=0, cls=1, sep=2, mask=3, bos=1, eos=2)


def masks(words: int, number: int, whole_word: bool = False) -> np.ndarray:
    """Which of a text's words are to be predicted, [number, words]; every second begins a word where that counts."""
    ids = np.array([1, *range(10, 10 + words), 2])
    starts = np.array([False, *(n % 2 == 0 for n in range(words)), False])
    view, draw = MaskedView(0.15, whole_word, segment=True), Draw(5)
    found = [view.make(ids, starts, WORDS, draw.sample("masked", n)) for n in range(number)]
    for one in found:
        assert one.labels is not None
        shown = one.labels == -100
        assert (one.ids[shown] == ids[shown]).all() and (one.labels[~shown] == ids[~shown]).all()
        assert shown[0] and shown[-1], "special ids are never masked"
    return np.stack([one.labels != -100 for one in found if one.labels is not None])[:, 1:-1]


def test_words_of_a_segment_follow_each_other() -> None:
    found = masks(8, 4000)
    edges = np.abs(np.diff(np.pad(found, ((0, 0), (1, 1))).astype(int), axis=1)).sum(1)
    assert set(edges.tolist()) == {0, 2}, "one segment, or none where it begins behind the text"
    # It begins at 0..8 and is 1..8 long: enumerate both.
    every = np.array([[b <= n < b + size for n in range(8)] for b in range(9) for size in range(1, 9)])
    np.testing.assert_allclose(found.mean(0), every.mean(0), atol=0.03)
    sizes = [np.bincount(x.sum(1), minlength=9) / len(x) for x in (found, every)]
    np.testing.assert_allclose(sizes[0], sizes[1], atol=0.03)


def test_short_texts_have_no_segment_and_words_stay_whole() -> None:
    assert not masks(3, 50).any() and masks(4, 50).any()
    found = masks(8, 200, whole_word=True)
    assert (found[:, ::2] == found[:, 1::2]).all() and found.any()


def test_the_masks_of_other_recipes_are_what_they_were() -> None:
    ids, starts = np.arange(1, 40), np.ones(39, dtype=bool)
    one, two = (MaskedView(0.3, False, segment=flag) for flag in (False, True))
    plain = one.make(ids, starts, WORDS, np.random.default_rng(0))
    assert plain.labels is not None
    assert (plain.labels != -100).tolist() != (
        two.make(ids, starts, WORDS, np.random.default_rng(0)).labels != -100
    ).tolist()
    choose = np.random.default_rng(0).random(39)
    assert ((plain.labels != -100) == ((choose < 0.3) & ~np.isin(ids, list(WORDS.special)))).all()


def test_regions_that_overlap_an_anchor_are_hidden_and_predicted() -> None:
    left = np.array([0.0, 0.1, 0.5, 0.55, 0.9])[:, None]
    boxes = np.concatenate([left, 0 * left, left + 0.4, 0 * left + 1], 1)  # 0 and 1 overlap by 0.6, 2 and 3 by 0.78
    for seed in range(30):
        alone = MaskedRegions(0.3, 1.0, 0.0, 0.4).make(boxes, np.random.default_rng(seed))
        found = MaskedRegions(0.3, 1.0, 0.0, 0.4, True).make(boxes, np.random.default_rng(seed))
        assert (found.masked == alone.masked).all() and (found.predict == found.masked).all()
        assert found.predict[0] == found.predict[1] and found.predict[2] == found.predict[3]
        assert (alone.predict <= found.predict).all()


def model_of(**mrm: object) -> Model:
    target = {"classes": RegionTargetConfig(outputs=7)}
    config = ModelConfig(
        vision=RegionConfig(features=12, width=32, number=9),
        text=TextConfig(**SIZES | {"layers": 0}, vocabulary_size=VOCABULARY, max_length=16),
        fusion=SingleStreamConfig(**SIZES, modality_embedding=False),
    )
    return build_model(config, {"mlm": MlmConfig(), "mrm": MrmConfig(targets=target, **mrm)}).eval()  # type: ignore[arg-type]


def test_regions_of_false_pairs_do_not_count() -> None:
    torch.manual_seed(0)
    model = model_of(matched=True)
    batch = synthetic_batch(model, 4, 10, device="cpu")
    features = torch.randn(4, 9, 12)
    target = torch.randn(4, 9, 7).softmax(-1)
    shown = {name: replace(one, features=features) for name, one in batch.images.items()}
    shown["masked"] = replace(shown["masked"], targets={"classes": target})
    batch = replace(batch, images=shown, targets={"match": torch.tensor([1, 0, 2, 1])})

    def loss_of(rows: list[int], model: Model) -> tuple[float, int]:
        at = torch.tensor(rows)
        pick = {n: replace(r, features=r.features[at], boxes=r.boxes[at]) for n, r in batch.images.items()}
        masked = batch.images["masked"].masked[at]
        pick["masked"] = replace(pick["masked"], masked=masked, predict_at=None, targets={"classes": target[at]})
        texts = {n: replace(t, ids=t.ids[at], keep=t.keep[at]) for n, t in batch.texts.items() if n == "clean"}
        some = replace(batch, images=pick, texts=texts, targets={}, image_id=None, caption_id=None, position=None)
        return model.losses(some, Draw(0), ["mrm"])["mrm"].loss.item(), int(masked.sum())

    found = model.losses(batch, Draw(0), ["mrm"])["mrm"].loss.item()
    wanted, number = loss_of([0, 2, 3], model)
    assert found == pytest.approx(wanted, rel=1e-4) and int(model.counts(batch, ["mrm"])["mrm"]) == number
    every = model_of()
    every.load_state_dict(model.state_dict())
    assert every.losses(batch, Draw(0), ["mrm"])["mrm"].loss.item() == pytest.approx(
        loss_of([0, 1, 2, 3], every)[0], rel=1e-4
    )


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objectives\.mrm\.overlap is not set; set it, as 0\.4"):
        model_of(overlap_predicted=True)
