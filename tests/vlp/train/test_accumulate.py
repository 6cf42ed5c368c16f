"""Micro-batches give the gradients of one big batch, the temperature's included."""

from contextlib import nullcontext

import pytest
import torch
from helpers import exact_losses, split_batch, tiny_batch, tiny_model

from encoders.types import Batch
from objectives.base import Draw, Embed
from vlp.model import Model, global_counts
from vlp.train.accumulate import contrast_step, join_pairs, seed_dropout, whole_step_objectives
from vlp.train.optim import OptimConfig
from vlp.train.step import TrainStep, sum_by_name

IDS = [0, 1, 2, 0, 3, 4, 2]  # two pairs twice, in different micro-batches


@pytest.fixture(autouse=True)
def float64_losses():
    with exact_losses():
        yield


def gradients(model: Model, batches: list[Batch]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    step = TrainStep(model, OptimConfig(lr=1e-12, clip_norm=None), seed=5, total=100)
    report = step(batches)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, {name: value.item() for name, value in report.scalars.items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("sizes", [(7,), (3, 2, 2), (1, 5, 1)])
@pytest.mark.parametrize("objectives", [("itc",), ("itc", "mlm"), ("itc", "mlm", "lm")])
def test_uneven_micro_batches_equal_one_batch(objectives, sizes):
    fusion = "none" if objectives == ("itc",) else "dual_stream"
    batch = tiny_batch(7, ids=IDS)
    wanted, report = gradients(tiny_model(fusion, objectives).double(), [batch])
    found, accumulated = gradients(tiny_model(fusion, objectives).double(), split_batch(batch, sizes))
    assert wanted["embed.main.logit_scale"].abs() > 1e-6
    assert_same(found, wanted)
    assert accumulated == pytest.approx(report, rel=1e-5)


def test_fusion_that_is_the_text_tower():
    """Bare text embeddings: the embeds come from the fusion, which also fuses."""
    from helpers import LENGTH, OBJECTIVES, SIZES, VOCABULARY

    from encoders import TextConfig
    from vlp.model import build_model

    def build():
        config = tiny_model().config
        text = TextConfig(**{**SIZES, "layers": 0}, vocabulary_size=VOCABULARY, max_length=LENGTH)
        objectives = {name: OBJECTIVES[name] for name in ("itc", "mlm")}
        return build_model(config.model_copy(update={"text": text}), objectives).double()

    batch = tiny_batch(7, ids=IDS)
    assert build().is_tower("text")
    assert_same(gradients(build(), split_batch(batch, (4, 3)))[0], gradients(build(), [batch])[0])


def test_itm_candidates_are_the_micro_batches():
    """With ITM the step equals ITC of the whole batch plus ITM of each micro-batch, weighted by its texts."""
    parts = split_batch(tiny_batch(7, ids=IDS), (3, 4))
    model = tiny_model("dual_stream", ("itc", "itm")).double()
    wanted = tiny_model("dual_stream", ("itc", "itm")).double()
    loss = wanted(tiny_batch(7, ids=IDS), Draw(5, 0, 0), names=["itc"])[0]
    for index, part in enumerate(parts):
        loss = loss + wanted.losses(part, Draw(5, 0, index), ["itm"])["itm"].loss * part.num_texts / 7
    loss.backward()
    found, _ = gradients(model, parts)
    assert_same(found, {name: p.grad for name, p in wanted.named_parameters() if p.grad is not None})


def test_dropout_is_replayed():
    """The embeds of the first run equal those of the second, which makes the cached gradients theirs."""
    model = tiny_model("dual_stream", ("itc", "itm", "mlm"), dropout=0.3).double().train()
    batches = split_batch(tiny_batch(5), (3, 2))
    draws = [Draw(5, 0, index) for index in range(2)]
    totals = global_counts(sum_by_name(model.counts(batch) for batch in batches))
    seen: list[torch.Tensor] = []
    handle = model.space().text.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    contrast = contrast_step(model, batches, draws, ["itc"], totals, nullcontext)
    for batch, draw, received in zip(batches, draws, contrast.gradients.values(), strict=True):
        seed_dropout(draw)
        model(batch, draw, totals, ["itm", "mlm"], received)
    handle.remove()
    assert len(seen) == 4
    torch.testing.assert_close(seen[2:], seen[:2], rtol=0, atol=0)
    seed_dropout(Draw(5, 1, 0))
    other = model.run([Embed("text")], batches[0])[Embed("text")]
    seed_dropout(draws[0])
    again = model.run([Embed("text")], batches[0])[Embed("text")]
    assert not torch.equal(other, again)


def test_steps_repeat_with_dropout():
    """Dropout depends on (seed, samples seen), not on what ran before."""
    batches = split_batch(tiny_batch(6), (3, 3))
    first, _ = gradients(tiny_model(dropout=0.3), batches)
    torch.rand(17)
    second, _ = gradients(tiny_model(dropout=0.3), batches)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_objectives_of_embeds_alone_are_run_over_the_step():
    model = tiny_model(objectives=("itc", "itm", "mlm"))
    batches = split_batch(tiny_batch(4), (2, 2))
    assert whole_step_objectives(model, batches) == {tuple(range(len(batches))): ["itc"]}
    assert whole_step_objectives(model, batches, ["itm"]) == {}


def test_joined_pairs():
    first = Batch(
        images=tiny_batch(2).images,
        texts=tiny_batch(3).texts,
        image_of_text=torch.tensor([0, 1, 1]),
        image_id=torch.tensor([7, 8]),
        caption_id=torch.tensor([1, 2, 3]),
        counts=((2, 3), (1, 1)),
    )
    joined = join_pairs([first, tiny_batch(2, counts=((2, 2), (2, 2)))])
    assert (joined.num_images, joined.num_texts) == (4, 5)
    assert joined.image_of_text.tolist() == [0, 1, 1, 2, 3]
    assert joined.image_id.tolist() == [7, 8, 0, 1]
    assert joined.counts == ((4, 5), (3, 3))
