"""Image-text contrastive learning (ITC).

InfoNCE in both directions over all ranks' pairs (Radford et al. 2021, fig. 3), with several positives per row where
images or captions repeat (Li et al. 2021, ALBEF, eq. 2, the target spread evenly over the true pairs).
Shapes: B images, T texts of this rank, N images, S texts of all ranks, E embedding.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import ClassVar, Literal

import torch
from torch import Tensor

from encoders.types import Batch
from objectives.base import MAIN, Draw, Embed, LossOutput, ModelSpec, Objective, Results, Side
from objectives.collectives import gather_grad_to_all
from objectives.pairs import Positives, true_pairs
from vlp.config import Config


class ItcConfig(Config):
    """Softmax contrastive loss over all ranks' pairs."""

    kind: Literal["itc"] = "itc"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    positives: Positives = "id_or_caption"
    """Which pairs count as true: each text's own image; also images of equal id; also captions of equal words."""
    branch: str = MAIN
    """Which contrastive space; of a further one, `model.embed.branches` names it."""
    min_scale: float = 1.0
    """Smallest logit scale."""
    max_scale: float = 100.0
    """Largest logit scale, the inverse of the smallest temperature."""

    trains_embed: ClassVar[bool] = True
    reads: ClassVar[frozenset[Side]] = frozenset()

    def build(self, spec: ModelSpec) -> Itc:
        """Build the objective."""
        return Itc(self)


class Itc(Objective):
    """Contrastive loss of the two embeddings."""

    def __init__(self, config: ItcConfig) -> None:
        super().__init__()
        self.config = config
        self.image, self.text = (Embed(modality, branch=config.branch) for modality in ("image", "text"))
        self.needs = frozenset({self.image, self.text})

    def count(self, batch: Batch) -> float:
        return float(batch.num_images)

    def chance(self, candidates: int) -> float:
        return math.log(candidates)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean over this rank's images and texts of the cross-entropy against all ranks' candidates.

        The sum over ranks, weighted by their counts, is the loss of the joined batch.
        """
        image, text = results[self.image], results[self.text]
        scale = results.scales[self.config.branch]
        with torch.no_grad():  # as the references do: the parameter itself never leaves its bounds
            scale.clamp_(math.log(self.config.min_scale), math.log(self.config.max_scale))
        sizes = batch.counts
        all_image = gather_grad_to_all(image, None if sizes is None else [s[0] for s in sizes])
        all_text = gather_grad_to_all(text, None if sizes is None else [s[1] for s in sizes])
        by_image, by_text = true_pairs(batch, self.config.positives, image.device, everywhere=True)
        image_logits = similarities(image, all_text, scale)  # [B, S]
        text_logits = similarities(text, all_image, scale)  # [T, N]
        # A rank's share of the texts differs from its share of the images where texts are more; `count` is images.
        share = (text.shape[0] / all_text.shape[0]) / (image.shape[0] / all_image.shape[0])
        loss = (contrastive(image_logits, by_image) + share * contrastive(text_logits, by_text)) / 2
        metrics = {"accuracy": top1(image_logits, by_image), "scale": scale.detach().exp()[0]}
        return LossOutput(loss, metrics)


def similarities(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """Embeds [R, E] and [C, E] times the exponential of the log scale [1] -> logits [R, C].

    Autocast is off: at the scale of 100 a bf16 logit is rounded by up to 0.25, and many columns become equal.
    """
    device = left.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return scale.exp() * left @ right.T


def contrastive(logits: Tensor, true: Tensor) -> Tensor:
    """Return the mean cross-entropy of ``logits`` [R, C] against targets spread evenly over ``true`` [R, C]."""
    target = true.to(logits.dtype)
    target = target / target.sum(1, keepdim=True).clamp(min=1)  # a row without a true pair has no loss
    return -(target * logits.float().log_softmax(1)).sum(1).mean()


@torch.no_grad()
def top1(logits: Tensor, true: Tensor) -> Tensor:
    """Return the share of rows whose best column is a true pair."""
    return true.gather(1, logits.argmax(1, keepdim=True)).float().mean()
