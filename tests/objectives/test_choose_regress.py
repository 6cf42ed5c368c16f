"""Multiple choice and regression against definitions of a few lines."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny_batch, tiny_model

from objectives import ChooseConfig, RegressConfig
from objectives.base import Draw, Fuse
from objectives.choose import choice_probabilities


def pooled(model, batch):
    return model.run([Fuse()], batch)[Fuse()].pooled


def test_choice_is_a_softmax_over_the_questions_own_texts():
    model = tiny_model("single_stream", {"choose": ChooseConfig(choices=3)}).eval()
    chosen = torch.tensor([0, 1, 0, 1, 1, 0])
    batch = replace(tiny_batch(6), targets={"chosen": chosen})
    scores = model.objectives["choose"].score(pooled(model, batch))
    first, second = scores[:3].log_softmax(0), scores[3:].log_softmax(0)
    found = model.losses(batch, Draw())["choose"]
    wanted = (-first[1] - (second[0] + second[1]) / 2) / 2
    torch.testing.assert_close(found.loss, wanted)
    hits = [float(chosen[:3][scores[:3].argmax()]), float(chosen[3:][scores[3:].argmax()])]
    assert found.metrics["accuracy"].item() == pytest.approx(sum(hits) / 2)
    torch.testing.assert_close(choice_probabilities(scores, 3), torch.stack([first, second]).exp())
    assert model.counts(batch)["choose"] == 2 and model.objectives["choose"].chance(0) == pytest.approx(1.0986123)
    with pytest.raises(ValueError, match=r"5 texts are no multiple of it; set data\.texts_per_image 3"):
        model.losses(replace(tiny_batch(5), targets={"chosen": chosen[:5]}), Draw())


@pytest.mark.parametrize(
    ("loss", "term"),
    [
        ("l1", lambda d: abs(d)),
        ("mse", lambda d: d * d),
        ("smooth_l1", lambda d: d * d / 2 if abs(d) < 1 else abs(d) - 0.5),
    ],
)
def test_regression_is_over_the_known_numbers(loss, term):
    model = tiny_model("single_stream", {"regress": RegressConfig(loss=loss)}).eval()
    wanted = torch.tensor([3.0, float("nan"), -0.1, 0.2])
    batch = replace(tiny_batch(4), targets={"value": wanted})
    errors = [(a - b).item() for a, b in zip(model.objectives["regress"].value(pooled(model, batch)), wanted)]
    known = [errors[row] for row in (0, 2, 3)]
    found = model.losses(batch, Draw())["regress"]
    assert found.loss.item() == pytest.approx(sum(map(term, known)) / 3, rel=1e-5)
    assert found.metrics["mae"].item() == pytest.approx(sum(map(abs, known)) / 3, rel=1e-5)
    assert model.counts(batch)["regress"] == 3
    found.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), "the unknown one gives no NaN"


def test_a_batch_without_known_numbers_trains_nothing():
    model = tiny_model("single_stream", {"regress": RegressConfig()})
    batch = replace(tiny_batch(2), targets={"value": torch.full((2,), float("nan"))})
    loss = model.losses(batch, Draw())["regress"].loss
    loss.backward()
    assert loss.item() == 0 and not any(p.grad is not None and p.grad.any() for p in model.parameters())
