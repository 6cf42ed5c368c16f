"""Multiple choice: which of a few texts is right of the image?

As in VCR (Zellers et al. 2019); a score a choice and a softmax over them is ViLBERT (Lu et al. 2019, section 3.2).

Shapes: Q questions, C choices of each, T = Q * C texts.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from encoders.types import Batch
from objectives.base import Draw, Fuse, LossOutput, ModelSpec, Objective, Results, Side
from objectives.heads import POOLED_HEADS, PooledHead
from objectives.settings import ObjectiveSettings


class ChooseConfig(ObjectiveSettings):
    """Choose the right one of the texts that an image comes with."""

    kind: Literal["choose"] = "choose"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    choices: int = Field(default=4, ge=2)
    """Texts of a question, which follow each other in a batch (`data.texts_per_image`)."""
    head: PooledHead = "linear"
    """What gives a choice its score; kinds as of objective answer."""
    hidden: int | None = None
    """Width inside the head; None = twice that of pooled, of `relu` once."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"pooled"})

    def build(self, spec: ModelSpec) -> Choose:
        """Build the objective.

        Raises:
            ValueError: there is no fusion to read the choices with.
        """
        if spec.pooled_width is None:
            raise ValueError(
                "objective choose needs a fusion, but model.fusion.kind is none; use single_stream or dual_stream"
            )
        return Choose(self, spec.pooled_width)


class Choose(Objective):
    """One score a text, compared within its question. Reads ``batch.targets["chosen"]`` [T], 1 = right, else 0."""

    def __init__(self, config: ChooseConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.head = POOLED_HEADS[config.head](width, 1, config.hidden)
        self.needs = frozenset({Fuse()})

    def count(self, batch: Batch) -> float:
        return batch.num_texts / self.config.choices

    def chance(self, candidates: int) -> float:
        return math.log(self.config.choices)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy over a question's choices, mean over questions; of several right ones each is worth the same.

        Raises:
            ValueError: the texts are no whole questions.
        """
        number = self.config.choices
        if batch.num_texts % number:
            raise ValueError(
                f"objectives.choose.choices {number}, but {batch.num_texts} texts are no multiple of it; set "
                f"data.texts_per_image {number}"
            )
        scores = self.score(results[Fuse()].pooled).float().unflatten(0, (-1, number))
        right = batch.targets["chosen"].to(scores.dtype).unflatten(0, (-1, number))
        loss = F.cross_entropy(scores, right / right.sum(1, keepdim=True).clamp(min=1))
        found = right.gather(1, scores.detach().argmax(1, keepdim=True))
        return LossOutput(loss, {"accuracy": found.mean()})

    def score(self, pooled: Tensor) -> Tensor:
        """Pooled fused vectors [T, W] -> score [T] of each choice, larger = better."""
        return self.head(pooled)[:, 0]


def choice_probabilities(scores: Tensor, choices: int) -> Tensor:
    """Scores [T] of whole questions -> probability of each of their choices [Q, C]."""
    return scores.float().unflatten(0, (-1, choices)).softmax(1)
