"""`vlp finetune`: a pretrained checkpoint, one task, and the metric before and after."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.table import Table

from downstream import AnyTask
from downstream.evaluate import data_facts, inherited, open_data, parts_of, result_table, weights_hash, write_result
from downstream.task import Result, TaskConfig
from downstream.transfer import say_transfer, take_weights
from objectives import ObjectiveConfig
from vlp.checkpoint.load import LoadedConfig
from vlp.checkpoint.native import LoadReport
from vlp.config import Layer, build
from vlp.loaded import Loaded
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
