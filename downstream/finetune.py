"""`vlp finetune`: a pretrained checkpoint, one task, and the metric before and after."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.table import Table
from torch import Tensor

from downstream import AnyTask
from downstream.evaluate import data_facts, inherited, open_data, parts_of, result_table, weights_hash, write_result
from downstream.task import Result, TaskConfig
from encoders.patch import resample_patches
from objectives import AnswerConfig, ObjectiveConfig
from vlp.checkpoint.load import LoadedConfig
from vlp.checkpoint.native import LoadReport, load_weights
from vlp.config import Layer, build
from vlp.loaded import Loaded
from vlp.model import Model
from vlp.pretrain import with_hash
from vlp.run import RunConfig, assemble
from vlp.train.loop import Outcome, train

logger = logging.getLogger(__name__)


class FinetuneConfig(RunConfig):
    """A run that begins at a checkpoint and trains for one task."""

    task: AnyTask
    """What it is trained for."""
    init: str = ""
    """Checkpoint to begin from: as for vlp.load."""
    objectives: dict[str, ObjectiveConfig] = Field(default_factory=dict)
    """Settings of the task's objective, and objectives to train beside it; the task adds what it needs."""


@dataclass(frozen=True)
class Finetuned:
    """What a finetuning gives."""

    before: Result | None
    """Score of the checkpoint as it was; None where it could not do the task."""
    lacked: str | None
    """What it lacked for that."""
    after: Result | None
    """Score of the finetuned model; None if training was interrupted."""
    transfer: LoadReport
    """What became of the checkpoint's weights: `missing` ones are new, `unexpected` ones were left out."""
    outcome: Outcome


def checkpoint_layer(config: LoadedConfig) -> Layer:
    """Return what a finetuning takes from its checkpoint, to lie below recipe and flags: the model, and how its images
    and texts are prepared. Its objectives are the task's to keep or drop.
    """
    return Layer({"model": config.model.model_dump(), **inherited(config).tree}, "checkpoint")


def finetune_config(loaded: Loaded, init: str, *layers: Layer | Mapping[str, Any]) -> FinetuneConfig:
    """Return the config of a finetuning: the checkpoint's model, and ``layers`` (recipe, settings) over it.

    Raises:
        ConfigError: with all problems of the layers.
    """
    return build(FinetuneConfig, checkpoint_layer(loaded.config), *layers, {"init": init})


def finetune(
    run: FinetuneConfig, loaded: Loaded, folder: Path, device: torch.device, *, command: str = ""
) -> Finetuned:
    """Score the checkpoint where it can do the task already, train it, score it again.

    Writes into ``folder`` the run (log and checkpoints for ``vlp.load``), ``result.json`` and ``predictions.jsonl``.

    Args:
        run: as ``finetune_config`` gives it.
        loaded: the checkpoint.
        folder: of the run.
        device: of this rank.
        command: for the model card.

    Raises:
        ValueError: the folder holds a run, the data are not the task's, or the checkpoint's parts do not serve it.
        NonFiniteError: training diverged.
    """
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
        raise ValueError(f"--out {folder}: holds a run already; choose another folder")
    task: TaskConfig = run.task
    run = run.model_copy(update={"data": task.settings(run.data)})
    reader, test = open_data(run.data, "train"), open_data(run.data, "val")
    survey = task.survey(reader, run.data)
    lacked = task.lacks(loaded.model)
    before = None
    if lacked is None:
        loaded.model.to(device)
        before = task.evaluate(parts_of(loaded, run.data), test, survey)
        logger.info("before: %s %.3f", task.headline, before.metrics[task.headline])
    else:
        logger.info("before: n/a, the checkpoint lacks %s", lacked)
    run = task.adapt(run, loaded.config.objectives, survey)
    parts = with_hash(assemble(run, tokenizer=loaded.tokenizer, pretrained=False))
    transfer = take_weights(parts.model, loaded.model)
    say_transfer(transfer)
    outcome = train(parts, folder, device, prepare=task.prepare(parts.run), command=command)
    after = None
    if outcome.finished:
        after = task.evaluate(parts, test, survey)
        facts = data_facts(run.data, test) | {
            "before": None if before is None else before.metrics,
            "before_lacked": lacked,
            "checkpoint": {"source": str(outcome.checkpoint), "sha256": weights_hash(parts.model)},
            "init": {"source": run.init, "sha256": weights_hash(loaded.model)},
            "samples": outcome.seen,
            "seed": run.train.seed,
            "train_fingerprint": reader.fingerprint,
            "command": command,
        }
        write_result(folder, run.task, after, facts)
    return Finetuned(before, lacked, after, transfer, outcome)


def finetune_table(run: FinetuneConfig, done: Finetuned) -> Table | None:
    """Return the before/after table to print, with the blind floors; None if training was interrupted."""
    if done.after is None:
        return None
    table = result_table(run.task, done.after, done.before, f"{run.task.kind} after {done.outcome.seen:,} samples")
    if done.lacked is not None:
        table.caption = f"before: n/a, the checkpoint lacks {done.lacked}\n{table.caption}"
    return table


def take_weights(model: Model, source: Model) -> LoadReport:
    """Fill a model from a pretrained one: everything that still exists, in the same shape.

    Position embeddings and patches become those of another image and patch size. A new decoder's blocks begin as the
    fusion's where the shapes agree (Li et al. 2021, ALBEF, section 4), its words as the text encoder's, a new word head
    as that of masked words. A fusion that reads two images by turns begins with every block of one twice (section 5).
    An answer head is only taken over with its answers.
    """
    state, wanted = dict(source.state_dict()), model.state_dict()
    taken = dict(_begun_as(wanted, state)) | dict(_doubled(model, source, state))
    state |= taken | dict(_resampled(state, wanted))
    ignore = [name for name, tensor in state.items() if name in wanted and _differs(name, tensor, wanted[name])]
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


def _resampled(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """The projection of image patches, where the new ones have another side."""
    name = "vision.vit.patch_embed.proj.weight"
    old, new = state.get(name), wanted.get(name)
    if old is not None and new is not None and old.shape[2:] != new.shape[2:]:
        logger.info("patches of %d cells a side are resampled to %d", old.shape[-1], new.shape[-1])
        yield name, resample_patches(old, new.shape[-1])


def _differs(name: str, stored: Tensor, wanted: Tensor) -> bool:
    """Whether a weight cannot be taken over; the image positions are interpolated when it is loaded."""
    return stored.shape != wanted.shape and name != "vision.vit.pos_embed"


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
