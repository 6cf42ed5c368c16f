"""The momentum teacher: a moving average of what teacher passes use, and the queue of what it embedded."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import tiny_batch, tiny_model
from torch.nn import functional as F

from objectives import ItcConfig, ItmConfig, MlmConfig
from objectives.base import Draw, Embed
from vlp.checkpoint.native import load_weights, weights_of
from vlp.model import Model
from vlp.train.optim import OptimConfig
from vlp.train.step import TrainStep

QUEUE = 10
TAUGHT = {"itc": ItcConfig(queue=QUEUE, distill=0.4), "itm": ItmConfig(), "mlm": MlmConfig(distill=0.4)}


def train_step(model: Model, **settings: object) -> TrainStep:
    return TrainStep(model, OptimConfig(lr=1e-2, **settings), seed=0, total=1000)


def test_a_teacher_exists_only_if_an_objective_learns_from_it() -> None:
    assert tiny_model(objectives=("itc", "itm", "mlm")).teacher is None
    whole = tiny_model(objectives=TAUGHT).teacher
    assert whole is not None and list(whole.heads) == ["mlm"] and whole.decoder is None
    assert {name.split(".")[0] for name, _ in whole.named_parameters()} == {
        "vision",
        "text",
        "fusion",
        "embed",
        "heads",
    }
    queue_only = tiny_model(objectives={"itc": ItcConfig(queue=4), "itm": ItmConfig()}).teacher
    assert queue_only is not None and queue_only.fusion is None and not queue_only.heads


def test_it_follows_the_student_as_written_by_hand() -> None:
    model = tiny_model(objectives=TAUGHT)
    assert model.teacher is not None
    step = train_step(model)
    by_hand = {n: p.clone() for n, p in model.teacher.named_parameters()}
    for name, weight in by_hand.items():  # it begins as the student
        assert torch.equal(weight, model.get_parameter(name.replace("heads.", "objectives.")))
    for number in range(3):
        # The update comes before the step's forward: it sees the weights that the step before left.
        for name, weight in by_hand.items():
            weight.mul_(0.995).add_(model.get_parameter(name.replace("heads.", "objectives.")).detach(), alpha=0.005)
        step([tiny_batch(4, first=4 * number, seen=4 * number)])
        for name, weight in model.teacher.named_parameters():
            torch.testing.assert_close(weight, by_hand[name], rtol=1e-6, atol=1e-7)
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert model.teacher.heads["mlm"].head.decoder.weight is model.teacher.text.embeddings.word.weight


def test_the_queue_is_a_ring_of_the_teachers_embeds() -> None:
    model = tiny_model(objectives=TAUGHT)
    queue = model.objectives["itc"].queue
    step = train_step(model)
    wanted = {"image": queue.image.clone(), "text": queue.text.clone()}
    ids, at = torch.full((QUEUE,), -1), 0
    for number in range(4):
        batch = tiny_batch(4, first=4 * number, seen=4 * number)
        step([batch])
        with torch.no_grad():  # the teacher has not moved since the step's forward
            found = model.run([Embed("image", teacher=True), Embed("text", teacher=True)], batch)
        for row in range(4):
            wanted["image"][at], wanted["text"][at] = (
                found[Embed("image", teacher=True)][row],
                found[Embed("text", teacher=True)][row],
            )
            ids[at] = batch.image_id[row]
            at = (at + 1) % QUEUE
        assert queue.pointer.item() == at
        torch.testing.assert_close(queue.image, wanted["image"])
        torch.testing.assert_close(queue.text, wanted["text"])
        assert torch.equal(queue.image_id, ids)


def test_a_step_larger_than_the_queue_leaves_its_last_pairs() -> None:
    model = tiny_model(objectives={"itc": ItcConfig(queue=3), "itm": ItmConfig()})
    batch = tiny_batch(5)
    train_step(model)([batch])
    queue = model.objectives["itc"].queue
    found = model.run([Embed("text", teacher=True)], batch)[Embed("text", teacher=True)]
    at = [(slot - 5) % 3 for slot in range(5, 8)]
    assert queue.pointer.item() == 5 % 3 and sorted(at) == [0, 1, 2]
    torch.testing.assert_close(queue.text[torch.tensor([2 % 3, 3 % 3, 4 % 3])], found[2:])


@pytest.mark.parametrize("rule", ["diagonal", "id", "id_or_caption"])
def test_loss_with_queue_and_soft_targets_by_hand(rule: str) -> None:
    """ALBEF's eq. 1 to 6, row by row."""
    config = ItcConfig(queue=QUEUE, distill=0.4, distill_ramp=100, positives=rule)
    model = tiny_model(objectives={"itc": config, "itm": ItmConfig()}).eval()
    objective = model.objectives["itc"]
    batch = tiny_batch(4, ids=[3, 7, 3, 9], seen=50)
    queue = objective.queue
    if queue.image_id is not None:
        queue.image_id[2], queue.image_id[5] = 7, 3
    if queue.caption_id is not None:
        queue.caption_id[4] = batch.caption_id[1]
    model.space().logit_scale.data.fill_(math.log(10.0))
    names = [Embed(m, teacher=t) for t in (False, True) for m in ("image", "text")]
    results = model.run(names, batch)
    found = objective(results, batch, Draw()).loss
    image, text, image_m, text_m = (results[one] for one in names)
    total = torch.tensor(0.0)
    for own, own_m, all_ in (
        (image, image_m, torch.cat([text_m, queue.text])),
        (text, text_m, torch.cat([image_m, queue.image])),
    ):
        for row in range(4):
            true = torch.zeros(4 + QUEUE)
            true[row] = 1
            if rule != "diagonal":
                true[:4][batch.image_id == batch.image_id[row]] = 1
                true[4:][queue.image_id == batch.image_id[row]] = 1
            if rule == "id_or_caption":
                true[:4][batch.caption_id == batch.caption_id[row]] = 1
                true[4:][queue.caption_id == batch.caption_id[row]] = 1
            soft = (10.0 * own_m[row] @ all_.T).softmax(0)
            target = 0.8 * true / true.sum() + 0.2 * soft  # half of 0.4 at half of the ramp
            total = total - (target * (10.0 * own[row] @ all_.T).log_softmax(0)).sum() / 8
    torch.testing.assert_close(found, total)


