"""Ranking: each image's own text among false ones."""

import pytest
import torch
from helpers import tiny_batch, tiny_model
from torch.nn import functional as F

from objectives import RankConfig
from objectives.base import Draw, Fuse, Replay


@pytest.fixture
def model():
    return tiny_model("single_stream", {"rank": RankConfig(negatives=2)}).eval()


def test_loss_is_the_cross_entropy_of_the_own_text(model):
    batch = tiny_batch(4)
    draw = Replay({"rank.own": torch.arange(4), "rank.false": torch.tensor([1, 2, 3, 0, 1, 3, 2, 0])})
    rows = model.objectives["rank"].rows(model.run([], batch), batch, draw)["rank"]
    assert rows.image_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert rows.text_index.tolist() == [0, 1, 2, 1, 3, 0, 2, 1, 3, 3, 2, 0]
    pooled = model.run([Fuse(rows="rank")], batch, rows={"rank": rows})[Fuse(rows="rank")].pooled
    scores = model.objectives["rank"].head(pooled).view(4, 3)
    out = model.losses(batch, draw)["rank"]
    torch.testing.assert_close(out.loss, F.cross_entropy(scores, torch.zeros(4, dtype=torch.long)))


@pytest.mark.parametrize("step", range(5))
def test_false_texts_are_never_true(model, step):
    batch = tiny_batch(6, ids=[0, 1, 0, 2, 3, 1])
    rows = model.objectives["rank"].rows(model.run([], batch), batch, Draw(0, step))["rank"]
    ids = batch.image_id
    same = ids[rows.image_index] == ids[rows.text_index]
    assert same.view(6, 3).tolist() == [[True, False, False]] * 6


def test_a_batch_without_false_texts_has_no_loss(model):
    assert model.losses(tiny_batch(3, ids=[7, 7, 7]), Draw(0))["rank"].loss == 0


def test_every_weight_is_trained(model):
    loss, _ = model(tiny_batch(4), Draw(0))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_it_needs_a_fusion():
    with pytest.raises(ValueError, match="rank needs a fusion"):
        tiny_model("none", {"rank": RankConfig()})
