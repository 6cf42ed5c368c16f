"""Denoising (XGPT, MASS): what is hidden and written, the loss by hand, and a decoder that shares all its weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SIZES, VOCABULARY, tiny_batch, tiny_model
from torch.nn import functional as F

from encoders.types import Batch, Vocabulary
from objectives import DenoiseConfig, LmConfig
from objectives.base import Decode, Draw, Encode, Fuse, draws_of
from objectives.denoise import FragmentView
from vlp.data.batch import pad_texts
from vlp.decoder import DecoderConfig
from vlp.model import Model, build_model

WORDS = Vocabulary(VOCABULARY, pad=0, cls=1, sep=2, mask=3, bos=1, eos=2)
IDS = np.array([1, 10, 11, 12, 13, 14, 15, 2])


def make(part: str, position: int, ids: np.ndarray = IDS, share: float = 0.5):
    view = FragmentView(part, share)
    return view.make(ids, ids > 9, WORDS, Draw(0).sample(draws_of(f"any {part}", view), position))


def model_of(share: str = "all", fusion: str = "single_stream", **objectives: DenoiseConfig | LmConfig) -> Model:
    small = tiny_model(fusion, ("itm",))
    config = small.config.model_copy(update={"decoder": DecoderConfig(**SIZES, share=share, memory="both")})
    return build_model(config, objectives or {"denoise": DenoiseConfig()})


def batch_of(model: Model, number: int = 4) -> Batch:
    batch, texts = tiny_batch(number), {}
    clean = batch.texts["clean"]
    rows = [ids[keep].numpy() for ids, keep in zip(clean.ids, clean.keep, strict=True)]
    for name, view in model.text_views().items():
        draws = [Draw(0).sample(draws_of(name, view), position) for position in range(number)]
        made = [view.make(ids, ids > 3, WORDS, draw) for ids, draw in zip(rows, draws, strict=True)]
        texts[name] = pad_texts(made, view.attention, 0, 8)
    return replace(batch, texts={**batch.texts, **texts})


def test_parts_hide_the_same_fragment_anywhere():
    places = set()
    for position in range(60):
        one, each, text, fragment = (make(part, position) for part in ("one", "each", "text", "fragment"))
        hidden = np.flatnonzero(each.ids == 3)
        places.add(int(hidden[0]))
        assert len(hidden) == 3 and (np.diff(hidden) == 1).all()
        assert (each.ids[each.ids != 3] == np.delete(IDS, hidden)).all()
        assert one.ids.tolist() == [*IDS[: hidden[0]], 3, *IDS[hidden[-1] + 1 :]]
        assert text.ids.tolist() == [1, 10, 11, 12, 13, 14, 15, 2]
        assert fragment.ids.tolist() == [1, *IDS[hidden], 2]
        for written in (text, fragment):
            assert written.labels.tolist() == [*written.ids[1:], -100]
        assert one.labels is None and each.labels is None
    assert places == {1, 2, 3, 4}
    assert make("one", 0, share=1.0).ids.tolist() == [1, 3, 2]
    assert make("each", 0, share=0.01).ids.tolist().count(3) == 1


def test_a_text_without_words():
    nothing = np.array([1, 2])
    assert make("one", 0, nothing).ids.tolist() == make("each", 0, nothing).ids.tolist() == [1, 2]
    assert make("fragment", 0, nothing).labels.tolist() == [2, -100]
    with pytest.raises(ValueError, match=r"needs a tokenizer with a mask token.*data.tokenizer.add_mask true"):
        FragmentView("one", 0.5).make(IDS, IDS > 9, replace(WORDS, mask=None), np.random.default_rng(0))


@pytest.mark.parametrize("write", ["text", "fragment"])
def test_loss_as_written_by_hand(write):
    model = model_of(denoise=DenoiseConfig(write=write)).eval()
    batch, objective = batch_of(model), model.objectives["denoise"]
    assert objective.written == Decode(Fuse("clean", "denoise:one/0.5"), f"denoise:{write}/0.5")
    states, text = model.run([objective.written], batch)[objective.written].states, batch.texts[f"denoise:{write}/0.5"]
    terms = [
        F.cross_entropy(objective.head(states[row, at]), text.labels[row, at])
        for row, at in (text.labels != -100).nonzero().tolist()
    ]
    found = model.losses(batch, Draw(0))["denoise"]
    torch.testing.assert_close(found.loss, torch.stack(terms).mean())
    assert objective.count(batch) == len(terms)


def test_a_decoder_that_shares_everything():
    """It has no weight of its own; what it reads of a memory goes through the encoder's own attention."""
    model = model_of(lm=LmConfig(), ida=DenoiseConfig(), imlm=DenoiseConfig(masks="each", write="fragment")).eval()
    own = {id(p) for p in model.decoder.parameters()} - {
        id(p) for p in [*model.fusion.parameters(), *model.text.parameters()]
    }
    assert own == set()
    batch = batch_of(model, 2)
    passes = [Encode("image"), Decode(Encode("image"), "causal")]
    found = model.run(passes, batch)
    states, image = model.decoder.embeddings(batch.texts["causal"]), found[passes[0]].states
    seen = (
        torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril()
        & batch.texts["causal"].keep[:, None, None]
    )
    for block in model.fusion.blocks:
        attention, norm = block.attention, block.attention_norm
        states = norm(states + attention(states, attention.project(states), seen))
        states = norm(states + attention(states, attention.project(image)))
        states = block.feed_norm(states + block.feed(states))
    keep = batch.texts["causal"].keep
    torch.testing.assert_close(found[passes[1]].states[keep], states[keep])


def test_every_weight_is_trained():
    model = model_of(lm=LmConfig(), ida=DenoiseConfig(), imlm=DenoiseConfig(masks="each", write="fragment"))
    model(batch_of(model), Draw(0))[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="denoise needs a fusion that reads the text and a decoder"):
        tiny_model("none", {"denoise": DenoiseConfig()})
    with pytest.raises(
        ValueError, match=r"decoder.share all needs model.fusion single_stream with 2 layers and width 32"
    ):
        model_of(fusion="dual_stream")


def test_a_decoder_that_shares_everything_of_a_pre_norm_stack_with_more_norms():
    sizes = SIZES | {"norm": "pre", "normformer": True}
    small = tiny_model("single_stream", ("itm",)).config
    parts = {
        "fusion": small.fusion.model_copy(update=sizes),
        "decoder": DecoderConfig(**sizes, share="all", memory="both"),
    }
    model = build_model(small.model_copy(update=parts), {"denoise": DenoiseConfig()})
    given = {id(p) for p in [*model.fusion.parameters(), *model.text.parameters()]}
    assert [name for name, p in model.decoder.named_parameters() if id(p) not in given] == []
