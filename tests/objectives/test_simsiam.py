"""SimSiam: by hand with torch's own batch norm, what stands still, what it needs, and that it does not collapse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import tiny_batch, tiny_model
from torch import nn
from torch.nn import functional as F

from encoders import RegionConfig
from encoders.types import Batch, Images
from objectives import ItcConfig, ItmConfig, MultiviewItcConfig, SimSiamConfig
from objectives.base import Draw, Embed, Encode
from objectives.simsiam import BatchNorm
from vlp.model import Model, build_model
from vlp.train.optim import OptimConfig
from vlp.train.step import TrainStep

SIZES = {"width": 24, "hidden": 8}


def model_of(**settings) -> Model:
    return tiny_model("none", {"itc": ItcConfig(), "simsiam": SimSiamConfig(**SIZES | settings)})


def two_views(number: int, first: int = 0) -> Batch:
    batch = tiny_batch(number, first=first)
    again = tiny_batch(number, first=first + 100).images["clean"].pixels
    return replace(batch, images={**batch.images, "again": Images(again)})


def with_torchs_norms(head: nn.Sequential) -> nn.Sequential:
    """The same layers with ``nn.BatchNorm1d``."""
    layers: list[nn.Module] = []
    for layer in head:
        if isinstance(layer, BatchNorm):
            norm = nn.BatchNorm1d(len(layer.weight))
            norm.load_state_dict({"weight": layer.weight, "bias": layer.bias}, strict=False)
            layers.append(norm)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("given", ["pooled", "embed"])
def test_loss_as_written_by_hand(given):
    model, batch = model_of(input=given), two_views(5)
    objective = model.objectives["simsiam"]
    passes = [Encode("image", view) for view in ("clean", "again")]
    found = model.losses(batch, Draw(0))["simsiam"]
    with torch.no_grad():
        pooled = [model.run(passes, batch)[one].pooled for one in passes]
        vectors = pooled if given == "pooled" else [model.space().image(one) for one in pooled]
        project, predict = with_torchs_norms(objective.projector), with_torchs_norms(objective.predictor)
        one, other = map(project, vectors)
        cosines = [
            F.normalize(p, dim=1) * F.normalize(z, dim=1) for p, z in ((predict(one), other), (predict(other), one))
        ]
    assert found.loss.item() == pytest.approx(-sum(each.sum(1).mean().item() for each in cosines) / 2, abs=1e-5)
    assert found.metrics["spread"].item() == pytest.approx(
        F.normalize(one, dim=1).std(0, correction=0).mean().item() * math.sqrt(24), rel=1e-4
    )


def test_projections_that_are_aimed_at_stand_still():
    """With a predictor that forgets what it reads, nothing reaches the encoder."""
    model = model_of()
    objective = model.objectives["simsiam"]
    with torch.no_grad():
        objective.predictor[0].weight.zero_()
        objective.predictor[1].bias.fill_(1)
    model.losses(two_views(5), Draw(0))["simsiam"].loss.backward()
    grads = [
        p.grad for name, p in model.named_parameters() if name.startswith(("vision", "objectives.simsiam.projector"))
    ]
    assert all(grad is None or grad.abs().max() < 1e-7 for grad in grads)
    assert objective.predictor[-1].weight.grad.abs().max() > 0


def test_one_image_alone_has_a_loss():
    found = model_of().eval().losses(two_views(1), Draw(0))["simsiam"]
    assert found.loss.isfinite() and found.metrics["spread"].item() == 0


def test_evaluation_gives_what_training_gives():
    model, batch = model_of(), two_views(6)
    losses = [model.train(mode).losses(batch, Draw(0))["simsiam"].loss for mode in (True, False)]
    assert torch.equal(*losses)


def test_it_learns_without_collapse_and_trains_every_weight():
    model = model_of()
    step = TrainStep(model, OptimConfig(lr=3e-3), seed=0, total=10_000)
    first = step([two_views(8)]).scalars["simsiam/loss"].item()
    weights = dict(model.objectives["simsiam"].named_parameters())
    assert [name for name, p in weights.items() if p.grad is None or not p.grad.isfinite().all()] == []
    for number in range(1, 20):
        last = step([replace(two_views(8), seen=8 * number)]).scalars
    assert last["simsiam/loss"].item() < first - 0.1
    assert last["simsiam/spread"].item() > 0.5


def test_what_it_needs():
    assert model_of().image_names() == {"clean", "again"}
    assert Embed("image", unit=False) in model_of(input="embed").needs()
    with pytest.raises(ValueError, match="input embed reads the contrastive space, which no objective trains; add itc"):
        tiny_model("none", {"simsiam": SimSiamConfig(input="embed")})
    alone = tiny_model("none", {"simsiam": SimSiamConfig(**SIZES)})
    regions = alone.config.model_copy(update={"vision": RegionConfig(features=8, width=32, boxes=4)})
    with pytest.raises(ValueError, match="simsiam needs two augmentations of an image, but model"):
        build_model(regions, alone.objective_configs)


@pytest.mark.parametrize("merge", ["norm_sum", "concat"])
def test_a_detectors_regions_are_refused(merge: str) -> None:
    small = tiny_model("single_stream", ("itm",)).config
    regions = RegionConfig(features=8, boxes=4, width=small.text.width, merge=merge)
    config = small.model_copy(update={"vision": regions})
    for objective in (SimSiamConfig(width=16, hidden=8), MultiviewItcConfig()):
        with pytest.raises(ValueError, match=r"model\.vision\.kind region reads a detector's"):
            build_model(config, {"own": objective, "itm": ItmConfig(negatives="random")})
