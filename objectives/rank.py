"""Ranking: which of several texts is an image's? (Kim et al. 2021, ViLT, section 4.3, finetuning for retrieval).

Shapes: B images, T texts, M rows, F false texts per image.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import initialise
from encoders.types import Batch
from objectives.base import Draw, Fuse, LossOutput, ModelSpec, Objective, Results, Rows, Side
from objectives.pairs import Positives, find_pairs, image_of_text, true_pairs
from vlp.config import Config


class RankConfig(Config):
    """Choose an image's text among false ones by the pooled fused vector."""

    kind: Literal["rank"] = "rank"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    negatives: int = Field(15, ge=1)
    """False texts for each image, drawn evenly from the batch that one rank runs at a time."""
    exclude: Positives = "id_or_caption"
    """Pairs that are never drawn as false."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"pooled"})

    def build(self, spec: ModelSpec) -> Rank:
        """Build the objective.

        Raises:
            ValueError: there is no fusion to rank with.
        """
        if spec.pooled_width is None:
            raise ValueError(
                "objective rank needs a fusion, but model.fusion.kind is none; use single_stream or dual_stream"
            )
        return Rank(self, spec.pooled_width)


class Rank(Objective):
    """One score a pair; softmax over the texts of each image."""

    def __init__(self, config: RankConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(width, 1)
        initialise(self)
        self.needs = frozenset({Fuse(rows="rank")})

    def count(self, batch: Batch) -> float:
        return float(batch.num_images)

    def chance(self, candidates: int) -> float:
        return math.log(1 + self.config.negatives)

    @torch.no_grad()
    def rows(self, results: Results, batch: Batch, draw: Draw) -> dict[str, Rows]:
        """Return for each image one of its texts, then F texts of others: M = B * (1 + F), image by image.

        Raises:
            ValueError: texts have several images each.
        """
        if batch.image_of_text is not None and batch.image_of_text.dim() > 1:
            raise ValueError(
                f"objective rank wants one image a text, here are {batch.image_of_text.shape[1]}; remove rank"
            )
        device = next(iter(batch.texts.values())).ids.device
        image = torch.arange(batch.num_images, device=device)
        own = draw.categorical("rank.own", (image_of_text(batch, device) == image[:, None]).float())  # [B]
        false = draw.categorical("rank.false", self._false(batch, device).repeat_interleave(self.config.negatives, 0))
        texts = torch.cat([own[:, None], false.unflatten(0, (-1, self.config.negatives))], 1)
        return {"rank": Rows(image.repeat_interleave(1 + self.config.negatives), texts.flatten())}

    def _false(self, batch: Batch, device: torch.device) -> Tensor:
        """Weights [B, T] of the texts that are false for each image."""
        by_image, _ = true_pairs(find_pairs(batch, self.config.exclude, device, everywhere=False))
        return (~by_image).float()

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy of the own text against the false ones, mean over images; without false ones it is 0."""
        scores = self.score(results[Fuse(rows="rank")].pooled).float().unflatten(0, (-1, 1 + self.config.negatives))
        found = self._false(batch, scores.device).any(1, keepdim=True)
        scores = torch.cat([scores[:, :1], scores[:, 1:].masked_fill(~found, -torch.inf)], 1)
        loss = F.cross_entropy(scores, torch.zeros_like(scores[:, 0], dtype=torch.long))
        return LossOutput(loss, {"accuracy": (scores.detach().argmax(1) == 0).float().mean()})

    def score(self, pooled: Tensor) -> Tensor:
        """Pooled fused vectors [M, W] -> score [M] of the pair, larger = better."""
        return self.head(pooled)[:, 0]
