"""Contrast within a modality (TCL; Yang et al. 2022, arXiv 2202.10401, sections 3.3 and 3.4).

Each image and each text is to find its own momentum embedding among all others of its modality (the image's is of
another augmentation, where `model.teacher_view` is `again`); and its own parts, the teacher's patches and words, among
those of others: the local mutual information.
Shapes: B images, T texts of this rank, R either, S all ranks', Q queued, K parts of one input, E embedding.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from encoders.types import Batch, Modality
from objectives.base import MAIN, Draw, Embed, Encode, LossOutput, ModelSpec, Objective, Results, Side
from objectives.collectives import gather_no_grad
from objectives.itc import contrastive, evenly, similarities, top1
from objectives.pairs import Pairing, Positives, find_pairs, first_numbers
from objectives.queue import PairQueue
from objectives.settings import ObjectiveSettings

SIDES: tuple[Modality, ...] = ("image", "text")
_NEVER = -1e4
"""Logit of what is no candidate; finite, so that a row without candidates has a gradient."""


class IntraConfig(ObjectiveSettings):
    """Image to image and text to text, by the momentum teacher's embeddings."""

    kind: Literal["intra"] = "intra"
    weight: float = 1.0
    """Weight of this loss in the sum; it is the mean of its two or four terms."""
    branch: str = MAIN
    """Which contrastive space; of a further one, `model.embed.branches` names it."""
    positives: Positives = "id_or_caption"
    """What counts as the same input: itself; also images of equal id; also texts of equal words."""
    queue: int = Field(0, ge=0)
    """Earlier pairs, over all ranks, whose embeds by the teacher are candidates too (TCL 65,536)."""
    local: bool = True
    """Also find one's own parts among the parts of this rank's others."""
    patch_pool: int = Field(4, ge=1)
    """Side of the squares of patches whose mean is one part of an image."""

    trains_embed: ClassVar[bool] = True
    reads: ClassVar[frozenset[Side]] = frozenset()

    def build(self, spec: ModelSpec) -> Intra:
        """Build the objective.

        Raises:
            ValueError: the image's parts are no patches.
        """
        if self.local and spec.image_grid is None:
            raise ValueError(
                "objectives.intra.local needs patches, which only model.vision.kind patch has; set it false"
            )
        return Intra(self, spec)


