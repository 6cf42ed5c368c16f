"""Which checkpoint of a finetuning is the best by the task's metric, and when to stop looking for a better one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from downstream.task import TaskConfig
from vlp.data.reader import Reader
from vlp.data.split import SubsetReader
from vlp.model import Model
from vlp.run import Parts
from vlp.train.evaluation import Verdict

logger = logging.getLogger(__name__)


@dataclass
class Selection:
    """Scores a model every so many samples; the best checkpoint is kept (``vlp.train.evaluation.Evaluation``)."""

    task: TaskConfig
    parts: Parts
    """Run and tokenizer; the model is the one that is asked about."""
    reader: Reader
    """What it is scored on."""
    every: int
    patience: int
    """Evaluations in a row without a better score, after which the training ends."""
    survey: Any = None
    """What scoring takes of the training data (``TaskConfig.for_scores``)."""
    scores: list[float] = field(default_factory=list)

    def __call__(self, model: Model, seen: int) -> Verdict:
        """Score a model; of equal scores the later checkpoint is the better one."""
        result = self.task.evaluate(replace(self.parts, model=model), self.reader, self.survey)
        score = result.metrics[self.task.headline]
        self.scores.append(score)
        best = self._signed(score) == max(map(self._signed, self.scores))
        told = "the best so far" if best else f"best {self.scores[self.first_best]:.3f}"
        logger.info("at %s samples: %s %.3f, %s", f"{seen:,}", self.task.headline, score, told)
        if self.exhausted:
            logger.info("no better in %d evaluations: training ends here", self.patience)
        return Verdict({self.task.headline: score}, best, self.exhausted)

    def _signed(self, score: float) -> float:
        return score if self.task.better == "higher" else -score

    @property
    def first_best(self) -> int:
        """Number of the first evaluation with the best score."""
        return max(range(len(self.scores)), key=lambda i: (self._signed(self.scores[i]), -i))

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return bool(self.scores) and len(self.scores) - 1 - self.first_best >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the scores."""
        return {"scores": list(self.scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.scores = list(state["scores"])


def some(reader: Reader, number: int) -> Reader:
    """Return a reader's samples, or ``number`` of them at even distances."""
    if len(reader) <= number:
        return reader
    return SubsetReader(reader, np.linspace(0, len(reader) - 1, number).round().astype(np.int64))
