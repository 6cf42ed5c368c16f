"""Momentum distillation: a share of the target is what the teacher believes (Li et al. 2021, ALBEF, section 3.4).

Shapes: R rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor, nn

from objectives.settings import ObjectiveSettings


class DistillConfig(ObjectiveSettings):
    """An objective that may learn from the momentum teacher (`model.momentum`)."""

    distill: float = Field(0.0, ge=0, le=1)
    """Share of the target that the momentum teacher gives (ALBEF 0.4)."""
    distill_ramp: int = Field(0, ge=0)
    """Samples over which that share rises from zero (ALBEF: the first epoch)."""

    def share(self, seen: int) -> float:
        """Return the teacher's share of the target after ``seen`` samples of the run."""
        return self.distill * min(1.0, seen / self.distill_ramp) if self.distill_ramp else self.distill


@dataclass(frozen=True)
class Taught:
    """What the teacher says about the states that an objective reads."""

    head: nn.Module
    """The teacher's copy of the objective's head."""
    states: Tensor
    """What the head reads, shaped like the student's."""
    share: float
    """The teacher's share of the target."""


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return each row's cross-entropy [R] of ``logits`` [R, C] against the teacher's own (eq. 7, up to a constant)."""
    return -(teacher.detach().float().softmax(1) * logits.float().log_softmax(1)).sum(1)
