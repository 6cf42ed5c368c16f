"""Pairwise sigmoid contrastive learning (SigLIP; Zhai et al. 2023, arXiv 2303.15343, algorithm 1).

Every pair of an image and a text is a binary question of its own, so no row needs a normalisation over all candidates.
Shapes: B images of this rank, S texts of all ranks, E embedding.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch.nn import functional as F

from encoders.types import Batch
from objectives.base import MAIN, Draw, Embed, LossOutput, ModelSpec, Objective, Results, Side
from objectives.collectives import gather_grad_to_all
from objectives.itc import similarities, top1
from objectives.pairs import Positives, find_pairs, true_pairs
from objectives.settings import ObjectiveSettings


class SigmoidConfig(ObjectiveSettings):
    """Sigmoid loss over all ranks' pairs; `model.embed.logit_bias` is its bias (-10 in the paper)."""

    kind: Literal["sigmoid"] = "sigmoid"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    positives: Positives = "id_or_caption"
    """Which pairs count as true: each text's own image; also images of equal id; also captions of equal words."""
    branch: str = MAIN
    """Which contrastive space; of a further one, `model.embed.branches` names it."""

    trains_embed: ClassVar[bool] = True
    reads: ClassVar[frozenset[Side]] = frozenset()

    def build(self, spec: ModelSpec) -> Sigmoid:
        """Build the objective."""
        return Sigmoid(self)


class Sigmoid(Objective):
    """Binary cross-entropy of every pair of the two embeddings."""

    def __init__(self, config: SigmoidConfig) -> None:
        super().__init__()
        self.config = config
        self.image, self.text = (Embed(modality, branch=config.branch) for modality in ("image", "text"))
        self.needs = frozenset({self.image, self.text})

    def count(self, batch: Batch) -> float:
        return float(batch.num_images)

    def chance(self, candidates: int) -> float:
        """Of one image: each of its pairs is true with probability 1 / candidates."""
        return candidates * math.log(candidates) - (candidates - 1) * math.log(max(1, candidates - 1))

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean over this rank's images of the sum over all ranks' texts.

        The sum over ranks, weighted by their counts, is the loss of the joined batch.
        """
        scale, bias = results.scales[self.config.branch], results.biases.get(self.config.branch)
        texts = gather_grad_to_all(results[self.text], None if batch.counts is None else [s[1] for s in batch.counts])
        logits = similarities(results[self.image], texts, scale)  # [B, S]
        if bias is not None:
            logits = logits + bias
        true, _ = true_pairs(find_pairs(batch, self.config.positives, logits.device, everywhere=True))
        sign = true.to(logits.dtype) * 2 - 1
        loss = -F.logsigmoid(sign * logits).sum(1).mean()
        metrics = {"accuracy": top1(logits, true), "scale": scale.detach().exp()[0]}
        if bias is not None:
            metrics["bias"] = bias.detach()[0]
        return LossOutput(loss, metrics)
