"""Contrast with the texts nearest to one's own (DeCLIP; Li et al. 2022, arXiv 2110.05208, section 3.2).

Similar pairs describe similar images: of each pair, the text among earlier ones that is nearest to the pair's own is a
true one for the image too.
Shapes: B images, T texts of this rank, S texts of all ranks, Q queued texts, E embedding.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from encoders.types import Batch
from objectives.base import Draw, LossOutput, ModelSpec, Objective, Results
from objectives.collectives import gather_no_grad
from objectives.itc import contrastive, evenly, similarities, top1
from objectives.multiview_itc import MultiviewSettings
from objectives.pairs import find_pairs, true_pairs
from objectives.queue import VectorQueue


class NearestItcConfig(MultiviewSettings):
    """Softmax contrastive loss of images against the queued texts that are nearest to the batch's."""

    kind: Literal["nearest_itc"] = "nearest_itc"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    queue: int = Field(65_536, ge=1)
    """Earlier texts, over all ranks, among which the nearest is sought; every view of a text is one."""

    def build(self, spec: ModelSpec) -> NearestItc:
        """Build the objective.

        Raises:
            ValueError: there is no second augmentation to compare.
        """
        self.check(spec, self.kind)
        assert spec.embed_width is not None
        return NearestItc(self, spec.embed_width)


class NearestItc(Objective):
    """Contrastive loss of every view of the images with the neighbours of every view of the texts."""

    def __init__(self, config: NearestItcConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.images, self.texts = config.passes
        self.needs = frozenset({*self.images, *self.texts})
        self.without_gradient = frozenset(self.texts)  # of which their neighbours are compared
        self.views = config.views
        self.queue = VectorQueue(config.queue, width)
        self._new: dict[int, Tensor] = {}

    def count(self, batch: Batch) -> float:
        return float(batch.num_images)

    def chance(self, candidates: int) -> float:
        return math.log(candidates)

    def before_step(self) -> None:
        self._new.clear()

    def after_step(self) -> None:
        """Put the step's texts of all ranks into the queue."""
        for _, texts in sorted(self._new.items()):
            self.queue.append(texts)
        self._new.clear()

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean over this rank's images of the cross-entropy against the neighbours of all ranks' texts."""
        scale = results.scales[self.config.branch]
        sizes = None if batch.counts is None else [texts for _, texts in batch.counts]
        images, texts = ([results[one] for one in passes] for passes in (self.images, self.texts))
        neighbours = [gather_no_grad(self.queue.nearest(text), sizes) for text in texts]
        # A micro-batch that runs again (evaluation within the step, a recomputation) replaces its own.
        self._new[draw.group] = torch.cat([gather_no_grad(text, sizes) for text in texts])
        pairs = find_pairs(batch, self.config.positives, images[0].device, everywhere=True)
        true = true_pairs(pairs)[0]
        logits = [similarities(image, found, scale) for image, found in product(images, neighbours)]
        losses = [contrastive(each, evenly(true)) for each in logits]
        return LossOutput(torch.stack(losses).mean(), {"accuracy": top1(logits[0], true)})
