"""Token-wise contrast (FILIP): by loops over tokens, its chance level, and what it trains."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import tiny_batch, tiny_model
from torch.nn import functional as F

from encoders.types import Images, Texts
from objectives import TokenItcConfig, token_itc
from objectives.base import Draw, Embed, Encode
from objectives.token_itc import late_similarities
from vlp.train.accumulate import whole_step_objectives

DIAGONAL = {"token_itc": TokenItcConfig(positives="diagonal")}


def by_loops(left, left_keep, right, right_keep):
    found = torch.zeros(len(left), len(right))
    for r in range(len(left)):
        for s in range(len(right)):
            best = [
                max(float(a @ b) for b, real in zip(right[s], right_keep[s], strict=True) if real)
                for a, real in zip(left[r], left_keep[r], strict=True)
                if real
            ]
            found[r, s] = sum(best) / len(best)
    return found


@pytest.mark.parametrize("at_once", [2, 64])
def test_similarities_as_written_by_loops(monkeypatch, at_once):
    monkeypatch.setattr(token_itc, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    left, right = F.normalize(torch.randn(3, 4, 8), dim=2), F.normalize(torch.randn(5, 6, 8), dim=2)
    left_keep, right_keep = torch.rand(3, 4) < 0.7, torch.rand(5, 6) < 0.5
    left_keep[:, 0] = right_keep[:, 2] = True
    found = late_similarities(left, left_keep, right, right_keep)
    torch.testing.assert_close(found, by_loops(left, left_keep, right, right_keep))


def test_loss_as_written_by_hand():
    model, batch = tiny_model("none", DIAGONAL).eval(), tiny_batch(4)
    with torch.no_grad():
        found = model.run([Embed(side, tokens=True) for side in ("image", "text")], batch)
    image, text = found[Embed("image", tokens=True)], found[Embed("text", tokens=True)]
    torch.testing.assert_close(
        image, F.normalize(model.space().image(found[Encode("image")].states), dim=2), rtol=1e-5, atol=1e-6
    )
    real, keep = torch.ones(image.shape[:2], dtype=torch.bool), batch.texts["clean"].keep
    scale, own = 1 / 0.07, torch.arange(4)
    wanted = F.cross_entropy(scale * by_loops(image, real, text, keep), own)
    wanted = (wanted + F.cross_entropy(scale * by_loops(text, keep, image, real), own)) / 2
    torch.testing.assert_close(model.losses(batch, Draw(0))["token_itc"].loss, wanted)


def test_equal_inputs_are_at_chance():
    model, batch = tiny_model("none", DIAGONAL).eval(), tiny_batch(4)
    same = [0] * 4
    images = Images(batch.images["clean"].pixels[same])
    text = Texts(batch.texts["clean"].ids[same], batch.texts["clean"].keep[same])
    loss = model.losses(replace(batch, images={"clean": images}, texts={"clean": text}), Draw(0))["token_itc"].loss
    assert loss.item() == pytest.approx(model.objectives["token_itc"].chance(4), rel=1e-5) == math.log(4)


def test_it_learns_and_trains_every_weight():
    model, batch = tiny_model("none", {"token_itc": TokenItcConfig()}), tiny_batch(8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss, _ = model(batch, Draw(0))
        loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        optimizer.step()
    assert loss.item() < 0.2 * math.log(8)


def test_padding_changes_nothing():
    model, batch = tiny_model("none", DIAGONAL).eval(), tiny_batch(4)
    text = batch.texts["clean"]
    other = replace(text, ids=torch.where(text.keep, text.ids, 7))
    changed = replace(batch, texts={**batch.texts, "clean": other})
    losses = [model.losses(one, Draw(0))["token_itc"].loss for one in (batch, changed)]
    torch.testing.assert_close(*losses)


def test_it_is_not_run_over_a_whole_step_at_once():
    """Its tokens do not fit into memory together; its candidates are those of a micro-batch."""
    model = tiny_model("none", {"token_itc": TokenItcConfig()})
    assert whole_step_objectives(model, [tiny_batch(4), tiny_batch(4)]) == {}
