"""Spans that the data name: from characters to tokens, masked whole at their rates, and what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import tiny_batch, tiny_model

from encoders.types import Vocabulary
from objectives import MlmConfig
from objectives.base import Draw
from objectives.mlm import MaskedView
from objectives.spans import SpannedView, with_spans
from vlp.data.batch import Example, collate
from vlp.data.fetch import pair_example
from vlp.data.loader import DataConfig, Loader
from vlp.data.reader import BadSample, RawSample, Sample
from vlp.data.spans import one_caption, spans_of, token_spans
from vlp.data.tokenizer import TokenizerConfig, build_tokenizer
from vlp.data.transforms import ImageTransformConfig
from vlp.train.reading import check_spans

WORDS = Vocabulary(40, pad=0, cls=1, sep=2, mask=3, bos=1, eos=2)
IDS = np.array([1, 10, 11, 12, 13, 14, 15, 2])
STARTS = np.array([0, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
CAPTION = "a brown dog sits, on the grass"
NODES = [[2, 7, "attribute"], [8, 11, "object"], [12, 20, "relation"], [25, 30, "object"]]


def view(**shares) -> SpannedView:
    found = with_spans(MaskedView(1e-9, False), shares)
    assert isinstance(found, SpannedView)
    return found


def masked(spanned: SpannedView, spans, seed: int = 0):
    return spanned.make_spanned(IDS, STARTS, WORDS, np.random.default_rng(seed), spans)


def test_a_span_is_masked_whole_at_its_rate():
    spans = [(1, 3, "object"), (4, 5, "relation"), (5, 7, "other")]
    made = [masked(view(object=0.3, relation=1.0), spans, seed) for seed in range(1500)]
    hidden = np.stack([one.labels != -100 for one in made])
    assert hidden.mean(0) == pytest.approx([0, 0.3, 0.3, 0, 1, 0, 0, 0], abs=0.04)
    assert (hidden[:, 1] == hidden[:, 2]).all()
    assert all((one.labels[hid] == IDS[hid]).all() for one, hid in zip(made, hidden, strict=True))
    shown = np.stack([one.ids for one in made])
    assert (shown[~hidden] == np.broadcast_to(IDS, shown.shape)[~hidden]).all()
    first = shown[hidden[:, 1]][:, 1:3]
    assert (first == 3).all(1).mean() == pytest.approx(0.8, abs=0.06)  # both tokens, or neither
    assert ((first == 3).any(1) == (first == 3).all(1)).all()
    assert (first == IDS[1:3]).all(1).mean() == pytest.approx(0.1, abs=0.05)
    assert not np.isin(first[(first != 3).all(1)], [0, 1, 2]).any()


def test_words_are_masked_as_without_spans():
    plain, draws = MaskedView(0.4, False), [np.random.default_rng(5) for _ in range(3)]
    spanned = SpannedView(plain, (("object", 0.5),))
    alone = plain.make(IDS, STARTS, WORDS, draws[0])
    for found in (spanned.make(IDS, STARTS, WORDS, draws[1]), spanned.make_spanned(IDS, STARTS, WORDS, draws[2], [])):
        assert (found.ids == alone.ids).all() and (found.labels == alone.labels).all()
    assert with_spans(plain, {}) is plain and spanned.attention == "full"


def test_what_follows_the_caption_is_left_alone():
    ids = np.array([1, 10, 11, 2, 12, 13, 2])
    found = view(object=1.0).make_spanned(ids, ids > 9, WORDS, np.random.default_rng(0), [(1, 6, "object")])
    assert found.labels.tolist() == [-100, 10, 11, -100, -100, -100, -100]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TokenizerConfig(size=120, min_frequency=1), [CAPTION.replace("dog", "dot fog")] * 3)


def test_characters_become_tokens(tokenizer):
    ids, starts = tokenizer.encode(CAPTION, 32)
    for first, end, kind in NODES:
        ((begin, stop, found),) = token_spans(tokenizer, CAPTION, [(first, end, kind)], 32)
        said = tokenizer.decode(ids[begin:stop]).replace(" ", "")
        assert (said, found) == (CAPTION[first:end].replace(" ", ""), kind)
        assert starts[begin]
    assert token_spans(tokenizer, CAPTION, [(25, 30, "object")], 5) == []  # cut off


def test_spans_of_each_caption():
    one = Sample("k", (), (CAPTION,), {"spans": NODES})
    assert spans_of(one, "spans", CAPTION) == tuple(map(tuple, NODES))
    assert spans_of(one, "spans", "another text") == ()
    two = Sample("k", (), ("a cat", CAPTION), {"spans": [[], NODES]})
    assert spans_of(two, "spans", "a cat") == () and len(spans_of(two, "spans", CAPTION)) == 4
    alone = one_caption(two, 1, "spans")
    assert alone.texts == (CAPTION,) and len(spans_of(alone, "spans", CAPTION)) == 4
    assert spans_of(Sample("k", (), ("ab",), {"spans": '[[0, 1, "x"]]'}), "spans", "ab") == ((0, 1, "x"),)
    assert one_caption(two, 0, None).fields == two.fields


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "no list in spans"),
        ("{", "no list in spans"),
        ([NODES, NODES], "has not a list for each of its 1 captions"),
        ([[[0, 99, "object"]]], "within a caption of 30 characters"),
        ([[[4, 4, "object"]]], "is no"),
        ([[["dog", "object"]]], "is no"),
    ],
)
def test_bad_spans_are_bad_samples(value, said):
    with pytest.raises(BadSample, match=said):
        spans_of(Sample("k", (), (CAPTION,), {"spans": value}), "spans", CAPTION)


class Reader:
    fingerprint = "abc"

    def __len__(self):
        return 6

    def __getitem__(self, index):
        from test_loader import png

        return RawSample(f"k{index}", "memory", {"png": png(index)}, {"captions": [CAPTION], "spans": NODES})


@pytest.mark.parametrize("texts", [1, 2])
def test_the_loader_masks_what_the_data_name(tokenizer, texts, monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.path.parents[1] / "vlp" / "data"))
    settings = {"spans": "spans", "workers": 0, "texts_per_image": texts}
    data = DataConfig(**settings, transform=ImageTransformConfig(image_size=4))
    views = {"masked": view(object=1.0)}
    ((batch,),) = Loader(Reader(), pair_example, tokenizer, views, data, seed=3, global_batch=6).steps(0, 6)
    labels = batch.texts["masked"].labels
    assert {tokenizer.decode(row[row != -100]) for row in labels} == {"dog grass"}


def test_it_is_masked_language_modelling():
    model = tiny_model("single_stream", {"mlm": MlmConfig(spans={"object": 1.0})})
    assert model.losses(tiny_batch(3), Draw(0))["mlm"].loss.isfinite()
    found = model.text_views()["masked"]
    assert isinstance(found, SpannedView) and found == with_spans(MaskedView(0.15, False), {"object": 1.0})
    with pytest.raises(ValueError, match=r"masks spans of kinds \['object'\], but data.spans names no field"):
        check_spans(model.text_views(), DataConfig())
    check_spans(model.text_views(), DataConfig(spans="nodes"))
    with pytest.raises(ValueError, match="spans"):
        MlmConfig(spans={"object": 1.5})


def test_a_batch_without_spans_is_masked_alike(tokenizer):
    """The setting moves no draw of other texts."""
    examples = [Example("k", (torch.zeros(3, 4, 4, dtype=torch.uint8),), CAPTION)]
    plain = MaskedView(0.4, False)
    made = [
        collate(examples, [7], tokenizer, {"masked": one}, 32, 0) for one in (plain, with_spans(plain, {"object": 1.0}))
    ]
    assert torch.equal(made[0].texts["masked"].ids, made[1].texts["masked"].ids)
