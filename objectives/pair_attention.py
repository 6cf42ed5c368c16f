"""Two images of one text that look at each other: UNITER's "paired-attn" head (Chen et al. 2020, section 4.1, NLVR2).

Shapes: T texts, S fused tokens of one image with the text, D width, A answers.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import Attention, attention_mask, initialise
from encoders.types import Batch, Tokens
from objectives.base import Draw, Fuse, Fused, LossOutput, ModelSpec, Objective, Results, Side
from objectives.settings import ObjectiveSettings


class PairAttentionConfig(ObjectiveSettings):
    """Answer about a text and two images, each fused with the text (``model.fusion.images: each``)."""

    kind: Literal["pair_attention"] = "pair_attention"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    answers: tuple[str, ...] = ("False", "True")
    """The answers, in the order of the head's outputs."""
    heads: int = 12
    """Attention heads."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"image", "text"})

    def build(self, spec: ModelSpec) -> PairAttention:
        """Build the objective.

        Raises:
            ValueError: the fusion does not give states of image and text in one width.
        """
        if spec.image_width is None or spec.image_width != spec.text_width:
            raise ValueError(
                f"objective pair_attention needs fused image and text states of one width, which model.fusion.kind "
                f"{spec.fusion} does not give; use single_stream with images each"
            )
        return PairAttention(self, spec.text_width)


class AttentionPool(nn.Module):
    """Mean of the states, weighted by a softmax of one rectified score each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        """[T, S, D] with keep [T, S] -> [T, D]."""
        scores = F.relu(self.score(states)).masked_fill(~keep[..., None], -torch.inf)
        return (scores.softmax(1) * states).sum(1)


class PairHead(nn.Module):
    """Each image's tokens read the other's, are mixed with their own and pooled; both together are classified."""

    def __init__(self, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.left, self.right = Attention(width, heads), Attention(width, heads)
        self.mix = nn.Linear(2 * width, width)
        self.pool = AttentionPool(width)
        self.output = nn.Linear(2 * width, outputs)
        initialise(self)

    def forward(self, left: Tensor, right: Tensor, left_keep: Tensor, right_keep: Tensor) -> Tensor:
        """Fused tokens of the two images [T, S, D] with keep [T, S] -> logits [T, A]."""
        seen = self.left(left, self.left.project(right), attention_mask(right_keep))
        given = self.right(right, self.right.project(left), attention_mask(left_keep))
        pooled = [
            self.pool(F.relu(self.mix(torch.cat([read, own], -1))), keep)
            for read, own, keep in ((seen, left, left_keep), (given, right, right_keep))
        ]
        return self.output(torch.cat(pooled, -1))


class PairAttention(Objective):
    """Classification of a text with two images. Reads ``batch.targets["answer_scores"]`` [T, A]."""

    def __init__(self, config: PairAttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.head = PairHead(width, config.heads, len(config.answers))
        self.needs = frozenset({Fuse()})

    def chance(self, candidates: int) -> float:
        return math.log(len(self.config.answers))

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy, mean over texts."""
        logits = self.logits(results[Fuse()]).float()
        scores = batch.targets["answer_scores"].to(logits.dtype)
        best = scores.gather(1, logits.detach().argmax(1, keepdim=True))
        return LossOutput(F.cross_entropy(logits, scores), {"score": best.mean()})

    def judge(self, fused: Fused) -> Tensor:
        """States of both images with the text -> answer probabilities [T, A]."""
        return self.logits(fused).float().softmax(1)

    def logits(self, fused: Fused) -> Tensor:
        """States of both images with the text -> logits [T, A]."""
        assert fused.image is not None and fused.text is not None
        sides = [_halves(side) for side in (fused.text, fused.image)]  # the order within an image does not matter
        left, right = (torch.cat([side[0][n] for side in sides], 1) for n in (0, 1))
        left_keep, right_keep = (torch.cat([side[1][n] for side in sides], 1) for n in (0, 1))
        return self.head(left, right, left_keep, right_keep)


def _halves(tokens: Tokens) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """States [T, 2 * N, D] and keep [T, 2 * N] of the two images, each cut in two."""
    keep = tokens.keep
    if keep is None:
        keep = torch.ones(tokens.states.shape[:2], dtype=torch.bool, device=tokens.states.device)
    return tokens.states.chunk(2, 1), keep.chunk(2, 1)
