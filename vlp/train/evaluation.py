"""What a task says of a model while it is trained: its metric, whether this is the best so far, whether to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from vlp.model import Model
from vlp.train.step import TrainStep


@dataclass(frozen=True)
class Verdict:
    """What an evaluation found; the same on all ranks."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Written to the log as ``val/NAME``."""
    best: bool = False
    """Whether this is the best so far: its checkpoint is kept, whatever comes after (``Outcome.best``)."""
    stop: bool = False
    """End the training here, as finished."""


class Evaluation(Protocol):
    """Looks at a model during training; called on all ranks.

    Its state is saved with every checkpoint, so that a resumed run decides as an uninterrupted one would have.
    """

    @property
    def every(self) -> int:
        """Samples between two evaluations; the last step is evaluated in any case."""
        ...

    def __call__(self, model: Model, seen: int) -> Verdict:
        """Evaluate ``model``, which is in evaluation mode: the moving average of the weights if the run has one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered from one evaluation to the next, as plain numbers, strings and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        ...


@torch.no_grad()
def evaluated(evaluation: Evaluation, step: TrainStep, seen: int) -> Verdict:
    """Evaluate what a run has trained so far, and leave it in training mode."""
    model = step.model if step.average is None else step.average.module
    assert isinstance(model, Model)
    model.eval()
    try:
        return evaluation(model, seen)
    finally:
        step.model.train()
