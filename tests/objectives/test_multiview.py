"""Contrast of several views, and with the nearest of earlier texts: by hand, over micro-batches, and what they need."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import exact_losses, split_batch, tiny_batch, tiny_model
from torch.nn import functional as F

from encoders import RegionConfig
from encoders.types import Batch, Images, Texts
from objectives import ItcConfig, MlmConfig, MultiviewItcConfig, NearestItcConfig
from objectives.base import Draw, Embed, ViewText
from objectives.multiview_itc import EditedView
from objectives.queue import VectorQueue
from vlp.fit import untrained
from vlp.model import Model, build_model
from vlp.train.optim import OptimConfig, freeze_parts
from vlp.train.step import TrainStep

IMAGES = [Embed("image", view) for view in ("clean", "again")]


def texts_of(*views: str) -> list[Embed]:
    return [Embed("text", view) for view in views]


def model_of(texts=("masked", "edited"), queue=12, **settings) -> Model:
    settings |= {"texts": texts, "positives": "diagonal"}
    objectives = {
        "multiview_itc": MultiviewItcConfig(**settings),
        "nearest_itc": NearestItcConfig(queue=queue, **settings),
    }
    if "masked" in texts:
        objectives["mlm"] = MlmConfig()
    return tiny_model("none", objectives)


def views_of(number: int, first: int = 0) -> Batch:
    """A batch with all views; edited texts and images seen again are other samples', which tells them apart."""
    batch, other = tiny_batch(number, first=first), tiny_batch(number, first=first + 100)
    texts = {**batch.texts, "edited": other.texts["clean"]}
    return replace(batch, texts=texts, images={**batch.images, "again": Images(other.images["clean"].pixels)})


def info_nce(own, seen, scale=1 / 0.07):
    return F.cross_entropy(scale * own @ seen.T, torch.arange(len(own))).item()


def test_loss_of_all_pairs_of_views():
    model, batch = model_of().eval(), views_of(4)
    texts = texts_of("masked", "edited")
    with torch.no_grad():
        found = model.run([*IMAGES, *texts], batch)
        loss = model.losses(batch, Draw(0))["multiview_itc"].loss
    terms = [info_nce(found[i], found[t]) + info_nce(found[t], found[i]) for i, t in product(IMAGES, texts)]
    assert loss.item() == pytest.approx(sum(terms) / 8, rel=1e-5)


def test_one_view_of_each_is_itc():
    settings = {"label_smoothing": 0.1, "max_scale": 12.0}
    one = tiny_model("none", {"one": ItcConfig(**settings)})
    many = tiny_model("none", {"one": MultiviewItcConfig(images=("clean",), texts=("clean",), **settings)})
    same = torch.tensor([0, 1, 0, 3])
    batch = replace(tiny_batch(4), image_id=same, caption_id=same)
    losses = [model.losses(batch, Draw(0))["one"] for model in (one, many)]
    assert losses[0].loss.item() == pytest.approx(losses[1].loss.item(), rel=1e-6)
    assert losses[1].metrics["scale"].item() == pytest.approx(12)


def test_loss_with_neighbours():
    model, batch = model_of(queue=6).eval(), views_of(4)
    texts, queue = texts_of("masked", "edited"), model.objectives["nearest_itc"].queue.vectors
    with torch.no_grad():
        found = model.run([*IMAGES, *texts], batch)
        loss = model.losses(batch, Draw(0))["nearest_itc"].loss
    near = {text: torch.stack([max(queue, key=lambda q: float(own @ q)) for own in found[text]]) for text in texts}
    terms = [info_nce(found[i], near[t]) for i, t in product(IMAGES, texts)]
    assert loss.item() == pytest.approx(sum(terms) / 4, rel=1e-5)


def test_texts_join_the_queue_after_the_step():
    model, batch = model_of(queue=12), views_of(4)
    objective = model.objectives["nearest_itc"]
    with torch.no_grad():
        own = model.run(texts_of("masked", "edited"), batch)
    before = objective.queue.vectors.clone()
    model.losses(batch, Draw(0))
    assert torch.equal(objective.queue.vectors, before)
    model.after_step()
    assert torch.allclose(
        objective.queue.vectors[:8], torch.cat([own[one] for one in texts_of("masked", "edited")]), atol=1e-6
    )
    assert torch.equal(objective.queue.vectors[8:], before[8:]) and objective.queue.pointer.item() == 8
    found = model.eval().losses(batch, Draw(0))["nearest_itc"]  # now each text's nearest is itself
    assert found.loss.item() == pytest.approx(model.losses(batch, Draw(0))["nearest_itc"].loss.item())


