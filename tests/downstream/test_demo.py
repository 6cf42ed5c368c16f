"""The demo's own decisions; its whole path is run by tests/test_readme.py."""

from pathlib import Path

import pytest
import torch

from downstream import demo
from vlp.train.loop import Outcome


def test_durations_follow_the_budget():
    recipe = demo.pretraining(demo.DemoConfig())
    thrice = demo.pretraining(demo.DemoConfig(pretrain=3 * recipe.train.samples, seed=5))
    assert thrice.train.samples == 3 * recipe.train.samples and thrice.train.seed == 5
    assert thrice.train.optim.warmup == 3 * recipe.train.optim.warmup
    for field in ("random_until", "hard_from"):
        assert getattr(thrice.objectives["itm"], field) == 3 * getattr(recipe.objectives["itm"], field) > 0


def test_an_interrupted_pretraining_is_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "pretrain", lambda *given, **named: Outcome(tmp_path, 256, finished=False))
    with pytest.raises(KeyboardInterrupt):
        demo.demo(demo.DemoConfig(vqa=0, captioning=0), tmp_path, torch.device("cpu"))
