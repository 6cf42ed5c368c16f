"""Image classification: one of C classes from the image alone (a supervised pretraining or finetuning task).

Shapes: B images, C classes, N image tokens, D width.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import initialise
from encoders.types import Batch, Tokens
from objectives.base import Draw, Encode, LossOutput, ModelSpec, Objective, Results, Side
from objectives.settings import ObjectiveSettings


class ClassifyConfig(ObjectiveSettings):
    """Choose the image's class from a list."""

    kind: Literal["classify"] = "classify"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of the head's outputs."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    pool: Literal["first", "patches"] = "first"
    """What of the image is read: the encoder's pooled vector, or the mean of its patches (BEiT, BEiT-3)."""
    norm: bool = False
    """Layer norm on that vector (BEiT, BEiT-3)."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset()

    def build(self, spec: ModelSpec) -> Classify:
        """Build the objective.

        Raises:
            ValueError: there are less than two classes.
        """
        if len(self.classes) < 2:
            raise ValueError(f"objectives.classify.classes has {len(self.classes)} entries; give at least two classes")
        return Classify(self, spec)


class Classify(Objective):
    """Linear head on the image. Reads ``batch.targets["class"]`` [B] int64, -100 where there is none."""

    one_modality = True

    def __init__(self, config: ClassifyConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.config, self.prefix = config, spec.image_prefix
        self.norm = nn.LayerNorm(spec.image_tower_width) if config.norm else nn.Identity()
        self.head = nn.Linear(spec.image_tower_width, len(config.classes))
        initialise(self)
        self.image = Encode("image")
        self.needs = frozenset({self.image})

    def count(self, batch: Batch) -> Tensor:
        return (batch.targets["class"] != -100).sum()

    def chance(self, candidates: int) -> float:
        return math.log(len(self.config.classes))

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy, mean over the images that have a class (0 if there is none)."""
        logits, label = self.logits(results[self.image]).float(), batch.targets["class"]
        total = F.cross_entropy(
            logits, label, ignore_index=-100, reduction="sum", label_smoothing=self.config.label_smoothing
        )
        count = (label != -100).sum().clamp(min=1)
        return LossOutput(total / count, {"accuracy": (logits.detach().argmax(1) == label).sum() / count})

    def logits(self, image: Tokens) -> Tensor:
        """Image tokens [B, N, D] -> class scores [B, C]."""
        if self.config.pool == "first":
            return self.head(self.norm(image.pooled))
        patches = image.states[:, self.prefix :]
        keep = None if image.keep is None else image.keep[:, self.prefix :, None]
        weight = torch.ones_like(patches[..., :1]) if keep is None else keep.to(patches.dtype)
        return self.head(self.norm((patches * weight).sum(1) / weight.sum(1)))
