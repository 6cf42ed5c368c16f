"""What is tried of each objective: settings, the smallest model that it can live in, its data, and its chance level.

The chance level is the loss of the best guess that looks at nothing: the labels' own frequencies, or the best constant.
Shapes: B images, T texts, P patches or regions, K predicted ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.types import Batch, Images, Regions
from objectives.base import Draw, Encode
from objectives.box import generalised_iou
from objectives.mrm import region_terms
from scripts.trials.data import (
    CHOICES,
    COLOURS,
    GROUPS,
    Maker,
    choices,
    edited_pairs,
    given_pairs,
    pairs,
    placed,
    regions,
    two_images,
)
from vlp.model import Model

Chance: TypeAlias = Callable[[Model, Sequence[Batch]], float]
"""Loss of the best blind guess, from the model and batches of the training data."""

HEADS = {"width": 64, "heads": 4}
PATCHES = {"model": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "depth": 1, **HEADS}
VISION = {**PATCHES, "patch_size": 2, "stem": [32, 64]}
"""As many patches behind two convolutions, by which more crosses to another style."""
GRID = {
    "kind": "grid",
    "model": "resnet10t",
    "image_size": 32,
    "freeze_norm": False,
    "arguments": {"output_stride": 8, "channels": (16, 32, 32, 64), "stem_width": 8},
    "positions": "sine",
    "dictionary": {"entries": 64, "width": 64, "mask_token": True},
}
"""Cells of eight pixels by a dictionary."""
REGIONS = {"kind": "region", "features": 48, "boxes": 4, "width": 64, "number": 16}
TEXT = {"layers": 1, "norm": "pre", "max_length": 16, **HEADS}
HIDING = {"vision": {**PATCHES, "mask_token": True}}
SINGLE = {"kind": "single_stream", "layers": 2}


def entropy(share: Tensor) -> float:
    """Of shares that sum to one."""
    return -(share * share.clamp(min=1e-12).log()).sum().item()


def own(model: Model, seen: Sequence[Batch]) -> float:
    """What the objective itself says."""
    objective = next(iter(model.named_objectives()))[1]
    level = objective.chance(seen[0].num_images)
    assert level is not None
    return level


def words(model: Model, seen: Sequence[Batch]) -> float:
    """The frequencies of the words that are asked for."""
    labels = [text.labels for batch in seen for text in batch.texts.values() if text.labels is not None]
    counts = torch.cat([one[one != -100] for one in labels]).bincount().double()
    return entropy(counts / counts.sum())


def target(name: str, binary: bool = False) -> Chance:
    """The frequencies of a target's classes; ``binary``: each class is a question of its own."""

    def chance(model: Model, seen: Sequence[Batch]) -> float:
        found = torch.cat([batch.targets[name] for batch in seen])
        share = (F.one_hot(found) if found.dim() == 1 else found).double().mean(0)
        return sum(entropy(torch.stack([one, 1 - one])) for one in share) if binary else entropy(share)

    return chance


def value(model: Model, seen: Sequence[Batch]) -> float:
    """The median."""
    found = torch.cat([batch.targets["value"] for batch in seen])
    return (found - found.median()).abs().mean().item()


def box(model: Model, seen: Sequence[Batch]) -> float:
    """The mean box."""
    found = torch.cat([batch.targets["box"] for batch in seen])
    guess = found.mean(0).expand_as(found)
    return ((guess - found).abs().sum(1) + 1 - generalised_iou(guess, found)).mean().item()


def codes(model: Model, seen: Sequence[Batch]) -> float:
    """The frequencies of codes at each place."""
    found = torch.cat([one.targets["codes"] for one in masked_images(seen)])  # [B, P]
    share = F.one_hot(found).double().mean(0)
    return sum(map(entropy, share)) / len(share)


@torch.no_grad()
def entries(model: Model, seen: Sequence[Batch]) -> float:
    """The frequencies of the hidden entries, as the trained dictionary has them."""
    model.eval()
    read = Encode("image", "masked")
    found = torch.cat([model.run([read], batch)[read].labels.amax(1) for batch in seen])  # all that are hidden are one
    model.train()
    return entropy(found.bincount() / len(found))


