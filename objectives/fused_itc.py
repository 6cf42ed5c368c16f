"""Contrast with the fused pair: text, image and pair should find each other (Xu et al. 2023, BridgeTower, as released).

Three softmax losses over all ranks' candidates: text to image, text to pair, image to pair.
Shapes: B images, T texts of this rank, N images, S texts of all ranks, E embedding, W width of the fused vector.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import initialise
from encoders.types import Batch
from objectives.base import MAIN, Draw, Embed, Fuse, LossOutput, ModelSpec, Objective, Results, Side
from objectives.collectives import gather_grad_to_all
from objectives.itc import contrastive, evenly, similarities, top1
from objectives.pairs import Positives, find_pairs, true_pairs
from objectives.settings import ObjectiveSettings


class FusedItcConfig(ObjectiveSettings):
    """Softmax contrastive loss among images, texts and fused pairs."""

    kind: Literal["fused_itc"] = "fused_itc"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    positives: Positives = "id_or_caption"
    """Which pairs count as true: each text's own image; also images of equal id; also captions of equal words."""
    max_scale: float = 100.0
    """Largest logit scale, the inverse of the smallest temperature."""

    trains_embed: ClassVar[bool] = True
    reads: ClassVar[frozenset[Side]] = frozenset({"pooled"})

    def build(self, spec: ModelSpec) -> FusedItc:
        """Build the objective.

        Raises:
            ValueError: there is no fusion.
        """
        if spec.pooled_width is None:
            raise ValueError("objective fused_itc needs a fusion, but model.fusion.kind is none; use bridge, or itc")
        assert spec.embed_width is not None
        return FusedItc(self, spec.pooled_width, spec.embed_width)


class FusedItc(Objective):
    """Contrastive loss of the two embeddings and that of the fused pair."""

    def __init__(self, config: FusedItcConfig, pooled_width: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(pooled_width, width)
        initialise(self)
        self.needs = frozenset({Embed("image"), Embed("text"), Fuse()})

    def chance(self, candidates: int) -> float:
        return math.log(candidates)

    def embed(self, pooled: Tensor) -> Tensor:
        """Fused vectors [T, W] -> unit-norm vectors [T, E] of the common space."""
        return F.normalize(self.head(pooled).float(), dim=-1)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean of the three losses, each a mean over its rows.

        The sum over ranks, weighted by their texts, is the loss of the joined batch.
        """
        image, text, pair = results[Embed("image")], results[Embed("text")], self.embed(results[Fuse()].pooled)
        scale = results.scales[MAIN]
        with torch.no_grad():
            scale.clamp_(max=math.log(self.config.max_scale))
        images, texts = (None, None) if batch.counts is None else map(list, zip(*batch.counts, strict=True))
        all_image, all_pair = gather_grad_to_all(image, images), gather_grad_to_all(pair, texts)
        pairs = find_pairs(batch, self.config.positives, image.device, everywhere=True)
        by_image, by_text = true_pairs(pairs)
        # A fused pair is a text's own if its image is one of the text's own.
        by_pair = by_text.index_select(1, pairs.all_text)  # [T, S]
        text_image = similarities(text, all_image, scale)
        share = (image.shape[0] / all_image.shape[0]) / (text.shape[0] / all_pair.shape[0])
        loss = (
            contrastive(text_image, evenly(by_text))
            + contrastive(similarities(text, all_pair, scale), evenly(by_pair))
            + share * contrastive(similarities(image, all_pair, scale), evenly(by_image))
        ) / 3
        return LossOutput(loss, {"accuracy": top1(text_image, by_text), "scale": scale.detach().exp()[0]})
