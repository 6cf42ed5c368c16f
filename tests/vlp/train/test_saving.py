"""When a run is saved that does not say so."""

from __future__ import annotations

import pytest

from vlp.config import load
from vlp.run import RunConfig
from vlp.train.config import TrainConfig
from vlp.train.loop import passed
from vlp.train.step import StepReport


def saved(config: TrainConfig) -> list[int]:
    """The samples after which a run saves on its way."""
    reports = (StepReport({}, 0.0, seen, seen + 1000) for seen in range(0, config.samples, 1000))
    return [report.seen for report in reports if passed(config.saved_every, report)]


def test_a_long_run_saves_on_its_way():
    """A node that fails after days must not cost them all; a run of minutes is saved at its end."""
    assert saved(TrainConfig(samples=20_000_000)) == [1_000_000 * number for number in range(1, 21)]
    assert saved(TrainConfig(samples=1_000_000)) == [250_000, 500_000, 750_000, 1_000_000]
    assert saved(TrainConfig(samples=1_000_000, save_every=400_000)) == [400_000, 800_000]
    assert saved(load(RunConfig, "pretrain/demo").train) == []


def test_no_checkpoint_without_a_sample():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        TrainConfig(save_every=0)
