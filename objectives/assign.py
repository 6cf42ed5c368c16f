"""Text assignment (TA): which of two images does the text belong to, if any (Li et al. 2021, ALBEF, section 5).

It prepares a model that reads two images per text for NLVR2.
Shapes: B images, T texts, D width, E embedding.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import initialise
from encoders.types import Batch
from objectives.base import Draw, Encode, Fuse, LossOutput, ModelSpec, Objective, Results, Rows, Side
from objectives.pairs import Positives, find_pairs, image_of_text, true_pairs
from objectives.settings import ObjectiveSettings

NUM_CLASSES = 3
"""The first image, the second, neither."""


class AssignConfig(ObjectiveSettings):
    """Assign the text to one of two images, or to neither."""

    kind: Literal["assign"] = "assign"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    exclude: Positives = "id_or_caption"
    """Images that are never shown as other ones, as in itm."""
    width: int = 256
    """Width of the frozen projection by which images alike are found (ALBEF: that of its contrastive pretraining)."""
    temperature: float = 0.07
    """Divides the similarity of images in the draw of another one."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"pooled"})

    def build(self, spec: ModelSpec) -> Assign:
        """Build the objective.

        Raises:
            ValueError: there is no fusion.
        """
        if spec.pooled_width is None:
            raise ValueError("objective assign needs a fusion, but model.fusion.kind is none; use dual_stream")
        return Assign(self, spec)


class Assign(Objective):
    """Head over three classes on the text fused with two images."""

    def __init__(self, config: AssignConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(spec.pooled_width or 0, NUM_CLASSES)
        self.alike = nn.Linear(spec.image_tower_width, config.width)
        initialise(self)
        self.alike.requires_grad_(False)
        self.shown, self.image = Fuse(rows="assign"), Encode("image")
        self.needs = frozenset({self.shown, self.image})

    def chance(self, candidates: int) -> float:
        return math.log(NUM_CLASSES)

    @torch.no_grad()
    def rows(self, results: Results, batch: Batch, draw: Draw) -> dict[str, Rows]:
        """Return two images for each text: in two of three draws its own and another one, in either order."""
        pooled = results[self.image].pooled
        own = image_of_text(batch, pooled.device)  # [T]
        weights = self._weights(pooled, batch)  # [T, B]
        other = draw.categorical("assign.other", weights)
        other = torch.where(weights.sum(1) > 0, other, own)
        rest = weights.scatter(1, other[:, None], 0.0)
        second = torch.where(rest.sum(1) > 0, draw.categorical("assign.second", rest), other)
        shown = draw.uniform("assign.shown", own.shape, own.device) > 1 / NUM_CLASSES
        order = draw.uniform("assign.order", own.shape, own.device) > 1 / 2
        left = torch.where(shown & order, own, other)
        right = torch.where(shown, torch.where(order, other, own), second)
        return {"assign": Rows(torch.stack([left, right], 1), torch.arange(len(own), device=own.device))}

    def _weights(self, pooled: Tensor, batch: Batch) -> Tensor:
        """Weights of images as another one for each text [T, B]; its own weighs 0."""
        _, by_text = true_pairs(find_pairs(batch, self.config.exclude, pooled.device, everywhere=False))
        vectors = F.normalize(self.alike(pooled.float()), dim=1)
        alike = (vectors @ vectors.T / self.config.temperature).index_select(0, image_of_text(batch, pooled.device))
        return alike.masked_fill(by_text, -torch.inf).softmax(1).nan_to_num(0.0)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy over the three classes, mean over the texts; a text that found no other image has no loss."""
        logits = self.head(results[self.shown].pooled).float()
        own = image_of_text(batch, logits.device)
        first, second = results.rows["assign"].image_index.unbind(1)
        label = torch.where(first == own, 0, torch.where(second == own, 1, 2))
        weight = ((first != own) | (second != own)).to(logits.dtype)
        loss = F.cross_entropy(logits, label, reduction="none")
        right = (logits.detach().argmax(1) == label) * weight
        return LossOutput((loss * weight).mean(), {"accuracy": right.sum() / weight.sum().clamp(min=1)})