def pixels(model: Model, seen: Sequence[Batch]) -> float:
    """The median of each normalised pixel."""
    images = torch.cat([one.pixels for one in masked_images(seen)]).float()
    patches = F.unfold(images, 8, stride=8).transpose(1, 2)  # [B, P, 3 * 8 * 8]
    patches = F.layer_norm(patches, patches.shape[-1:], eps=1e-6)
    return (patches - patches.median(0).values).abs().mean().item()


def masked_images(seen: Sequence[Batch]) -> list[Images]:
    """The view with hidden patches."""
    return [one for batch in seen if isinstance(one := batch.images["masked"], Images)]


def of_regions(kind: Any, name: str) -> Chance:
    """The mean features, or the frequencies of classes, at each place; of `nce` equal scores of all."""

    def chance(model: Model, seen: Sequence[Batch]) -> float:
        views = [one for batch in seen if isinstance(one := batch.images["masked"], Regions)]
        found = torch.cat([one.features if name == "features" else one.targets[name] for one in views])  # [B, P, ...]
        if kind == "nce":  # a batch at a time, as its candidates are
            terms = [
                region_terms(kind, torch.zeros_like(x), x, x) for x in (one.features.flatten(0, 1) for one in views)
            ]
            return torch.cat(terms).mean().item()
        share = (F.one_hot(found).float() if kind == "class" else found).mean(0, keepdim=True)
        guess = share if kind == "mse" else share.clamp(min=1e-6).log()
        outputs = guess.expand(len(found), -1, -1).flatten(0, 1)
        return region_terms(kind, outputs, found.flatten(0, 1)).mean().item()

    return chance


@torch.no_grad()
def alike(model: Model, seen: Sequence[Batch]) -> float:
    """All similarities equal."""
    space = model.space()
    assert space is not None
    before = space.logit_scale.clone()
    space.logit_scale.fill_(-math.inf)
    loss = next(iter(model.losses(seen[0], Draw()).values())).loss.item()
    space.logit_scale.copy_(before)
    return loss


def nothing(model: Model, seen: Sequence[Batch]) -> float:
    """True and false pairs alike."""
    return 0.0


@dataclass(frozen=True)
class Trial:
    """One row of the table."""

    objectives: dict[str, Any]
    """By name; the first is measured, the others go with it."""
    fused: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    """Settings beside the smallest model's."""
    make: Maker = pairs
    chance: Chance = own
    longer: int = 1
    """Times the table's steps: who sees one false pair a text, or two images, needs more than itm."""

    def tree(self) -> dict[str, Any]:
        """Return the settings of model and objectives."""
        model = {
            "vision": REGIONS if self.make is regions else VISION,
            "text": TEXT,
            "fusion": SINGLE if self.fused else {"kind": "none"},
            "embed": {"width": 64},
            "momentum": 0.9,
            **self.model,
        }
        return {"model": model, "objectives": self.objectives}


def region_target(outputs: int, kind: str) -> dict[str, Any]:
    """Settings of one target of mrm."""
    return {"outputs": outputs, "losses": [kind]}


def of_mrm(name: str, outputs: int, kind: str) -> Trial:
    """One kind of masked region modelling."""
    settings = {"targets": {name: region_target(outputs, kind)}, "mask_probability": 0.3}
    return Trial({"mrm": settings}, make=regions, chance=of_regions(kind, name))


DECODER: dict[str, Any] = {"decoder": {"kind": "causal", "layers": 1}}
RANDOM = {"scheme": "replace_image", "exclude": "diagonal"}

