"""SNLI-VE: does an image entail a sentence, contradict it, or neither? Xie et al. 2019.

Data: columns image, sentence and label (entailment, neutral or contradiction), as `vlp data convert snli_ve` writes
them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from downstream.verdict import VerdictConfig


class SnliVeConfig(VerdictConfig):
    """Say whether an image entails or contradicts a sentence."""

    kind: Literal["snli_ve"] = "snli_ve"
    labels: tuple[str, ...] = Field(default=("contradiction", "neutral", "entailment"), min_length=2)
    """The verdicts, in the order of a new head's outputs; data and checkpoints may differ in case."""

    carried: ClassVar[tuple[str, ...]] = ("pair_id",)