class Intra(Objective):
    """Contrastive loss of each side with the teacher's view of it."""

    def __init__(self, config: IntraConfig, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.embed_width is not None
        self.config, self.grid, self.prefix = config, spec.image_grid, spec.image_prefix
        self.own = {side: Embed(side, branch=config.branch) for side in SIDES}
        self.taught = {side: Embed(side, branch=config.branch, teacher=True) for side in SIDES}
        self.parts = {side: Embed(side, branch=config.branch, teacher=True, tokens=True) for side in SIDES}
        self.needs = frozenset({*self.own.values(), *self.taught.values()})
        self.states = Encode("text", branch=config.branch, teacher=True)
        if config.local:
            self.needs |= {*self.parts.values(), self.states}
        self.queue = PairQueue(config.queue, spec.embed_width, config.positives) if config.queue else None
        self._new: dict[int, tuple[Tensor, Tensor, Pairing]] = {}

    def count(self, batch: Batch) -> float:
        return float(batch.num_images)

    def chance(self, candidates: int) -> float | None:
        return None if self.config.local else math.log(candidates + self.config.queue)

    def before_step(self) -> None:
        self._new.clear()

    def after_step(self) -> None:
        """Put the step's pairs of all ranks into the queue."""
        for _, (image, text, pairs) in sorted(self._new.items()):
            assert self.queue is not None
            self.queue.append(image, text, pairs)
        self._new.clear()

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean of the terms of both sides, each a mean over this rank's images or texts."""
        scale, sizes = results.scales[self.config.branch], batch.counts
        image, text = results[self.own["image"]], results[self.own["text"]]
        all_image = gather_no_grad(results[self.taught["image"]], None if sizes is None else [s[0] for s in sizes])
        all_text = gather_no_grad(results[self.taught["text"]], None if sizes is None else [s[1] for s in sizes])
        pairs = find_pairs(batch, self.config.positives, image.device, everywhere=True)
        if self.queue is not None:
            self._new[draw.group] = all_image, all_text, pairs
        true = same_inputs(batch, pairs)
        # A rank's share of the texts differs from its share of the images where texts are more; `count` is images.
        shares = 1.0, (len(text) / len(all_text)) / (len(image) / len(all_image))
        terms, metrics = [], {}
        sides = zip(SIDES, (image, text), (all_image, all_text), true, shares, strict=True)
        for side, own, every, same, share in sides:
            seen, same = self._with_queued(side, every, same, pairs)
            logits = similarities(own, seen, scale)
            terms.append(share * contrastive(logits, evenly(same)))
            metrics[f"{side}_accuracy"] = top1(logits, same)
            if self.config.local:
                parts, keep = self._parts(side, results)
                first = first_numbers(batch, everywhere=True)[side == "text"]
                excluded = same[:, first : first + len(own)]
                terms.append(share * local_information(own, parts, keep, excluded, scale))
        return LossOutput(torch.stack(terms).mean(), metrics)

    def _with_queued(self, side: Modality, every: Tensor, same: Tensor, pairs: Pairing) -> tuple[Tensor, Tensor]:
        """Candidates [S + Q, E] and which are the same input [R, S + Q]."""
        if self.queue is None:
            return every, same
        by_id = {"image": (pairs.image_id, self.queue.image_id), "text": (pairs.caption_id, self.queue.caption_id)}
        ids, known = by_id[side]
        queued = self.queue.image if side == "image" else self.queue.text
        if ids is None or known is None:
            return torch.cat([every, queued]), F.pad(same, (0, len(queued)))
        return torch.cat([every, queued]), torch.cat([same, (ids[:, None] == known) & (known >= 0)], 1)

    def _parts(self, side: Modality, results: Results) -> tuple[Tensor, Tensor]:
        """The teacher's parts [R, K, E] and which are real [R, K]: squares of patches, or words."""
        found = results[self.parts[side]]
        if side == "text":
            keep = results[self.states].keep
            keep = found.new_ones(found.shape[:2], dtype=torch.bool) if keep is None else keep
            return found[:, 1:], keep[:, 1:]
        assert self.grid is not None
        squares = found[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        pooled = F.avg_pool2d(squares, min(self.config.patch_pool, *self.grid)).flatten(2).transpose(1, 2)
        return pooled, pooled.new_ones(pooled.shape[:2], dtype=torch.bool)


def same_inputs(batch: Batch, pairs: Pairing) -> tuple[Tensor, Tensor]:
    """Return which inputs are the same: own images x all images [B, S], own texts x all texts [T, S], bool."""
    images = pairs.own_image[:, None] == pairs.all_image[None]
    if pairs.image_id is not None and pairs.all_image_id is not None:
        images = images | (pairs.image_id[:, None] == pairs.all_image_id[None])
    device = pairs.own_text.device
    own = torch.arange(len(pairs.own_text), device=device) + first_numbers(batch, everywhere=True)[1]
    texts = own[:, None] == torch.arange(len(pairs.all_text), device=device)[None]
    if pairs.caption_id is not None and pairs.all_caption_id is not None:
        texts = texts | (pairs.caption_id[:, None] == pairs.all_caption_id[None])
    return images, texts


def local_information(own: Tensor, parts: Tensor, keep: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of each own part against all parts of the others, mean over the parts and the inputs (eq. 5).

    Args:
        own: [R, E], the student's embedding of each input.
        parts: [R, K, E], the teacher's.
        keep: [R, K] bool, real parts.
        same: [R, R] bool, inputs whose parts are no candidates.
        scale: [1], log of the inverse temperature.
    """
    logits = similarities(own, parts.flatten(0, 1), scale).unflatten(1, parts.shape[:2])  # [R, R, K]
    right = logits.diagonal(dim1=0, dim2=1).T  # [R, K]
    candidate = ~same[:, :, None] & keep[None]
    wrong = logits.masked_fill(~candidate, _NEVER).flatten(1).logsumexp(1)
    losses = F.softplus(wrong[:, None] - right) * keep
    return (losses.sum(1) / keep.sum(1).clamp(min=1)).mean()
