"""Kinds of numbers by device."""

from __future__ import annotations

import torch

from encoders.precision import finest


def test_apples_gpus_are_not_asked_for_float64():
    """They have none: the first draw of negatives, and so the demo's first step, would end in a TypeError."""
    assert finest(torch.device("mps")) is torch.float32
    assert {finest(torch.device(kind)) for kind in ("cpu", "cuda", "meta")} == {torch.float64}
