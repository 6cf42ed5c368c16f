"""Sublayers filled from a BERT: ViLBERT's text stream, and a stack that both streams share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from encoders.text import TextConfig
from encoders.types import Tokens
from vlp.fusion.sublayers import Sublayers, SublayersConfig

SIZES = {"width": 32, "heads": 4, "hidden": 64, "eps": 1e-12}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> BertModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=50, **sizes)).eval()  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    model.folder = folder  # type: ignore[assignment]
    return model


def build(folder: Path, *sublayers: str) -> Sublayers:
    config = SublayersConfig(**SIZES, sublayers=sublayers, image_width=48, init=str(folder))  # type: ignore[arg-type]
    fusion = config.build(48, 32, frozenset({"text"})).eval()
    fusion.load_pretrained()
    return fusion


def test_a_text_by_itself_is_what_bert_makes_of_it(bert: BertModel) -> None:
    """The layers in which the streams read each other are left out where there is no image."""
    fusion = build(bert.folder, "tt", "t", "tt vv", "t v", "tt", "t")  # type: ignore[arg-type]
    states, keep = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    found = fusion(None, Tokens(states, keep, states[:, 0])).text
    assert found is not None
    torch.testing.assert_close(found.states, bert.encoder(states).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_only_what_reads_its_own_text_is_filled(bert: BertModel) -> None:
    fusion = build(bert.folder, "tt", "t", "tv vt", "t v", "tt vv", "t v")  # type: ignore[arg-type]
    theirs = bert.encoder.layer
    attention = [fusion.sublayers[n].text.attention.query.weight for n in (0, 2, 4)]
    feeds = [fusion.sublayers[n].text.feed.up.weight for n in (1, 3, 5)]
    for ours, layer in ((0, 0), (2, 1)):
        assert torch.equal(attention[ours], theirs[layer].attention.self.query.weight)
        assert torch.equal(feeds[ours], theirs[layer].intermediate.dense.weight)
    for other in (attention[1], feeds[1]):
        assert not any(torch.equal(other, w) for w in bert.parameters() if w.shape == other.shape)


def test_a_bert_of_too_few_layers_is_refused(bert: BertModel) -> None:
    with pytest.raises(ValueError, match=r"has no blocks\.3"):
        build(bert.folder, *("tt", "t") * 4)  # type: ignore[arg-type]


def test_norms_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"normformer true: sublayers have no norms of that kind"):
        SublayersConfig(layers=1).beside(TextConfig(width=32, heads=2, normformer=True)).build(32, 32, frozenset())
