"""Image-text contrast of several views of each pair (DeCLIP; Li et al. 2022, arXiv 2110.05208, section 3.2).

Every view of the images is compared with every view of the texts; the images may come with a second augmentation, the
texts with words masked or changed.
Shapes: B images, T texts of this rank, N images, S texts of all ranks, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from encoders.types import AttentionKind, Batch, Vocabulary
from objectives.base import (
    AGAIN,
    EDITED,
    MAIN,
    Draw,
    Embed,
    LossOutput,
    ModelSpec,
    Objective,
    Results,
    Side,
    View,
    ViewText,
)
from objectives.collectives import gather_grad_to_all
from objectives.itc import contrastive, evenly, similarities, top1
from objectives.pairs import Positives, find_pairs, true_pairs
from objectives.settings import ObjectiveSettings

ImageViews: TypeAlias = tuple[Literal["clean", "again"], ...]
TextViews: TypeAlias = tuple[Literal["clean", "masked", "edited"], ...]


class MultiviewSettings(ObjectiveSettings):
    """Which views of the pairs are compared."""

    images: ImageViews = Field(("clean", "again"), min_length=1)
    """Views of the images: `clean`, and `again`, another augmentation."""
    texts: TextViews = Field(("clean", "edited"), min_length=1)
    """Views of the texts: `clean`, `masked` as mlm masks them, and `edited`, with words changed by `data.edits`."""
    positives: Positives = "id_or_caption"
    """Which pairs count as true: each text's own image; also images of equal id; also captions of equal words."""
    branch: str = MAIN
    """Which contrastive space; of a further one, `model.embed.branches` names it."""

    trains_embed: ClassVar[bool] = True
    reads: ClassVar[frozenset[Side]] = frozenset()

    def check(self, spec: ModelSpec, kind: str) -> None:
        """Raise ValueError if there is no second augmentation to compare."""
        if AGAIN in self.images and not spec.reads_pixels:
            raise ValueError(
                f"objectives.{kind}.images again is another augmentation of the pixels, but model.vision.kind "
                "region reads a detector's arrays; set it to [clean]"
            )

    @property
    def passes(self) -> tuple[list[Embed], list[Embed]]:
        """Embeds of the images and of the texts."""
        images, texts = ([*dict.fromkeys(views)] for views in (self.images, self.texts))
        return (
            [Embed("image", view, self.branch) for view in images],
            [Embed("text", view, self.branch) for view in texts],
        )

    @property
    def views(self) -> dict[str, View]:
        """How the text views are made that no other objective makes."""
        return {EDITED: EditedView()} if EDITED in self.texts else {}


class MultiviewItcConfig(MultiviewSettings):
    """Softmax contrastive loss over all ranks' pairs, mean over the pairs of views."""

    kind: Literal["multiview_itc"] = "multiview_itc"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    min_scale: float = 1.0
    """Smallest logit scale."""
    max_scale: float = 100.0
    """Largest logit scale, the inverse of the smallest temperature."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all candidates."""

    def build(self, spec: ModelSpec) -> MultiviewItc:
        """Build the objective.

        Raises:
            ValueError: there is no second augmentation to compare.
        """
        self.check(spec, self.kind)
        return MultiviewItc(self)


@dataclass(frozen=True)
class EditedView:
    """A text whose words the data have changed, as it is."""

    attention: AttentionKind = "full"

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Take one text [L]."""
        return ViewText(ids)


class MultiviewItc(Objective):
    """Contrastive loss of every view of the images with every view of the texts."""

    def __init__(self, config: MultiviewItcConfig) -> None:
        super().__init__()
        self.config = config
        self.images, self.texts = config.passes
        self.needs = frozenset({*self.images, *self.texts})
        self.views = config.views

    def count(self, batch: Batch) -> float:
        return float(batch.num_images)

    def chance(self, candidates: int) -> float:
        return math.log(candidates)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean over this rank's images and texts of the cross-entropy against all ranks' candidates."""
        scale = results.scales[self.config.branch]
        with torch.no_grad():
            scale.clamp_(math.log(self.config.min_scale), math.log(self.config.max_scale))
        images, texts = self._gathered(results, batch)
        (own_image, all_image), (own_text, all_text) = images[0], texts[0]
        by_image, by_text = true_pairs(find_pairs(batch, self.config.positives, own_image.device, everywhere=True))
        image_target, text_target = (evenly(true, self.config.label_smoothing) for true in (by_image, by_text))
        # A rank's share of the texts differs from its share of the images where texts are more; `count` is images.
        share = (len(own_text) / len(all_text)) / (len(own_image) / len(all_image))
        terms, metrics = [], {"scale": scale.detach().exp()[0]}
        for (image, every_image), (text, every_text) in product(images, texts):
            logits = similarities(image, every_text, scale)
            by_text_loss = contrastive(similarities(text, every_image, scale), text_target)
            terms.append((contrastive(logits, image_target) + share * by_text_loss) / 2)
            metrics.setdefault("accuracy", top1(logits, by_image))
        return LossOutput(torch.stack(terms).mean(), metrics)

    def _gathered(self, results: Results, batch: Batch) -> tuple[list[tuple[Tensor, Tensor]], ...]:
        """Of each view, own embeds and those of all ranks: [B, E] and [N, E], [T, E] and [S, E]."""
        sizes = batch.counts
        return tuple(
            [
                (results[one], gather_grad_to_all(results[one], None if sizes is None else [s[side] for s in sizes]))
                for one in passes
            ]
            for side, passes in enumerate((self.images, self.texts))
        )
