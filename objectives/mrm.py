"""Masked region modelling (MRM): what did the detector say of the regions whose features are hidden?

Feature regression, and classification against the detector's best class or its whole distribution (Chen et al. 2020,
UNITER, section 3.2; Lu et al. 2019, ViLBERT, section 3.1; Tan and Bansal 2019, LXMERT, section 3.1).
Shapes: B images, R regions, K predicted regions, O outputs of a target, D width, F feature width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import ACTIVATIONS, Activation, initialise
from encoders.precision import full_precision
from encoders.types import Batch, Regions
from objectives.base import Draw, Fuse, LossOutput, ModelSpec, Objective, RegionMask, Results, Side
from objectives.pairs import matched
from objectives.settings import ObjectiveSettings
from vlp.config import Config

RegionLoss: TypeAlias = Literal["mse", "smooth_l1", "kl", "best_class", "class", "nce"]


class RegionTargetConfig(Config):
    """One thing to predict of each region: an entry of ``Regions.targets``."""

    outputs: int
    """O: width of the features, or number of classes."""
    losses: tuple[RegionLoss, ...] = ("kl",)
    """`mse`, `smooth_l1`: regression [B, R, O]. `kl`: to the detector's distribution [B, R, O]. `best_class`: its best
    class, of which 0 is background and never it. `class`: a given class [B, R]. `nce`: find the true features among
    those of all regions of the batch."""
    weight: float = 1.0
    """Weight beside the other targets."""
    reduce: Literal["mean", "sum"] = "mean"
    """Of `mse`, `smooth_l1` and `kl` over a region's outputs (ViLBERT sums its kl)."""
    tied: bool = False
    """The last layer is the vision encoder's feature projection, transposed (UNITER's regression)."""


class MrmConfig(ObjectiveSettings):
    """Predict hidden regions from the rest of the image and the text."""

    kind: Literal["mrm"] = "mrm"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    targets: dict[str, RegionTargetConfig] = Field(default_factory=dict)
    """What is predicted, by its name in ``Regions.targets``: "features" (without an entry the regions' own), "classes",
    "objects", "attributes"; "NAME_scores" [B, R] there weighs the terms of NAME (LXMERT: the detector's confidence)."""
    mask_probability: float = Field(0.15, gt=0, le=1)
    """Share of the regions that are to be predicted; at least one of an image (XGPT all, from their places alone)."""
    hide: float = Field(1.0, ge=0, le=1)
    """Share of these whose features are hidden (ViLBERT 0.9, LXMERT 0.8)."""
    swap: float = Field(0.0, ge=0, le=1)
    """Share of these that show the features of another image's region (LXMERT 0.1); the others show their own."""
    overlap: float | None = Field(None, gt=0, lt=1)
    """Hide also regions that overlap one of these by more than this intersection over union (ViLBERT 0.4)."""
    overlap_predicted: bool = False
    """Predict these as well (InterBERT, whose masked ones are anchors of groups)."""
    matched: bool = False
    """Of the pairs only the true ones train it, by ``targets["match"]`` (InterBERT)."""
    text: Literal["clean", "masked"] = "clean"
    """Text beside it: the whole one (UNITER masks one side at a time), or that with masked words (ViLBERT, LXMERT)."""
    mean: Literal["predicted", "all"] = "predicted"
    """Over which regions: those predicted, or all, where the scores say which count, and without scores those predicted
    (LXMERT, whose weight of 6.667 is then 1 / 0.15)."""
    norm: bool = True
    """Layer norm in the head (VL-BERT has none)."""
    activation: Activation = "gelu"
    """Activation in the head."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"image"})

    def build(self, spec: ModelSpec) -> Mrm:
        """Build the objective.

        Raises:
            ValueError: there is no target, the fusion gives no image states, or there is nothing to tie a head to.
        """
        if not self.targets:
            raise ValueError(
                "objectives.mrm.targets is empty; name what is to be predicted, as {classes: {outputs: 1601}}"
            )
        if spec.image_width is None:
            raise ValueError(
                f"objective mrm needs fused image states, which model.fusion.kind {spec.fusion} does not give; use "
                "single_stream, sublayers, or dual_stream with attention co"
            )
        if any(one.tied for one in self.targets.values()) and spec.feature_projection is None:
            raise ValueError(
                "objectives.mrm.targets: tied needs model.vision.kind region, to whose projection it is tied; set it "
                "to false"
            )
        if self.overlap_predicted and self.overlap is None:
            raise ValueError(
                "objectives.mrm.overlap_predicted true predicts regions that overlap others, but "
                "objectives.mrm.overlap is not set; set it, as 0.4, or overlap_predicted to false"
            )
        return Mrm(self, spec.image_width, spec)


@dataclass(frozen=True)
class MaskedRegions:
    """A share of the regions is to be predicted; most of these, and what overlaps them, are hidden."""

    probability: float
    hide: float
    swap: float
    overlap: float | None
    overlap_predicted: bool = False

    @property
    def replaces(self) -> bool:
        """Whether features of another image's regions are shown."""
        return self.swap > 0

    def make(self, boxes: np.ndarray, generator: np.random.Generator) -> RegionMask:
        """Hide regions with relative corners [R, 4]."""
        number = len(boxes)
        # A fixed number of draws per region, so that masks depend on nothing else.
        choose, how = generator.random(number), generator.random(number)
        other = generator.integers(0, 2**30, number)
        predict = choose < max(self.probability, np.nextafter(choose.min(), 1))
        masked = predict & (how < self.hide)
        replaced = predict & ~masked & (how < self.hide + self.swap)
        if self.overlap is not None:
            beside = (intersection_over_union(boxes, boxes[predict]) > self.overlap).any(1) & ~predict
            masked |= beside
            if self.overlap_predicted:
                predict = predict | beside
        return RegionMask(masked, predict, np.where(replaced, other, -1))


