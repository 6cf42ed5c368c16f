"""Contrastive spaces: where pooled vectors of image and text can be compared.

Shapes: B images, T texts, D width, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import initialise
from encoders.types import Modality
from objectives.base import Embed, Results
from objectives.itc import similarities
from vlp.config import Config

Projection = Literal["linear", "none"]


class EmbedConfig(Config):
    """The contrastive embedding; it exists if an objective trains it."""

    width: int = 256
    """E, width of the common space."""
    bias: bool | Literal["image", "text"] = True
    """Which projections have a bias: both (ALBEF), none (CLIP), or one."""
    image: Projection = "linear"
    """How pooled image vectors come into the space; `none` = they are in it (SigLIP, ALIGN)."""
    text: Projection = "linear"
    """How pooled text vectors come into the space."""
    reads: Literal["pooled", "first"] = "pooled"
    """What of a tower is projected: its pooled vector, or its first state (FLAVA beside its poolers)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on pooled vectors before they are projected: what regularises a space over frozen towers."""
    temperature: float = Field(0.07, gt=0)
    """Temperature at the start; learned as a log scale."""
    logit_bias: float | None = None
    """Learned bias of the logits at the start (SigLIP: -10); none = there is none."""
    branches: tuple[str, ...] = ()
    """Further spaces of the same settings, by branch (VLMo: its vision-language feed-forward)."""


class EmbedSpace(nn.Module):
    """Two projections, a temperature and maybe a bias.

    Raises:
        ValueError: a side without projection has another width than the space.
    """

    def __init__(self, config: EmbedConfig, image_width: int, text_width: int) -> None:
        super().__init__()
        self.width, self.reads = config.width, config.reads
        self.image = self._projection("image", config.image, image_width, config)
        self.text = self._projection("text", config.text, text_width, config)
        self.drop = nn.Dropout(config.dropout)
        self.logit_scale = nn.Parameter(torch.full((1,), -math.log(config.temperature)))
        self.logit_bias = None if config.logit_bias is None else nn.Parameter(torch.full((1,), config.logit_bias))

    @staticmethod
    def _projection(side: str, kind: Projection, width: int, config: EmbedConfig) -> nn.Module:
        if kind == "linear":
            linear = nn.Linear(width, config.width, bias=config.bias in (True, side))
            initialise(linear)
            return linear
        if width != config.width:
            raise ValueError(
                f"model.embed.{side} none needs a {side} encoder of width {config.width} (model.embed.width), "
                f"not {width}; use linear"
            )
        return nn.Identity()

    def project(self, modality: Modality, pooled: Tensor) -> Tensor:
        """Pooled vectors [B or T, D] -> vectors [B or T, E], not yet of unit norm."""
        projection = self.image if modality == "image" else self.text
        return pooled if isinstance(projection, nn.Identity) else projection(self.drop(pooled))

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Unit-norm vectors [B, E] and [T, E] -> logits of all pairs [B, T], as the losses have them."""
        found = similarities(image, text, self.logit_scale)
        return found if self.logit_bias is None else found + self.logit_bias

    def forward(self, modality: Modality, pooled: Tensor) -> Tensor:
        """Pooled vectors [B or T, D] -> unit-norm vectors [B or T, E]."""
        vectors = self.project(modality, pooled)
        # Half precision would keep the norm, and with it every similarity, to three digits only.
        return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


@dataclass(frozen=True)
class EmbedGradients:
    """What a loss over a whole step gives a micro-batch's embeds (``vlp.train.accumulate``)."""

    embeds: Mapping[Embed, Tensor]
    """Gradient of each embed, [B or T, E]."""
    spaces: Mapping[str, Tensor]
    """Gradient of each space's log scale (and bias, where it has one), [1 or 2], by branch."""

    def surrogate(self, results: Results) -> Tensor:
        """Return a scalar whose gradients are these; its value means nothing."""
        parts = [(results[one] * gradient).sum() for one, gradient in self.embeds.items()]
        parts += [(calibration(results, branch) * gradient).sum() for branch, gradient in self.spaces.items()]
        return torch.stack(parts).sum()


def calibration(results: Results, branch: str) -> Tensor:
    """Return the log scale of a space and its bias, where it has one, [1 or 2]."""
    parts = [found[branch] for found in (results.scales, results.biases) if branch in found]
    return torch.cat(parts)
