"""Contrast token by token (FILIP; Yao et al. 2022, arXiv 2111.07783, section 3.1).

An image and a text are as similar as their tokens: each token of one side finds its best of the other, and the mean
over the side's tokens counts. So the similarity of an image to a text is not that of the text to the image.
Shapes: B images, T texts of this rank, S candidates of all ranks, N and L tokens of either side, E embedding.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from encoders.precision import full_precision
from encoders.types import Batch
from objectives.base import MAIN, Draw, Embed, Encode, LossOutput, ModelSpec, Objective, Results, Side
from objectives.collectives import gather_grad_to_all, gather_no_grad, world_size
from objectives.itc import contrastive, evenly, top1
from objectives.pairs import Positives, find_pairs, true_pairs
from objectives.settings import ObjectiveSettings

_AT_ONCE = 64
"""Candidates that are compared at a time: all pairs of all tokens do not fit into memory."""


class TokenItcConfig(ObjectiveSettings):
    """Softmax contrastive loss over token-wise similarities, of the micro-batches that all ranks run at a time."""

    kind: Literal["token_itc"] = "token_itc"
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
    """Share of the target that is spread evenly over all candidates."""

    trains_embed: ClassVar[bool] = True
    reads: ClassVar[frozenset[Side]] = frozenset()

    def build(self, spec: ModelSpec) -> TokenItc:
        """Build the objective."""
        return TokenItc(self, spec.max_length)


class TokenItc(Objective):
    """Contrastive loss of all tokens' embeddings, special ones included, padding not."""

    def __init__(self, config: TokenItcConfig, max_length: int | None) -> None:
        super().__init__()
        self.config, self.max_length = config, max_length
        self.image, self.text = (Embed(side, branch=config.branch, tokens=True) for side in ("image", "text"))
        self.image_states, self.text_states = (Encode(side, branch=config.branch) for side in ("image", "text"))
        self.needs = frozenset({self.image, self.text, self.image_states, self.text_states})

    def count(self, batch: Batch) -> float:
        return float(batch.num_images)

    def chance(self, candidates: int) -> float:
        return math.log(candidates)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean over this rank's images and texts of the cross-entropy against all ranks' candidates."""
        scale = results.scales[self.config.branch]
        with torch.no_grad():
            scale.clamp_(math.log(self.config.min_scale), math.log(self.config.max_scale))
        image, text = results[self.image], results[self.text]
        image_keep = _real(image, results[self.image_states].keep)
        text_keep = _real(text, results[self.text_states].keep)
        sizes = batch.counts
        images = None if sizes is None else [s[0] for s in sizes]
        texts = None if sizes is None else [s[1] for s in sizes]
        all_text, all_text_keep = gather_tokens(*self._padded(text, text_keep), texts)
        all_image, all_image_keep = gather_tokens(image, image_keep, images)
        image_logits = scale.exp() * late_similarities(image, image_keep, all_text, all_text_keep)
        text_logits = scale.exp() * late_similarities(text, text_keep, all_image, all_image_keep)
        by_image, by_text = true_pairs(find_pairs(batch, self.config.positives, image.device, everywhere=True))
        targets = (evenly(true, self.config.label_smoothing) for true in (by_image, by_text))
        by_image_loss, by_text_loss = map(contrastive, (image_logits, text_logits), targets)
        # A rank's share of the texts differs from its share of the images where texts are more; `count` is images.
        share = (len(text) / len(all_text)) / (len(image) / len(all_image))
        metrics = {"accuracy": top1(image_logits, by_image), "scale": scale.detach().exp()[0]}
        return LossOutput((by_image_loss + share * by_text_loss) / 2, metrics)

    def _padded(self, text: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Bring texts [T, L, E] to the one length that all ranks know."""
        if world_size() == 1:
            return text, keep
        if self.max_length is None:
            raise ValueError(
                "objective token_itc needs model.text.max_length on several ranks; use model.text.kind text"
            )
        more = self.max_length - text.shape[1]
        return F.pad(text, (0, 0, 0, more)), F.pad(keep, (0, more))


def _real(tokens: Tensor, keep: Tensor | None) -> Tensor:
    return tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if keep is None else keep


def gather_tokens(tokens: Tensor, keep: Tensor, sizes: list[int] | None) -> tuple[Tensor, Tensor]:
    """Return the tokens [S, N, E] of all ranks, whose gradient flows back, and which are real [S, N]."""
    return gather_grad_to_all(tokens, sizes), gather_no_grad(keep.to(torch.uint8), sizes).bool()


def late_similarities(left: Tensor, left_keep: Tensor, right: Tensor, right_keep: Tensor) -> Tensor:
    """Mean over a left row's tokens of each one's best similarity in a right row (eq. 4 and 5) -> [R, S].

    Args:
        left: [R, N, E] of unit norm.
        left_keep: [R, N] bool, which are real.
        right: [S, L, E] of unit norm.
        right_keep: [S, L] bool, at least one a row.
    """
    with full_precision(left):
        parts = [
            checkpoint(_late, left, left_keep, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(right.split(_AT_ONCE), right_keep.split(_AT_ONCE), strict=True)
        ]
    return torch.cat(parts, 1)


def _late(left: Tensor, left_keep: Tensor, right: Tensor, right_keep: Tensor) -> Tensor:
    found = (left.flatten(0, 1) @ right.flatten(0, 1).T).view(*left.shape[:2], *right.shape[:2])  # [R, N, S, L]
    best = found.masked_fill(~right_keep, -torch.inf).amax(3)
    weight = left_keep.to(best.dtype)
    return torch.einsum("rns,rn->rs", best, weight / weight.sum(1, keepdim=True))
