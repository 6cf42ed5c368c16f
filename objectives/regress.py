"""Regression: a number that image and text say together (the sentiment of a speaker, MOSI: Zadeh et al. 2016).

Shapes: T texts.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.types import Batch
from objectives.base import Draw, Fuse, LossOutput, ModelSpec, Objective, Results, Side
from objectives.heads import POOLED_HEADS, PooledHead
from objectives.settings import ObjectiveSettings


class RegressConfig(ObjectiveSettings):
    """Say a number."""

    kind: Literal["regress"] = "regress"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    loss: Literal["l1", "mse", "smooth_l1"] = "l1"
    """Absolute error (whose mean is MOSI's headline), squared error, or Huber's between them with its knee at 1."""
    head: PooledHead = "mlp"
    """What reads the fused vector; kinds as of objective answer."""
    hidden: int | None = None
    """Width inside the head; None = twice that of pooled, of `relu` once."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"pooled"})

    def build(self, spec: ModelSpec) -> Regress:
        """Build the objective.

        Raises:
            ValueError: there is no fusion to read image and text together with.
        """
        if spec.pooled_width is None:
            raise ValueError(
                "objective regress needs a fusion, but model.fusion.kind is none; use single_stream or dual_stream"
            )
        return Regress(self, spec.pooled_width)


class Regress(Objective):
    """One number a text. Reads ``batch.targets["value"]`` [T], NaN where it is unknown."""

    def __init__(self, config: RegressConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.head = POOLED_HEADS[config.head](width, 1, config.hidden)
        self.needs = frozenset({Fuse()})

    def count(self, batch: Batch) -> Tensor:
        return batch.targets["value"].isfinite().sum()

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean over the texts whose number is known (0 if none is)."""
        found, wanted = self.value(results[Fuse()].pooled).float(), batch.targets["value"].float()
        known = wanted.isfinite()
        wanted = torch.where(known, wanted, found.detach())
        terms = {"l1": F.l1_loss, "mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[self.config.loss]
        number = known.sum().clamp(min=1)
        error = (found.detach() - wanted).abs().sum() / number
        return LossOutput(terms(found, wanted, reduction="none").sum() / number, {"mae": error})

    def value(self, pooled: Tensor) -> Tensor:
        """Pooled fused vectors [T, W] -> the number [T] of each."""
        return self.head(pooled)[:, 0]
