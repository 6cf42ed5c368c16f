"""Image-text contrastive learning (ITC).

InfoNCE in both directions over all ranks' pairs (Radford et al. 2021, fig. 3), with several positives per row where
images or captions repeat (Li et al. 2021, ALBEF, eq. 2, the target spread evenly over the true pairs). With a momentum
teacher (ALBEF, section 3.3) the candidates are its embeds, those of earlier pairs included (the queue), and a share of
the target is what it believes itself.
Shapes: B images, T texts of this rank, N images, S texts of all ranks and the queue, Q pairs in it, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from encoders.precision import full_precision
from encoders.types import Batch
from objectives.base import MAIN, Draw, Embed, LossOutput, ModelSpec, Objective, Results, Side
from objectives.collectives import gather_grad_to_all, gather_no_grad
from objectives.distill import DistillConfig
from objectives.pairs import Pairing, Positives, find_pairs, image_of_text, matched, true_pairs, true_queued
from objectives.queue import PairQueue


class ItcConfig(DistillConfig):
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
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all candidates (ALIGN 0.1)."""
    matched: bool = False
    """Of the pairs only the true ones have a loss, by ``targets["match"]``; all are candidates (FLAVA)."""
    queue: int = Field(0, ge=0)
    """Earlier pairs, over all ranks, whose embeds by the teacher are candidates too (ALBEF 65,536, BLIP 57,600)."""

    trains_embed: ClassVar[bool] = True
    reads: ClassVar[frozenset[Side]] = frozenset()

    def build(self, spec: ModelSpec) -> Itc:
        """Build the objective."""
        assert spec.embed_width is not None
        return Itc(self, spec.embed_width)


class Itc(Objective):
    """Contrastive loss of the two embeddings."""

    def __init__(self, config: ItcConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.image, self.text = (Embed(modality, branch=config.branch) for modality in ("image", "text"))
        self.needs = frozenset({self.image, self.text})
        self.queue = PairQueue(config.queue, width, config.positives) if config.queue else None
        self.taught = config.queue > 0 or config.distill > 0
        if self.taught:
            self.image_taught, self.text_taught = replace(self.image, teacher=True), replace(self.text, teacher=True)
            self.needs |= {self.image_taught, self.text_taught}
        self._new: dict[int, tuple[Tensor, Tensor, Pairing]] = {}

    def count(self, batch: Batch) -> Tensor | float:
        if not self.config.matched:
            return float(batch.num_images)
        return self._weights(batch)[0].sum()

    @staticmethod
    def _weights(batch: Batch) -> tuple[Tensor, Tensor]:
        """Whether images [B] and texts [T] have a loss, 1 or 0: an image with a true text does."""
        true = matched(batch).float()
        if batch.image_of_text is None:
            return true, true
        own = image_of_text(batch, true.device)
        return true.new_zeros(batch.num_images).index_add(0, own, true).clamp(max=1), true

    def chance(self, candidates: int) -> float:
        return math.log(candidates + self.config.queue)

    def before_step(self) -> None:
        self._new.clear()

    def after_step(self) -> None:
        """Put the step's pairs of all ranks into the queue."""
        for _, (image, text, pairs) in sorted(self._new.items()):
            assert self.queue is not None
            self.queue.append(image, text, pairs)
        self._new.clear()

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean over this rank's images and texts of the cross-entropy against all ranks' candidates.

        The sum over ranks, weighted by their counts, is the loss of the joined batch.
        """
        image, text = results[self.image], results[self.text]
        scale = results.scales[self.config.branch]
        with torch.no_grad():  # as the references do: the parameter itself never leaves its bounds
            scale.clamp_(math.log(self.config.min_scale), math.log(self.config.max_scale))
        sizes = batch.counts
        gather = gather_no_grad if self.taught else gather_grad_to_all
        seen_image, seen_text = (
            (results[self.image_taught], results[self.text_taught]) if self.taught else (image, text)
        )
        all_image = gather(seen_image, None if sizes is None else [s[0] for s in sizes])
        all_text = gather(seen_text, None if sizes is None else [s[1] for s in sizes])
        pairs = find_pairs(batch, self.config.positives, image.device, everywhere=True)
        # A rank's share of the texts differs from its share of the images where texts are more; `count` is images.
        share = (text.shape[0] / all_text.shape[0]) / (image.shape[0] / all_image.shape[0])
        by_image, by_text = true_pairs(pairs)
        if self.queue is not None:
            # A micro-batch that runs again (evaluation within the step, a recomputation) replaces its own.
            self._new[draw.group] = all_image, all_text, pairs
            all_image, all_text = torch.cat([all_image, self.queue.image]), torch.cat([all_text, self.queue.text])
            by_image, by_text = self._with_queued(by_image, by_text, pairs, self.queue)
        image_logits = similarities(image, all_text, scale)  # [B, S]
        text_logits = similarities(text, all_image, scale)  # [T, N]
        smoothing = self.config.label_smoothing
        image_target, text_target = evenly(by_image, smoothing), evenly(by_text, smoothing)
        if mix := self.config.share(batch.seen):
            with torch.no_grad():
                image_target = believed(image_target, similarities(seen_image, all_text, scale), mix)
                text_target = believed(text_target, similarities(seen_text, all_image, scale), mix)
        image_weight, text_weight = self._weights(batch) if self.config.matched else (None, None)
        by_text_loss = contrastive(text_logits, text_target, text_weight)
        loss = (contrastive(image_logits, image_target, image_weight) + share * by_text_loss) / 2
        metrics = {"accuracy": top1(image_logits, by_image), "scale": scale.detach().exp()[0]}
        return LossOutput(loss, metrics)

    @staticmethod
    def _with_queued(by_image: Tensor, by_text: Tensor, pairs: Pairing, queue: PairQueue) -> tuple[Tensor, Tensor]:
        """True pairs with the queue's columns behind the step's."""
        if queue.image_id is None:
            return F.pad(by_image, (0, queue.size)), F.pad(by_text, (0, queue.size))
        more_image, more_text = true_queued(pairs, queue.image_id, queue.caption_id)
        return torch.cat([by_image, more_image], 1), torch.cat([by_text, more_text], 1)


def similarities(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """Embeds [R, E] and [C, E] times the exponential of the log scale [1] -> logits [R, C].

    Autocast is off: at the scale of 100 a bf16 logit is rounded by up to 0.25, and many columns become equal.
    """
    with full_precision(left):
        return scale.exp() * left @ right.T


def evenly(true: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return each row's target [R, C]: even over ``true`` [R, C], of which a row may have none; a share over all."""
    target = true.float()
    target = target / target.sum(1, keepdim=True).clamp(min=1)
    return target if smoothing == 0 else target * (1 - smoothing) + smoothing / target.shape[1]


def believed(target: Tensor, logits: Tensor, share: float) -> Tensor:
    """Return the target [R, C] of which ``share`` is what the teacher's ``logits`` [R, C] say."""
    return target.to(logits.dtype).lerp(logits.softmax(1), share)


def contrastive(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of ``logits`` [R, C] against ``target`` [R, C], of the rows of ``weight`` [R] 1."""
    terms = -(target.to(logits.dtype) * logits.float().log_softmax(1)).sum(1)
    return terms.mean() if weight is None else (terms * weight).sum() / weight.sum().clamp(min=1)


@torch.no_grad()
def top1(logits: Tensor, true: Tensor) -> Tensor:
    """Return the share of rows whose best column is a true pair."""
    return true.gather(1, logits.argmax(1, keepdim=True)).float().mean()
