"""What of a pretrained model's weights another model begins with."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from encoders.vit_weights import resample_patches
from objectives import AnswerConfig
from vlp.checkpoint.native import LoadReport, load_weights
from vlp.model import Model

logger = logging.getLogger(__name__)


def take_weights(model: Model, source: Model) -> LoadReport:
    """Fill a model from a pretrained one: everything that still exists, in the same shape.

    Position embeddings and patches become those of another image and patch size. A new decoder's blocks begin as the
    fusion's where the shapes agree (Li et al. 2021, ALBEF, section 4), its words as the text encoder's, a new word head
    as that of masked words. A fusion that reads two images by turns begins with every block of one twice (section 5);
    one that reads each by a cross-attention, or marks the second, with what it had for the first, twice (BLIP, ViLT).
    An answer head is only taken over with its answers.
    """
    state, wanted = dict(source.state_dict()), model.state_dict()
    taken = dict(_begun_as(wanted, state)) | dict(_doubled(model, source, state)) | dict(_twice(wanted, state))
    state |= taken | dict(_resampled(state, wanted))
    ignore = [name for name, tensor in state.items() if name in wanted and not same_place(name, tensor, wanted[name])]
    for name, one in model.objective_configs.items():
        other = source.objective_configs.get(name)
        if isinstance(one, AnswerConfig) and isinstance(other, AnswerConfig) and one.answers != other.answers:
            ignore.append(f"objectives.{name}.*")
    report = load_weights(model, state, strict=False, ignore=ignore)
    if taken:
        logger.info("%d new weights of %s begin as those of fusion or mlm", len(taken), ", ".join(part_names(taken)))
    return report


BEGINNINGS = (
    ("decoder.embeddings.", "text.embeddings."),
    ("decoder.", "fusion."),
    ("objectives.lm.", "objectives.mlm."),
    ("objectives.assign.alike.", "embed.main.image."),
)
"""Weights of new parts, and of which parts' they begin as."""


def _begun_as(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Weights of new parts that the source has in another of the same shape, by their new names."""
    for name, tensor in wanted.items():
        for new, old in BEGINNINGS:
            found = state.get(old + name.removeprefix(new)) if name.startswith(new) and name not in state else None
            if found is not None and found.shape == tensor.shape:
                yield name, found


def _doubled(model: Model, source: Model, state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Blocks of a fusion that reads two images by turns: each of the source's, twice."""
    turns, one = (getattr(each.config.fusion, "images", None) for each in (model, source))
    if turns != "alternate" or one != "one":
        return
    for name in model.state_dict():
        if found := re.fullmatch(r"((?:teacher\.)?fusion\.blocks\.)(\d+)(\..+)", name):
            old = f"{found[1]}{int(found[2]) // 2}{found[3]}"
            if old in state:
                yield name, state[old]


def _twice(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """What a fusion of two images has for each of them: cross-attentions, and the vectors that mark their tokens."""
    for name, tensor in wanted.items():
        if (found := re.fullmatch(r"(.*fusion\.blocks\.\d+\.cross\.)twins\.\d+\.(.+)", name)) is not None:
            if (old := state.get(found[1] + found[2])) is not None and old.shape == tensor.shape:
                yield name, old
        elif name.endswith("fusion.modality.weight") and name in state and len(state[name]) < len(tensor):
            yield name, torch.cat([state[name], state[name][:1].expand(len(tensor) - len(state[name]), -1)])


def _resampled(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """The projection of image patches, where the new ones have another side."""
    name = "vision.vit.patch_embed.proj.weight"
    old, new = state.get(name), wanted.get(name)
    if old is not None and new is not None and old.shape[2:] != new.shape[2:]:
        logger.info("patches of %d cells a side are resampled to %d", old.shape[-1], new.shape[-1])
        yield name, resample_patches(old, new.shape[-1])


def same_place(name: str, stored: Tensor, wanted: Tensor) -> bool:
    """Return whether a weight can be taken over; the image positions are interpolated when it is loaded."""
    return stored.shape == wanted.shape or name == "vision.vit.pos_embed"


def say_transfer(report: LoadReport) -> None:
    """Log what is new and what was left out, by part."""
    logger.info("%d weights from the checkpoint", len(report.loaded) + len(report.resized) + len(report.converted))
    for what, names in (("new, from random weights", report.missing), ("left out", report.unexpected)):
        if names:
            logger.info("%s: %s", what, ", ".join(part_names(names)))


def part_names(names: Iterable[str]) -> list[str]:
    """Return the parts that weights belong to: objectives by name, else the first level."""
    parts = (name.split(".") for name in names)
    return sorted({".".join(part[:2]) if part[0] == "objectives" else part[0] for part in parts})
