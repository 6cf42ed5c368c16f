"""Sampled objectives: which one a step trains."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import tiny_model

from objectives import ItmConfig, MlmConfig, WraConfig
from vlp.train.meter import Meter
from vlp.train.sample import check_sample, sampled
from vlp.train.step import StepReport


def objectives(*names: str) -> dict[str, Any]:
    known = {"itm": ItmConfig(scheme="replace_image"), "wra": WraConfig(), "mlm": MlmConfig()}
    return dict(tiny_model("single_stream", {name: known[name] for name in names}).objectives.items())


UNITER = {"itm+wra": 9, "mlm": 12, "mrfr": 6, "mrc": 6}


def test_steps_are_drawn_by_their_ratios() -> None:
    found = Counter("+".join(sampled(UNITER, 0, 256 * step) or ()) for step in range(4000))
    assert {name: n / 4000 for name, n in found.items()} == pytest.approx(
        {k: v / 33 for k, v in UNITER.items()}, abs=0.03
    )


def test_a_step_is_drawn_by_seed_and_samples_alone() -> None:
    every = [sampled(UNITER, 0, seen) for seen in range(0, 2000, 10)]
    assert every[100:] == [sampled(UNITER, 0, seen) for seen in range(1000, 2000, 10)]
    assert every != [sampled(UNITER, 1, seen) for seen in range(0, 2000, 10)]
    assert sampled({}, 0, 0) is None


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"mlm": 1, "itn": 2}, "itn"),
        ({"mlm": 1}, r"leaves \['itm'\] out"),
        ({"mlm": 0, "itm": 1}, "must be above 0"),
    ],
)
def test_ratios_must_fit_the_objectives(sample: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_sample(sample, objectives("mlm", "itm"))
    check_sample({}, objectives("mlm"))
    check_sample({"itm+mlm": 1}, objectives("mlm", "itm"))


def test_what_reads_the_pairs_of_another_is_trained_with_it() -> None:
    found = objectives("itm", "wra", "mlm")
    check_sample({"itm+wra": 1, "mlm": 1}, found)
    with pytest.raises(ValueError, match=r"train.sample wra reads the pairs of itm; join them: itm\+wra"):
        check_sample({"itm": 1, "wra": 1, "mlm": 1}, found)


def test_means_are_over_the_steps_that_trained_an_objective() -> None:
    def report(seen: int, **scalars: float) -> StepReport:
        return StepReport({f"{k}/loss": torch.tensor(v) for k, v in scalars.items()}, 1e-4, seen, seen + 8)

    meter, other = Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    for number, scalars in enumerate([{"itm": 1.0}, {"mlm": 4.0}, {"mlm": 6.0}]):
        meter.add(report(8 * number, **scalars))
    other.restore(meter.state())
    for one in (meter, other):
        one.add(report(24, mlm=8.0))
        record = one.record()
        assert (record["itm/loss"], record["mlm/loss"]) == (1.0, 6.0)
