"""Contrast within a modality (TCL): by loops, its chance level, its queue and the teacher's own augmentation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import tiny_batch, tiny_model
from torch.nn import functional as F

from encoders.types import Images
from objectives import IntraConfig, ItcConfig
from objectives.base import Draw, Embed, Encode
from objectives.intra import local_information
from vlp.model import Model, build_model
from vlp.train.optim import OptimConfig
from vlp.train.step import TrainStep

SCALE = 1 / 0.07


def model_of(view: str = "clean", **settings) -> Model:
    intra = IntraConfig(**{"positives": "diagonal", "patch_pool": 2} | settings)
    small = tiny_model("none", {"itc": ItcConfig(positives="diagonal"), "intra": intra})
    return build_model(small.config.model_copy(update={"teacher_view": view}), small.objective_configs)


def with_again(batch):
    """The batch with other pixels for the teacher."""
    pixels = tiny_batch(batch.num_images, first=100).images["clean"].pixels
    return replace(batch, images={**batch.images, "again": Images(pixels)})


def info_nce(own, seen):
    return F.cross_entropy(SCALE * own @ seen.T, torch.arange(len(own)))


def local_by_loops(own, parts, keep):
    rows = []
    for i in range(len(own)):
        wrong = [
            math.exp(SCALE * float(own[i] @ parts[j, k]))
            for j in range(len(own))
            for k in range(parts.shape[1])
            if j != i and keep[j, k]
        ]
        terms = []
        for k in range(parts.shape[1]):
            if keep[i, k]:
                right = math.exp(SCALE * float(own[i] @ parts[i, k]))
                terms.append(-math.log(right / (right + sum(wrong))))
        rows.append(sum(terms) / len(terms))
    return sum(rows) / len(rows)


def test_local_information_as_written_by_loops():
    torch.manual_seed(0)
    own, parts = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(3, 4, 8), dim=2)
    keep = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    found = local_information(own, parts, keep, torch.eye(3, dtype=torch.bool), torch.tensor([math.log(SCALE)]))
    assert found.item() == pytest.approx(local_by_loops(own, parts, keep), rel=1e-5)


def test_one_input_alone_has_nothing_to_tell_apart():
    own = F.normalize(torch.randn(1, 8), dim=1).requires_grad_()
    loss = local_information(own, own.detach()[:, None], torch.ones(1, 1).bool(), torch.eye(1).bool(), torch.zeros(1))
    loss.backward()
    assert loss.item() == 0 and own.grad.isfinite().all()


def test_loss_as_written_by_hand():
    model, batch = model_of("again", queue=6).eval(), with_again(tiny_batch(3))
    with torch.no_grad():
        student = model.run([Embed("image"), Embed("text")], batch)
        seen = replace(batch, images={"clean": batch.images["again"]})  # at first the teacher has the student's weights
        passes = [Embed(side, tokens=tokens) for side in ("image", "text") for tokens in (False, True)]
        teacher = model.run([*passes, Encode("text")], seen)
        found = model.losses(batch, Draw(0))["intra"].loss
    queue = model.objectives["intra"].queue
    image, text = student[Embed("image")], student[Embed("text")]
    patches = teacher[Embed("image", tokens=True)][:, 1:].view(3, 2, 2, 2, 2, -1).mean((2, 4)).flatten(1, 2)
    words, keep = teacher[Embed("text", tokens=True)][:, 1:], batch.texts["clean"].keep[:, 1:]
    terms = [
        info_nce(image, torch.cat([teacher[Embed("image")], queue.image])),
        info_nce(text, torch.cat([teacher[Embed("text")], queue.text])),
        local_by_loops(image, patches, torch.ones(3, 4)),
        local_by_loops(text, words, keep),
    ]
    assert found.item() == pytest.approx(float(sum(terms)) / 4, rel=1e-5)


def test_random_queue_is_at_chance():
    """With many random candidates and no parts, an untrained model is as good as a guess, but for its own embed."""
    model = model_of(local=False, queue=500)
    assert model.objectives["intra"].chance(4) == math.log(504)
    batch = tiny_batch(4)
    with torch.no_grad():
        for space in (model.space(), model.teacher.space()):  # projections that know nothing: all inputs alike
            space.image.weight.zero_()
            space.text.weight.zero_()
            space.image.bias.fill_(1)
            space.text.bias.fill_(1)
        model.space().logit_scale.zero_()
        queue = model.objectives["intra"].queue
        queue.image.copy_(model.run([Embed("image")], batch)[Embed("image")][:1].expand(500, -1))
        queue.text.copy_(model.run([Embed("text")], batch)[Embed("text")][:1].expand(500, -1))
        assert model.losses(batch, Draw(0))["intra"].loss.item() == pytest.approx(math.log(504), rel=1e-5)


def test_it_learns_and_trains_every_weight():
    model, batch = model_of("again", queue=8), with_again(tiny_batch(8))
    step = TrainStep(model, OptimConfig(lr=1e-2), seed=0, total=1000)
    first = step([batch]).scalars["intra/loss"].item()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    for number in range(1, 15):
        last = step([replace(batch, seen=8 * number)]).scalars["intra/loss"].item()
    assert last < first
    assert model.objectives["intra"].queue.pointer.item() == 0  # 15 steps of 8 into a queue of 8


def test_the_same_words_are_no_others():
    """Texts of equal words are the same input under id_or_caption, and others under diagonal."""
    losses = []
    for rule in ("diagonal", "id_or_caption"):
        model, batch = model_of(positives=rule, local=False).eval(), tiny_batch(4)
        same = torch.tensor([0, 1, 0, 1])
        batch = replace(batch, image_id=same, caption_id=same)
        losses.append(model.losses(batch, Draw(0))["intra"].loss.item())
    assert losses[0] != losses[1]


def test_a_teacher_with_its_own_view_needs_it():
    with pytest.raises(ValueError, match="teacher_view again"):
        model_of("again").losses(tiny_batch(3), Draw(0))
    assert model_of("again").image_names() == {"clean", "again"} and model_of().image_names() == {"clean"}
