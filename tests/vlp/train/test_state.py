"""Ranks that go on with a run go on from one place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlp.train import state


def ranks(monkeypatch, *seen: int) -> None:
    """Stand in for ranks that found checkpoints of so many samples, of which this one is the last."""
    monkeypatch.setattr(state, "world_size", lambda: len(seen))
    monkeypatch.setattr(state, "rank", lambda: len(seen) - 1)
    monkeypatch.setattr(state, "sum_no_grad", lambda own: own + torch.tensor(sum(seen[:-1])))


def test_ranks_with_one_checkpoint_go_on(monkeypatch):
    state.check_same(2048, Path("run"))
    ranks(monkeypatch, 2048, 2048, 2048)
    state.check_same(2048, Path("run"))


def test_ranks_with_different_checkpoints_are_refused(monkeypatch):
    """A folder that a node sees late: it would begin at other samples, and wait in the end for steps that are done."""
    ranks(monkeypatch, 4096, 4096, 2048)
    with pytest.raises(ValueError, match=r"^--resume run: rank 2 found a checkpoint of 2,048 samples, and another"):
        state.check_same(2048, Path("run"))
