"""The sigmoid loss against its formula, written out pair by pair; ITC's label smoothing against torch's."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import tiny_batch, tiny_model
from torch.nn import functional as F

from objectives import ItcConfig, SigmoidConfig
from objectives.base import Draw, Embed
from vlp.model import EmbedConfig, ModelConfig, build_model


def model_with(objective, **embed):
    config = tiny_model("none", ("itc",)).config
    config = ModelConfig.model_validate(config.model_dump() | {"embed": EmbedConfig(width=16, **embed).model_dump()})
    return build_model(config, {"contrast": objective}).eval()


@pytest.mark.parametrize("bias", [None, -3.0])
def test_every_pair_is_a_question_of_its_own(bias):
    model = model_with(SigmoidConfig(), temperature=0.5, logit_bias=bias)
    batch = tiny_batch(4, ids=[0, 1, 0, 3])  # the first and the third show the same
    results = model.run([Embed("image"), Embed("text")], batch)
    image, text = results[Embed("image")], results[Embed("text")]
    terms = []
    for i in range(4):
        for j in range(4):
            logit = 2.0 * (image[i] @ text[j]) + (bias or 0.0)
            same = i == j or {i, j} == {0, 2}
            terms.append(F.softplus(-logit if same else logit))
    found = model.losses(batch, Draw(0))["contrast"]
    torch.testing.assert_close(found.loss, torch.stack(terms).sum() / 4)
    assert ("bias" in found.metrics) == (bias is not None)
    diagonal = model_with(SigmoidConfig(positives="diagonal"), temperature=0.5, logit_bias=bias)
    diagonal.load_state_dict(model.state_dict())
    assert diagonal.losses(batch, Draw(0))["contrast"].loss != found.loss


def test_two_texts_of_an_image_are_both_true():
    model = model_with(SigmoidConfig(positives="diagonal"), logit_bias=-1.0)
    batch = replace(tiny_batch(4), image_of_text=torch.tensor([0, 0, 1, 1]))
    batch = replace(batch, images={"clean": replace(batch.images["clean"], pixels=batch.images["clean"].pixels[:2])})
    results = model.run([Embed("image"), Embed("text")], batch)
    space = model.space()
    logits = space.logit_scale.exp() * results[Embed("image")] @ results[Embed("text")].T + space.logit_bias
    sign = torch.tensor([[1.0, 1, -1, -1], [-1, -1, 1, 1]])
    torch.testing.assert_close(model.losses(batch, Draw(0))["contrast"].loss, F.softplus(-sign * logits).sum() / 2)


def test_chance_is_the_loss_of_the_label_prior():
    objective = model_with(SigmoidConfig()).objectives["contrast"]
    n = 8
    prior = -n * (math.log(1 / n) / n + (n - 1) / n * math.log(1 - 1 / n))
    assert objective.chance(n) == pytest.approx(prior) and objective.chance(1) == 0


def test_label_smoothing_is_torchs():
    model = model_with(ItcConfig(label_smoothing=0.1, positives="diagonal"))
    batch = tiny_batch(5)
    results = model.run([Embed("image"), Embed("text")], batch)
    logits = model.space().logit_scale.exp() * results[Embed("image")] @ results[Embed("text")].T
    both = [F.cross_entropy(x, torch.arange(5), label_smoothing=0.1) for x in (logits, logits.T)]
    torch.testing.assert_close(model.losses(batch, Draw(0))["contrast"].loss, sum(both) / 2)