def test_neighbours_alone_train_no_text_tower():
    """Which is refused before the first step, unless the tower is to stay as it is."""
    alone = tiny_model("none", {"nearest_itc": NearestItcConfig(queue=12)})
    (line,) = untrained(alone)
    assert line.startswith("objectives nearest_itc read texts without gradient, so that nothing trains model.text; add")
    freeze_parts(alone, OptimConfig(lr_scale={"text": 0.0}))
    assert not untrained(alone) and not untrained(model_of())


def test_the_queue_is_a_ring():
    queue = VectorQueue(5, 2)
    queue.append(torch.arange(6.0).view(3, 2))
    queue.append(torch.arange(10.0, 16.0).view(3, 2))
    assert queue.vectors[[3, 4, 0]].flatten().tolist() == [10, 11, 12, 13, 14, 15] and queue.pointer.item() == 1
    queue.append(torch.arange(100.0, 114.0).view(7, 2))  # more than it holds: the last five
    assert queue.vectors.sum(1).sort().values.tolist() == [209, 213, 217, 221, 225] and queue.pointer.item() == 3
    queue.append(torch.zeros(1, 2))  # the oldest goes
    assert queue.vectors.sum(1).sort().values.tolist() == [0, 213, 217, 221, 225]


def test_micro_batches_are_one_batch():
    """Embeds of a step are compared over all its micro-batches, and all of them join the queue."""
    grads, queues = [], []
    for sizes in ([6], [2, 4]):
        model = model_of(("clean", "edited")).double()
        batch = views_of(6)
        with exact_losses():
            TrainStep(model, OptimConfig(lr=1e-9), seed=0, total=100)(split_batch(batch, sizes))
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        queues.append(model.objectives["nearest_itc"].queue.vectors)
    assert max((grads[0][name] - grads[1][name]).abs().max().item() for name in grads[0]) < 1e-10
    assert torch.allclose(*queues, atol=1e-10)


def test_it_learns_and_trains_every_weight():
    model, batch = model_of(queue=32), views_of(8)
    step = TrainStep(model, OptimConfig(lr=1e-2), seed=0, total=1000)
    first = step([batch]).scalars
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    for number in range(1, 15):
        last = step([replace(batch, seen=8 * number)]).scalars
    for name in ("multiview_itc/loss", "nearest_itc/loss"):
        assert last[name].item() < first[name].item()
    assert model.objectives["nearest_itc"].chance(8) == math.log(8)


@pytest.mark.parametrize("kind", [MultiviewItcConfig, NearestItcConfig])
def test_regions_have_no_second_augmentation(kind):
    settings = {"texts": ("clean",)}
    small = tiny_model("none", {"one": kind(**settings, images=("clean",))})
    regions = small.config.model_copy(update={"vision": RegionConfig(features=8, width=32, boxes=4)})
    build_model(regions, {"one": kind(**settings, images=("clean",))})
    with pytest.raises(ValueError, match="images again is another augmentation of the pixels, but model"):
        build_model(regions, {"one": kind(**settings)})


def test_what_they_need():
    model = model_of()
    assert model.image_names() == {"clean", "again"} and set(model.text_views()) == {"masked", "edited"}
    assert isinstance(EditedView().make(torch.arange(3).numpy(), None, None, None), ViewText)
    with pytest.raises(ValueError, match="reads the text view 'masked', which no objective makes; add mlm"):
        tiny_model("none", {"multiview_itc": MultiviewItcConfig(texts=("masked",))})
    with pytest.raises(ValueError, match="texts"):
        MultiviewItcConfig(texts=())
    with pytest.raises(ValueError, match="no text view 'edited'"):
        batch = views_of(2)
        kept: dict[str, Texts] = {name: text for name, text in batch.texts.items() if name != "edited"}
        model.losses(replace(batch, texts=kept), Draw(0))


def test_the_nearest_is_found_in_float32() -> None:
    """Vectors that lie close together, as learned ones do, are all equally near in bf16."""
    torch.manual_seed(0)
    queue, towards = VectorQueue(2048, 64), 2 * F.normalize(torch.randn(64), dim=0)
    queue.vectors.copy_(F.normalize(queue.vectors + towards, dim=1))
    asking = F.normalize(F.normalize(torch.randn(64, 64), dim=1) + towards, dim=1)
    wanted = queue.vectors[(asking @ queue.vectors.T).argmax(1)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(queue.nearest(asking), wanted)
