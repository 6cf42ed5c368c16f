"""Self-supervision of images by SimSiam (Chen and He 2021, "Exploring simple Siamese representation learning").

Two augmentations of each image go through one encoder; from the projection of either the other's is predicted, which
stands still (no gradient): arXiv 2011.10566, algorithm 1.
Shapes: B images, D width of the encoder, W width of the projections.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.types import Batch
from objectives.base import AGAIN, Draw, Embed, Encode, LossOutput, ModelSpec, Objective, Pass, Results, Side
from objectives.settings import ObjectiveSettings


class SimSiamConfig(ObjectiveSettings):
    """Predict the projection of an image's other augmentation."""

    kind: Literal["simsiam"] = "simsiam"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    input: Literal["pooled", "embed"] = "pooled"
    """What is projected: the image tower's pooled vector, or that in the contrastive space, before it gets unit norm
    (DeCLIP)."""
    width: int = 2048
    """Width of the projections (DeCLIP 1024)."""
    hidden: int = 512
    """Width inside the predictor."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset()

    def build(self, spec: ModelSpec) -> SimSiam:
        """Build the objective.

        Raises:
            ValueError: there is no contrastive space to read, or images are a detector's regions.
        """
        if self.input == "embed" and spec.embed_width is None:
            raise ValueError(
                "objectives.simsiam.input embed reads the contrastive space, which no objective trains; add itc, or "
                "use pooled"
            )
        if not spec.reads_pixels:
            raise ValueError(
                "objective simsiam needs two augmentations of an image, but model.vision.kind region reads a "
                "detector's; use another vision encoder, or remove simsiam"
            )
        width = spec.image_tower_width if self.input == "pooled" else spec.embed_width
        assert width is not None
        return SimSiam(self, width)


class BatchNorm(nn.Module):
    """Batch norm by the statistics of the rows at hand always: nobody but a loss reads what it gives."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """[B, W] -> [B, W]; one row alone becomes the bias."""
        return F.layer_norm(states.T, states.shape[:1], eps=1e-5).T * self.weight + self.bias


class SimSiam(Objective):
    """Negative cosine of predictions and projections: -1 if they agree, 0 if they have nothing in common.

    Linear layers before a batch norm have no bias, which the norm would take away.
    """

    one_modality = True

    def __init__(self, config: SimSiamConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.inputs: tuple[Pass, Pass] = (
            (Encode("image"), Encode("image", AGAIN))
            if config.input == "pooled"
            else (Embed("image", unit=False), Embed("image", AGAIN, unit=False))
        )
        self.needs = frozenset(self.inputs)
        out, hidden = config.width, config.hidden
        self.projector = nn.Sequential(
            *(nn.Linear(width, out, bias=False), BatchNorm(out), nn.ReLU()),
            *(nn.Linear(out, out, bias=False), BatchNorm(out), nn.ReLU()),
            *(nn.Linear(out, out, bias=False), BatchNorm(out)),
        )
        self.predictor = nn.Sequential(
            nn.Linear(out, hidden, bias=False), BatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, out)
        )

    def count(self, batch: Batch) -> float:
        return float(batch.num_images)

    def chance(self, candidates: int) -> float:
        return 0.0

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Mean over both directions and this rank's images.

        The metric `spread` is near 1 while projections of different images differ, and 0 once all are the same.
        """
        vectors = [found if isinstance(found := results[one], Tensor) else found.pooled for one in self.inputs]
        first, second = (self.projector(one) for one in vectors)
        loss = (agreement(self.predictor(first), second) + agreement(self.predictor(second), first)) / -2
        spread = F.normalize(first.detach().float(), dim=1).std(0, correction=0).mean() * first.shape[1] ** 0.5
        return LossOutput(loss, {"spread": spread})


def agreement(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean cosine of ``predicted`` and ``target`` [B, W], of which the second gets no gradient."""
    return F.cosine_similarity(predicted.float(), target.detach().float()).mean()
