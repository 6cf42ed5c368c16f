"""Masked image modelling (MIM), with the text where there is a fusion: predict the patches that are hidden.

Their codes in a codebook (Bao et al. 2022, BEiT, section 2; FLAVA's MIM and the image side of its MMM, Singh et al.
2022, section 4), their pixels (Xie et al. 2022, SimMIM, section 3; normalised in the patch, He et al. 2022, MAE), or
which entry of the vision encoder's dictionary is hidden (MVM: Huang et al. 2021, SOHO, section 3.3).
Shapes: B images, M rows, P patches or cells, K predicted patches, D width, C codes, N image tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import Activation, initialise
from encoders.types import Batch, Images
from objectives.base import Draw, Encode, Fuse, Fused, LossOutput, ModelSpec, Objective, Results, Side
from objectives.heads import WordHead, labelled, word_head
from objectives.pairs import image_of_text, matched
from objectives.settings import ObjectiveSettings


class MimConfig(ObjectiveSettings):
    """Predict hidden patches."""

    kind: Literal["mim"] = "mim"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    target: Literal["codes", "pixels", "entries"] = "codes"
    """What is predicted: codes, which the batch brings (``Images.targets["codes"]``) or else `model.codebook` finds;
    pixels; or the entry of model.vision.dictionary that all cells have which are hidden in an image (SOHO)."""
    codes: int = 8192
    """C, codes that there are; entries are as many as the dictionary has."""
    mask_share: float = Field(75 / 196, gt=0, lt=1)
    """Share of the patches that is hidden, in blocks (FLAVA 75 of 196, BEiT-3 0.4)."""
    block: int = Field(16, ge=1)
    """Patches of the smallest block; of a smaller image a twelfth."""
    image_share: float = Field(1.0, gt=0, le=1)
    """Share of the images of which an entry is hidden, that of a cell drawn evenly."""
    head: WordHead = "bert"
    """What gives the codes' scores: BERT's prediction head (FLAVA), or one linear map (BEiT-3)."""
    activation: Activation = "gelu"
    """Activation inside the head."""
    eps: float | None = None
    """Epsilon of the norm inside the head; none = the text encoder's."""
    text: Literal["clean", "masked"] = "masked"
    """Text beside the hidden patches, where there is a fusion."""
    alone: bool = False
    """Read the image without its text also where there is a fusion."""
    unpaired: bool = False
    """Only images without texts train it (FLAVA, whose pairs train MMM instead)."""
    matched: bool = False
    """Of the pairs only the true ones train it, by ``targets["match"]`` (FLAVA)."""

    trains_embed: ClassVar[bool] = False

    @property
    def reads(self) -> frozenset[Side]:
        """Sides of the fusion that it reads."""
        return frozenset() if self.alone or self.unpaired else frozenset({"image"})

    def build(self, spec: ModelSpec) -> Mim:
        """Build the objective.

        Raises:
            ValueError: the vision encoder has no patches, or no entries, or the fusion gives no image states.
        """
        if self.target == "entries" and spec.dictionary is None:
            raise ValueError(
                "objectives.mim.target entries hides those of a dictionary; set model.vision.kind grid with dictionary "
                "{mask_token: true}, or another target"
            )
        if self.target != "entries" and spec.image_grid is None:
            raise ValueError(
                "objective mim hides patches, which only model.vision.kind patch has; use that, or mrm, or of a grid's "
                "dictionary target entries"
            )
        alone = self.alone or self.unpaired
        if not alone and spec.fusion != "none" and spec.image_width is None:
            raise ValueError(
                f"objective mim needs fused image states, which model.fusion.kind {spec.fusion} does not give; use "
                "single_stream, or set objectives.mim.alone true"
            )
        return Mim(self, spec, fused=not alone and spec.fusion != "none")


