"""Ranking: which of several texts is an image's? (Kim et al. 2021, ViLT, section 4.3, finetuning for retrieval).

Or by a margin between the true pair and false ones (Chen et al. 2020, UNITER, appendix A.2).
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
from objectives.settings import ObjectiveSettings


class RankConfig(ObjectiveSettings):
    """Choose an image's text among false ones by the pooled fused vector."""

    kind: Literal["rank"] = "rank"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    loss: Literal["softmax", "margin"] = "softmax"
    """`softmax` over an image's texts (ViLT); `margin`: the sigmoid of each false pair's score stays by `margin` below
    the true one's (UNITER)."""
    margin: float = 0.2
    """Of the loss `margin`."""
    scheme: Literal["texts", "both", "given"] = "texts"
    """`texts`: false texts of each image (ViLT); `both`: also the same number of false images of its text (UNITER);
    `given`: the data's own pairs in groups of 1 + `negatives`, the true one first."""
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
    """One score a pair, compared within groups: a true pair first, then false ones."""

    def __init__(self, config: RankConfig, width: int) -> None:
        super().__init__()
        self.config, self.given = config, config.scheme == "given"
        self.group = 1 + config.negatives * (2 if config.scheme == "both" else 1)
        self.head = nn.Linear(width, 1)
        initialise(self)
        self.pairs = Fuse() if self.given else Fuse(rows="rank")
        self.needs = frozenset({self.pairs})

    def count(self, batch: Batch) -> float:
        return batch.num_texts / self.group if self.given else float(batch.num_images)

    def chance(self, candidates: int) -> float:
        return self.config.margin if self.config.loss == "margin" else math.log(self.group)

    @torch.no_grad()
    def rows(self, results: Results, batch: Batch, draw: Draw) -> dict[str, Rows]:
        """Return for each image one of its texts, then F texts of others (and F other images of its text).

        M is B times the size of a group, group by group.

        Raises:
            ValueError: texts have several images each.
        """
        if self.given:
            return {}
        if batch.image_of_text is not None and batch.image_of_text.dim() > 1:
            raise ValueError(
                f"objective rank wants one image a text, here are {batch.image_of_text.shape[1]}; remove rank"
            )
        device = next(iter(batch.texts.values())).ids.device
        image = torch.arange(batch.num_images, device=device)
        own = draw.categorical("rank.own", (image_of_text(batch, device) == image[:, None]).float())  # [B]
        by_image, by_text = self._false(batch, device)
        number = self.config.negatives
        false = draw.categorical("rank.false", by_image.repeat_interleave(number, 0)).unflatten(0, (-1, number))
        texts, images = torch.cat([own[:, None], false], 1), image[:, None].expand(-1, 1 + number)
        if self.config.scheme == "both":
            false = draw.categorical("rank.false_image", by_text.index_select(0, own).repeat_interleave(number, 0))
            texts = torch.cat([texts, own[:, None].expand(-1, number)], 1)
            images = torch.cat([images, false.unflatten(0, (-1, number))], 1)
        return {"rank": Rows(images.flatten(), texts.flatten())}

    def _false(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Weights of the texts that are false for each image [B, T], and of the images for each text [T, B]."""
        by_image, by_text = true_pairs(find_pairs(batch, self.config.exclude, device, everywhere=False))
        return (~by_image).float(), (~by_text).float()

    def _found(self, batch: Batch, scores: Tensor, rows: Rows | None) -> Tensor:
        """[B, group - 1], whether each false pair is one (a batch may hold none)."""
        if rows is None:
            return torch.ones_like(scores[:, 1:], dtype=torch.bool)
        by_image, by_text = self._false(batch, scores.device)
        found = by_image.any(1, keepdim=True).expand(-1, self.config.negatives)
        if self.config.scheme == "texts":
            return found
        own = rows.text_index.unflatten(0, (-1, self.group))[:, 0]
        found_image = by_text.index_select(0, own).any(1, keepdim=True).expand(-1, self.config.negatives)
        return torch.cat([found, found_image], 1)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean over groups of the cross-entropy of the true pair, or over false pairs of what they come too near."""
        scores = self.score(results[self.pairs].pooled).float().unflatten(0, (-1, self.group))
        found = self._found(batch, scores, results.rows.get("rank"))
        scores = torch.cat([scores[:, :1], scores[:, 1:].masked_fill(~found, -torch.inf)], 1)
        if self.config.loss == "margin":
            loss = (margin_terms(scores, self.config.margin) * found).mean()
        else:
            loss = F.cross_entropy(scores, torch.zeros_like(scores[:, 0], dtype=torch.long))
        return LossOutput(loss, {"accuracy": (scores.detach().argmax(1) == 0).float().mean()})

    def score(self, pooled: Tensor) -> Tensor:
        """Pooled fused vectors [M, W] -> score [M] of the pair, larger = better."""
        return self.head(pooled)[:, 0]


def margin_terms(scores: Tensor, margin: float) -> Tensor:
    """Scores [G, 1 + F], the true pair's first -> how much each false pair comes too near [G, F], sigmoids compared."""
    scores = scores.sigmoid()
    return (margin + scores[:, 1:] - scores[:, :1]).clamp(min=0)