TRIALS: dict[str, Trial] = {
    "itc": Trial({"itc": {}}, fused=False),
    "itc, queue and momentum distillation": Trial({"itc": {"queue": 192, "distill": 0.4}}, fused=False),
    "sigmoid": Trial({"sigmoid": {}}, fused=False, model={"embed": {"width": 64, "logit_bias": -4.0}}),
    "token_itc": Trial({"token_itc": {}}, fused=False),
    "intra": Trial({"intra": {"local": False}}, fused=False, model={"teacher_view": "again"}),
    "intra, with parts": Trial(
        {"intra": {"patch_pool": 2}}, fused=False, model={"teacher_view": "again"}, chance=alike
    ),
    "multiview_itc": Trial({"multiview_itc": {}}, fused=False, make=edited_pairs),
    "nearest_itc": Trial({"nearest_itc": {"queue": 192}}, fused=False, make=edited_pairs),
    "simsiam": Trial({"simsiam": {"width": 64, "hidden": 32}}, fused=False),
    "fused_itc": Trial({"fused_itc": {}}),
    "itm, random negatives": Trial({"itm": {}}),
    "itm, hard negatives": Trial({"itm": {"random_until": 6000, "hard_from": 12000}, "itc": {}}),
    "itm, pairs given": Trial({"itm": {"scheme": "given"}}, make=given_pairs, longer=3),
    "rank": Trial({"rank": {"negatives": 3}}),
    "rank, margin": Trial({"rank": {"negatives": 3, "loss": "margin"}}),
    "choose": Trial({"choose": {"choices": CHOICES}}, make=choices),
    "assign": Trial({"assign": {}}, model={"fusion": {**SINGLE, "images": "pair"}}, longer=3),
    "wra": Trial({"wra": {"weight": 1.0}, "itm": RANDOM}, chance=nothing),
    "mlm": Trial({"mlm": {"mask_probability": 0.3}}, chance=words),
    "mlm, momentum distillation": Trial({"mlm": {"mask_probability": 0.3, "distill": 0.4}}),
    "seq2seq_mlm": Trial({"seq2seq_mlm": {}}, chance=words),
    "lm": Trial({"lm": {}}, fused=False, model=DECODER, chance=words),
    "lm, without a decoder": Trial({"lm": {"memory": "beside"}}, chance=words),
    "prefix_lm": Trial({"prefix_lm": {}}, model={"decoder": {**DECODER["decoder"], "memory": "both"}}, chance=words),
    "denoise": Trial(
        {"denoise": {}},
        model={"decoder": {"kind": "causal", "layers": 2, "share": "all", "memory": "both"}},
        chance=words,
    ),
    "denoise, the fragment": Trial(
        {"denoise": {"masks": "each", "write": "fragment"}},
        model={"decoder": {**DECODER["decoder"], "memory": "both"}},
        chance=words,
    ),
    "span_corruption": Trial(
        {"span_corruption": {"mask_probability": 0.3, "span_length": None}},
        model={"decoder": {**DECODER["decoder"], "memory": "both"}},
        chance=words,
    ),
    "infill": Trial({"infill": {}}, model={"decoder": {**DECODER["decoder"], "memory": "both"}}, chance=words),
    "mim, codes": Trial(
        {"mim": {"codes": COLOURS, "mask_share": 0.4, "block": 2, "text": "clean"}}, model=HIDING, chance=codes
    ),
    "mim, pixels": Trial(
        {"mim": {"target": "pixels", "mask_share": 0.4, "block": 2, "text": "clean"}}, model=HIDING, chance=pixels
    ),
    "mim, entries": Trial({"mim": {"target": "entries", "text": "clean"}}, model={"vision": GRID}, chance=entries),
    "mrm, features": of_mrm("features", 48, "mse"),
    "mrm, class": of_mrm("objects", COLOURS, "class"),
    "mrm, distribution": of_mrm("classes", COLOURS, "kl"),
    "mrm, which features": of_mrm("features", 48, "nce"),
    "answer": Trial({"answer": {"answers": GROUPS}}, chance=target("answer_scores", binary=True)),
    "answer, one of all": Trial({"answer": {"answers": GROUPS, "loss": "ce"}}, chance=target("answer_scores")),
    "classify": Trial({"classify": {"classes": GROUPS}}, fused=False, chance=target("class")),
    "pair_attention": Trial(
        {"pair_attention": {"heads": 4}},
        model={"fusion": {**SINGLE, "images": "each"}},
        make=two_images,
        chance=target("answer_scores"),
        longer=3,
    ),
    "regress": Trial({"regress": {}}, chance=value),
    "box": Trial({"box": {}}, make=placed, chance=box),
}
"""By the row's name: the objective's kind, and what is special where it is tried in several ways."""