@dataclass(frozen=True)
class BlockView:
    """Hide blocks of neighbouring patches until a share of them is hidden (Bao et al. 2022, BEiT, algorithm 1)."""

    grid: tuple[int, int]
    share: float
    block: int
    aspect: float = 0.3
    """Of a block at least; at most its inverse."""
    tries: int = 10

    def make(self, generator: np.random.Generator) -> np.ndarray:
        """Return which patches are hidden, [P] bool."""
        rows, columns = self.grid
        hidden = np.zeros(self.grid, dtype=bool)
        wanted = max(1, round(self.share * hidden.size))
        smallest = min(self.block, max(1, hidden.size // 12))
        while (left := wanted - int(hidden.sum())) > 0:
            for _ in range(self.tries):
                area = generator.uniform(smallest, max(left, smallest))
                aspect = math.exp(generator.uniform(math.log(self.aspect), -math.log(self.aspect)))
                height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if not (0 < height <= rows and 0 < width <= columns):
                    continue
                top, first = (int(generator.integers(room + 1)) for room in (rows - height, columns - width))
                block = hidden[top : top + height, first : first + width]
                if 0 < block.size - int(block.sum()) <= left:
                    block[:] = True
                    break
            else:
                break  # what is left is smaller than a block
        return hidden.flatten()


@dataclass(frozen=True)
class EntryView:
    """Name one cell, with whose entry the encoder hides all cells that have it (SOHO, section 3.3)."""

    cells: int
    share: float
    """Of the images; nothing is hidden in the others."""

    def make(self, generator: np.random.Generator) -> np.ndarray:
        """Return the named cell, [P] bool."""
        chosen, cell = generator.random() < self.share, generator.integers(self.cells)
        return (np.arange(self.cells) == cell) & chosen


class Mim(Objective):
    """Prediction of the hidden patches of the image view "masked"."""

    def __init__(self, config: MimConfig, spec: ModelSpec, fused: bool) -> None:
        super().__init__()
        self.config = config
        self.one_modality, self.unpaired = not fused, config.unpaired
        width = spec.image_width if fused else spec.image_tower_width
        assert width is not None
        self.read = Encode("image", "masked")
        self.states: Fuse | Encode = Fuse("masked", config.text) if fused else self.read
        self.needs = frozenset({self.states})
        if config.target == "entries":
            assert spec.dictionary is not None
            self.codes, cells = spec.dictionary
            self.needs |= {self.read}  # the encoder alone knows what it hid
            self.image_views = {"masked": EntryView(cells, config.image_share)}
        else:
            assert spec.image_grid is not None
            self.codes = config.codes
            self.image_views = {"masked": BlockView(spec.image_grid, config.mask_share, config.block)}
        if config.target == "pixels":
            self.head: nn.Module = nn.Linear(width, 3 * spec.patch_size**2)
            initialise(self.head)
        else:
            eps = spec.text_eps if config.eps is None else config.eps
            self.head = word_head(config.head, width, self.codes, None, eps, activation=config.activation)

    def count(self, batch: Batch) -> Tensor:
        predicted = self._predicted(batch)[0]
        return (predicted.any(1) if self.config.target == "entries" else predicted).sum()

    def chance(self, candidates: int) -> float | None:
        return None if self.config.target == "pixels" else math.log(self.codes)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy of codes or absolute error of pixels, mean over the hidden patches; of entries, over images."""
        predicted, index = self._predicted(batch)
        images = _masked(batch)
        found = results[self.states]
        tokens = found.image if isinstance(found, Fused) else found
        assert tokens is not None
        if self.config.target == "entries":
            return self._entry_loss(tokens.states, results[self.read].labels, predicted.any(1), index)
        states = tokens.states[:, -predicted.shape[1] :]
        at = images.masked_at if index is None else None
        if self.config.target == "pixels":
            return self._pixel_loss(states, images, predicted, index)
        codes = self._codes(results, images)
        labels = torch.where(predicted, codes if index is None else codes.index_select(0, index), -100)
        own, targets = labelled(states, labels, at)
        logits = self.head(own).float()
        count = (targets != -100).sum().clamp(min=1)
        total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        return LossOutput(total / count, {"accuracy": (logits.detach().argmax(1) == targets).sum() / count})

    def _predicted(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Which patches of each row count, [M, P], and the image of each row, [M] (None: row m has image m)."""
        hidden = _masked(batch).masked
        if hidden is None:
            raise ValueError("objective mim: the batch's image view 'masked' hides no patches; give Images.masked")
        if not isinstance(self.states, Fuse):
            return hidden, None
        index = None if batch.image_of_text is None else image_of_text(batch, hidden.device)
        rows = hidden if index is None else hidden.index_select(0, index)
        true = matched(batch) if self.config.matched else None
        return rows if true is None else rows & true[:, None], index

    @staticmethod
    def _codes(results: Results, images: Images) -> Tensor:
        """[B, P] int64."""
        if (codes := images.targets.get("codes")) is not None:
            return codes.flatten(1)
        if results.codebook is None:
            raise ValueError(
                "objective mim: the data bring no codes and the model cannot find them; set model.codebook, or "
                "objectives.mim.target pixels"
            )
        assert images.masked is not None
        return results.codebook.codes(images, _grid(images))

    def _entry_loss(self, states: Tensor, labels: Tensor, predicted: Tensor, index: Tensor | None) -> LossOutput:
        """Cross-entropy of what was hidden at the tokens [B, N], mean over the cells of a row, then over rows [M].

        All hidden cells of an image have one label, so that each image counts once, however often it has the entry.
        """
        labels = labels if index is None else labels.index_select(0, index)
        logits = self.head(states[:, -labels.shape[1] :]).float()  # [M, N, K]
        hidden = labels != -100
        terms = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        weight = predicted[:, None] * hidden / hidden.sum(1, keepdim=True).clamp(min=1)  # [M, N]
        count = predicted.sum().clamp(min=1)
        right = (logits.detach().argmax(2) == labels) * weight
        return LossOutput((terms.view_as(weight) * weight).sum() / count, {"accuracy": right.sum() / count})

    def _pixel_loss(self, states: Tensor, images: Images, predicted: Tensor, index: Tensor | None) -> LossOutput:
        side = images.pixels.shape[2] // _grid(images)[0]
        patches = F.unfold(images.pixels.float(), side, stride=side).transpose(1, 2)  # [B, P, 3 p p]
        target = F.layer_norm(patches, patches.shape[-1:], eps=1e-6)
        target = target if index is None else target.index_select(0, index)
        error = (self.head(states).float() - target).abs().mean(2)
        return LossOutput((error * predicted).sum() / predicted.sum().clamp(min=1))


def _masked(batch: Batch) -> Images:
    images = batch.images["masked"]
    if not isinstance(images, Images):
        raise ValueError("objective mim hides patches of pixels, but the batch has a detector's regions; use mrm")
    return images


def _grid(images: Images) -> tuple[int, int]:
    """Rows and columns of the patches."""
    assert images.masked is not None
    height, width = images.pixels.shape[2:]
    side = math.isqrt(height * width // images.masked.shape[1])
    return height // side, width // side
