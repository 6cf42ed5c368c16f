"""Bounding box prediction: where in the picture is what the text says? (Zeng et al. 2022, X-VLM, section 3.2).

Boxes are (centre x, centre y, width, height) as shares of the picture's sides.
Shapes: T texts, W pooled width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.types import Batch, Images
from objectives.base import WHOLE, Draw, Fuse, LossOutput, ModelSpec, Objective, Results, Rows, Side
from objectives.heads import MlpHead
from objectives.pairs import image_of_text
from objectives.settings import ObjectiveSettings


class BoxConfig(ObjectiveSettings):
    """Predict a text's box in the whole picture."""

    kind: Literal["box"] = "box"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    distance: float = 1.0
    """Weight of the sum of the four absolute differences."""
    overlap: float = 1.0
    """Weight of one minus the generalised intersection over union."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"pooled"})

    def build(self, spec: ModelSpec) -> Box:
        """Build the objective.

        Raises:
            ValueError: there is no fusion.
        """
        if spec.pooled_width is None:
            raise ValueError("objective box needs a fusion, but model.fusion.kind is none; use dual_stream")
        return Box(self, spec.pooled_width)


class Box(Objective):
    """Head on the text fused with the whole picture.

    Reads ``batch.targets["box"]`` [T, 4] and ``batch.targets["has_box"]`` [T] bool (missing = all have one); a batch
    without boxes has no loss.
    """

    def __init__(self, config: BoxConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.head = MlpHead(width, 4)
        self.fused = Fuse(WHOLE, rows="box")
        self.needs = frozenset({self.fused})

    def rows(self, results: Results, batch: Batch, draw: Draw) -> dict[str, Rows]:
        """Return each text with the picture that its image is a region of."""
        device = next(iter(batch.texts.values())).ids.device
        own = image_of_text(batch, device)
        clean = batch.images.get("clean")
        if isinstance(clean, Images) and clean.owner is not None:
            own = clean.owner.index_select(0, own)
        return {"box": Rows(own, torch.arange(batch.num_texts, device=device))}

    def count(self, batch: Batch) -> Tensor | float:
        if "box" not in batch.targets:
            return 0.0
        return batch.targets["has_box"].sum() if "has_box" in batch.targets else float(batch.num_texts)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Sum of both distances, mean over the boxes."""
        found = self.boxes(results[self.fused].pooled)
        wanted = batch.targets.get("box", torch.zeros_like(found)).to(found.dtype)
        real = batch.targets.get("has_box", torch.full_like(found[:, 0], "box" in batch.targets)).to(found.dtype)
        number = real.sum().clamp(min=1)
        distance = (F.l1_loss(found, wanted, reduction="none").sum(1) * real).sum() / number
        overlap = ((1 - generalised_iou(found, wanted)) * real).sum() / number
        loss = self.config.distance * distance + self.config.overlap * overlap
        return LossOutput(loss, {"l1": distance.detach(), "giou": overlap.detach()})

    def boxes(self, pooled: Tensor) -> Tensor:
        """Pooled fused vectors [T, W] -> boxes [T, 4]."""
        return self.head(pooled).float().sigmoid()


def corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (centre x, centre y, width, height) [T, 4] -> upper left and lower right corners, [T, 2] each."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    return centre - size / 2, centre + size / 2


def generalised_iou(left: Tensor, right: Tensor) -> Tensor:
    """Return the generalised intersection over union [T] of boxes [T, 4] (Rezatofighi et al. 2019, algorithm 1)."""
    (left_low, left_high), (right_low, right_high) = corners(left), corners(right)
    common = (torch.minimum(left_high, right_high) - torch.maximum(left_low, right_low)).clamp(min=0).prod(1)
    union = left[:, 2:].prod(1) + right[:, 2:].prod(1) - common
    hull = (torch.maximum(left_high, right_high) - torch.minimum(left_low, right_low)).prod(1)
    tiny = torch.finfo(union.dtype).tiny
    return common / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