def test_distilled_words_by_hand() -> None:
    model = tiny_model(objectives={"itm": ItmConfig(), "mlm": MlmConfig(distill=0.3)})
    assert model.teacher is not None
    with torch.no_grad():
        for weight in model.teacher.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    batch = tiny_batch(4)
    objective, needs = model.objectives["mlm"], model.objectives["mlm"].needs
    student = next(one for one in needs if not one.teacher)
    teacher = next(one for one in needs if one.teacher)
    results = model.run(needs, batch)
    labels = batch.texts["masked"].labels
    logits = objective.head(results[student].text.states)[labels >= 0]
    soft = model.teacher.heads["mlm"].head(results[teacher].text.states)[labels >= 0].softmax(1)
    hard = F.cross_entropy(logits, labels[labels >= 0])
    wanted = 0.7 * hard - 0.3 * (soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(objective(results, batch, Draw()).loss, wanted)


def test_it_is_saved_and_resumed_exactly() -> None:
    straight, broken = (tiny_model(objectives=TAUGHT, dropout=0.1) for _ in range(2))
    batches = [tiny_batch(4, first=4 * n, seen=4 * n) for n in range(4)]
    first, second = train_step(straight), train_step(broken)
    for batch in batches:
        first([batch])
    for batch in batches[:2]:
        second([batch])
    state, stored = second.state_dict(), {n: t.clone() for n, t in weights_of(broken).items()}
    resumed = tiny_model(objectives=TAUGHT, dropout=0.1, seed=1)
    load_weights(resumed, stored)
    third = train_step(resumed)
    third.load_state_dict(copy.deepcopy(state))
    for batch in batches[2:]:
        third([batch])
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_weights_without_a_teacher_begin_one() -> None:
    plain = tiny_model(objectives=("itc", "itm", "mlm"), seed=3)
    model = tiny_model(objectives=TAUGHT)
    load_weights(model, weights_of(plain), strict=False)
    assert model.teacher is not None
    for name, weight in model.teacher.named_parameters():
        assert torch.equal(weight, plain.get_parameter(name.replace("heads.", "objectives.")))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_micro_batches_of_one_step_equal_the_whole(dropout: float) -> None:
    """With the contrastive loss over the whole step: same gradients (without dropout), and the same queue after it."""
    both = tiny_model(objectives={"itc": ItcConfig(queue=QUEUE, distill=0.4), "itm": ItmConfig()}, dropout=dropout)
    other = copy.deepcopy(both)
    whole = train_step(both)([tiny_batch(6)], ["itc"])
    halves = train_step(other)([tiny_batch(3), tiny_batch(3, first=3)], ["itc"])
    assert torch.isfinite(halves.scalars["loss"])
    assert other.objectives["itc"].queue.pointer.item() == 6
    if dropout == 0.0:
        torch.testing.assert_close(halves.scalars["itc/loss"], whole.scalars["itc/loss"])
        torch.testing.assert_close(other.objectives["itc"].queue.text, both.objectives["itc"].queue.text)
        for name, weight in both.named_parameters():
            if weight.grad is not None:
                torch.testing.assert_close(other.get_parameter(name).grad, weight.grad, rtol=1e-3, atol=1e-6, msg=name)
