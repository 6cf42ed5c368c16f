"""Answer classification: a fixed answer list with soft targets (VQA as in ViLT, METER, LXMERT).

Verdicts on a pair are answers too: SNLI-VE's three, NLVR2's true and false (with `loss: ce`).
Shapes: T questions, A answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.types import Batch
from objectives.base import Draw, Fuse, Fused, LossOutput, ModelSpec, Objective, Results, Side
from objectives.distill import DistillConfig
from objectives.heads import POOLED_HEADS, PooledHead


class AnswerConfig(DistillConfig):
    """Choose the answer from a list."""

    kind: Literal["answer"] = "answer"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    answers: tuple[str, ...] = ()
    """The answers, in the order of the head's outputs; filled from the training data when empty."""
    loss: Literal["bce", "ce"] | None = None
    """`bce`: one sigmoid an answer against its soft score. `ce`: softmax against the scores normalised to one. none =
    ce where a task has one right answer of a few (nlvr2, snli_ve), else bce."""
    head: PooledHead = "mlp"
    """`mlp`: linear, norm, GELU, linear (ViLT, METER, X-VLM). `norm_mlp`: a norm before these (BEiT-3 on NLVR2).
    `gelu_mlp`: linear, GELU, norm, linear (UNITER, LXMERT). `relu`: linear, ReLU, linear (ALBEF, BLIP). `linear`: one
    layer (UNITER on NLVR2)."""
    masked: bool = False
    """Read the pairs with the words and regions hidden that other objectives hide (LXMERT's pretraining)."""
    hidden: int | None = None
    """Width inside the head; None = twice that of pooled, of `relu` once."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"pooled"})

    def build(self, spec: ModelSpec) -> Answer:
        """Build the objective.

        Raises:
            ValueError: there is no fusion, or the answer list is empty.
        """
        if spec.pooled_width is None:
            raise ValueError(
                "objective answer needs a fusion, but model.fusion.kind is none; use single_stream or dual_stream"
            )
        if len(self.answers) < 2:
            raise ValueError(f"objectives.answer.answers has {len(self.answers)} entries; give at least two answers")
        return Answer(self, spec.pooled_width)


class Answer(Objective):
    """Classification head on the fused question. Reads ``batch.targets["answer_scores"]`` [T, A] in 0..1."""

    def __init__(self, config: AnswerConfig, width: int) -> None:
        super().__init__()
        self.config = config = config.model_copy(update={"loss": config.loss or "bce"})
        build = POOLED_HEADS[config.head]
        self.head: nn.Module = build(width, len(config.answers), config.hidden)
        self.asked = Fuse("masked", "masked") if config.masked else Fuse()
        self.needs = frozenset({self.asked})
        self.teaches_head = config.distill > 0
        if self.teaches_head:
            self.needs |= {replace(self.asked, teacher=True)}

    def count(self, batch: Batch) -> Tensor | float:
        """Return the number of questions; under `ce` those that have an answer of the list."""
        if self.config.loss == "bce":
            return float(batch.num_texts)
        return batch.targets["answer_scores"].any(1).sum()

    def chance(self, candidates: int) -> float | None:
        number = len(self.config.answers)
        if self.config.loss == "ce":
            return float(torch.tensor(number).log())
        # One right answer of A: the sum of A binary entropies at the prior 1 / A.
        prior = torch.tensor(1 / number)
        return float(-number * (prior * prior.log() + (1 - prior) * (1 - prior).log()))

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Sum over answers (bce) or cross-entropy (ce), mean over questions; ce leaves out those without an answer."""
        logits = self.head(results[self.asked].pooled).float()
        scores = batch.targets["answer_scores"].to(logits.dtype)
        target = scores
        if self.config.loss == "ce":
            target = scores / scores.sum(1, keepdim=True).clamp(min=1e-6)
        if share := self.config.share(batch.seen):
            with torch.no_grad():
                believed = results.teacher_head(self.name)(results[replace(self.asked, teacher=True)].pooled).float()
                target = target.lerp(self._probabilities(believed), share)
        if self.config.loss == "bce":
            loss = answer_terms(logits, target).sum(1).mean()
        else:
            answered = scores.any(1)
            terms = F.cross_entropy(logits, target, reduction="none")
            loss = (terms * answered).sum() / answered.sum().clamp(min=1)
        best = scores.gather(1, logits.detach().argmax(1, keepdim=True))
        return LossOutput(loss, {"score": best.mean()})

    def scores(self, pooled: Tensor) -> Tensor:
        """Pooled fused vectors [M, W] -> answer probabilities [M, A]."""
        return self._probabilities(self.head(pooled).float())

    def judge(self, fused: Fused) -> Tensor:
        """Fused rows -> answer probabilities [M, A]."""
        return self.scores(fused.pooled)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.config.loss == "bce" else logits.softmax(1)


def answer_terms(logits: Tensor, scores: Tensor) -> Tensor:
    """Logits and soft scores [T, A] -> the loss of each answer, one sigmoid each, [T, A]."""
    return F.binary_cross_entropy_with_logits(logits, scores, reduction="none")