def intersection_over_union(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Overlap of boxes [R, 4] with others [S, 4], as corners left, top, right, bottom -> [R, S]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [(each[:, 2:] - each[:, :2]).prod(1) for each in (boxes, others)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-12)


class TiedRegression(nn.Module):
    """Width D back to features by the transposed projection [D, F], with its own bias."""

    def __init__(self, projection: nn.Parameter) -> None:
        super().__init__()
        self.weight = projection
        self.bias = nn.Parameter(torch.zeros(projection.shape[1]))

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return F.linear(states, self.weight.t(), self.bias)


class RegionHead(nn.Module):
    """Dense, activation, norm, then one layer a target."""

    def __init__(self, config: MrmConfig, width: int, spec: ModelSpec) -> None:
        super().__init__()
        self.dense, self.activation = nn.Linear(width, width), ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(width, spec.text_eps) if config.norm else nn.Identity()
        self.outputs = nn.ModuleDict()
        for name, target in config.targets.items():
            tied = spec.feature_projection if target.tied else None
            self.outputs[name] = nn.Linear(width, target.outputs) if tied is None else TiedRegression(tied)
        initialise(self)

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        """[..., D] -> outputs [..., O] by target."""
        states = self.norm(self.activation(self.dense(states)))
        return {name: output(states) for name, output in self.outputs.items()}


class Mrm(Objective):
    """Prediction of regions; ``Regions.predict`` says of which (else the masked ones)."""

    def __init__(self, config: MrmConfig, width: int, spec: ModelSpec) -> None:
        super().__init__()
        self.config = config
        self.head = RegionHead(config, width, spec)
        self.fused = Fuse("masked", config.text)
        self.needs = frozenset({self.fused})
        hidden = config.mask_probability, config.hide, config.swap, config.overlap, config.overlap_predicted
        self.view = MaskedRegions(*hidden)

    @property
    def reads(self) -> tuple[str, ...]:
        """Entries of ``Regions.targets`` that it reads where the data have them."""
        scores = [f"{name}_scores" for name in self.config.targets] if self.config.mean == "all" else []
        return (*self.config.targets, *scores)

    def count(self, batch: Batch) -> Tensor:
        regions = _regions(batch)
        predicted = self._counted(regions, batch)
        return predicted.sum() if self.config.mean == "predicted" else torch.full_like(predicted, True).sum()

    def _counted(self, regions: Regions, batch: Batch) -> Tensor:
        """Which regions are predicted, without those of false pairs where they do not count, [B, R] bool."""
        predicted = _predicted(regions)
        return predicted & matched(batch)[:, None] if self.config.matched else predicted

    def chance(self, candidates: int) -> float | None:
        """Of one class target the guess among all classes; a regression has none."""
        if len(self.config.targets) != 1:
            return None
        (target,) = self.config.targets.values()
        return target.weight * math.log(target.outputs) if target.losses in (("best_class",), ("class",)) else None

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Weighted sum over the targets of the mean over regions."""
        regions = _regions(batch)
        fused = results[self.fused].image
        assert fused is not None
        at = regions.predict_at if self.config.mean == "predicted" else None
        found = _pick(self._counted(regions, batch), at)
        if at is not None:
            found = found & (at >= 0)
        outputs = self.head(_pick(fused.states, at))
        count = found.sum().clamp(min=1) if self.config.mean == "predicted" else found.numel()
        parts, metrics = [], {}
        for name, target in self.config.targets.items():
            wanted = _pick(_target(regions, name), at)
            weight = self._weight(regions, name, found, at)
            for kind in target.losses:
                terms = region_terms(kind, outputs[name].float(), wanted, _candidates(regions, name, kind))
                if terms.dim() > 1:
                    terms = terms.mean(1) if target.reduce == "mean" else terms.sum(1)
                loss = torch.where(weight > 0, terms * weight, 0).sum() / count
                parts.append(target.weight * loss)
                metrics[f"{name}_{kind}"] = loss.detach()
        return LossOutput(torch.stack(parts).sum(), metrics)

    def _weight(self, regions: Regions, name: str, found: Tensor, at: Tensor | None) -> Tensor:
        """Weight of each term [K]: whether it is predicted, times the detector's score where there is one."""
        scores = regions.targets.get(f"{name}_scores")
        if scores is None:
            return found.float()
        weight = _pick(scores, at).float()
        return weight * found if self.config.mean == "predicted" else weight

    def predict(self, states: Tensor) -> dict[str, Tensor]:
        """Image states after fusion [..., D] -> outputs [..., O] by target."""
        return self.head(states)


def region_terms(kind: RegionLoss, outputs: Tensor, target: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Loss of each region, before any mean.

    Args:
        kind: which.
        outputs: [K, O].
        target: [K, O] features or probabilities, or [K] int64 classes.
        candidates: [N, O] features among which "nce" finds the true one.

    Returns:
        [K, O] for "mse", "smooth_l1", "kl"; else [K].
    """
    if kind == "mse":
        return F.mse_loss(outputs, target, reduction="none")
    if kind == "smooth_l1":
        return F.smooth_l1_loss(outputs, target, reduction="none")
    if kind == "kl":
        return F.kl_div(outputs.log_softmax(-1), target, reduction="none")
    if kind == "best_class":
        return F.cross_entropy(outputs, target[:, 1:].argmax(-1) + 1, reduction="none")
    if kind == "class":
        return F.cross_entropy(outputs, target, reduction="none")
    assert candidates is not None
    with full_precision(outputs):  # half precision would round scores of some hundreds, but not the true one's
        true = (outputs * target).sum(-1)
        false = (outputs @ candidates.to(outputs.dtype).t()).masked_fill(_equal(target, candidates), -torch.inf)
        return torch.cat([true[:, None], false], 1).logsumexp(1) - true


def _equal(target: Tensor, candidates: Tensor, at_once: int = 64) -> Tensor:
    """Which of the candidates [N, O] are a region's own features [K, O], [K, N] bool: padding, or a region twice.

    They are no false ones. Some values at a time: all of them, for each pair, would not fit into memory.
    """
    same = torch.ones(len(target), len(candidates), dtype=torch.bool, device=target.device)
    for own, theirs in zip(target.split(at_once, 1), candidates.split(at_once, 1), strict=True):
        same &= (own[:, None] == theirs[None]).all(-1)
    return same


def _regions(batch: Batch) -> Regions:
    """The regions with hidden ones."""
    regions = batch.images["masked"]
    if not isinstance(regions, Regions):
        raise ValueError("objective mrm predicts a detector's regions, but the batch has pixels; remove mrm")
    return regions


def _predicted(regions: Regions) -> Tensor:
    """[B, R] bool."""
    found = regions.masked if regions.predict is None else regions.predict
    if found is None:
        raise ValueError("objective mrm: the batch's view 'masked' hides no regions; give Regions.masked or .predict")
    return found


def _target(regions: Regions, name: str) -> Tensor:
    """[B, R] or [B, R, O]."""
    if name == "features" and name not in regions.targets:
        return regions.features
    if name not in regions.targets:
        raise ValueError(
            f"objectives.mrm.targets: the data have no {name!r}, only {sorted(regions.targets)}; remove it"
        )
    return regions.targets[name]


def _candidates(regions: Regions, name: str, kind: RegionLoss) -> Tensor | None:
    return _target(regions, name).flatten(0, 1) if kind == "nce" else None


def _pick(x: Tensor, at: Tensor | None) -> Tensor:
    """[B, R, ...] -> [K, ...]: of the flat positions ``at``, or of all."""
    flat = x.flatten(0, 1)
    return flat if at is None else flat.index_select(0, at.clamp(min=0))
