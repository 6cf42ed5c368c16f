"""`vlp evaluate` and `vlp predict`: a checkpoint on a task's data, its numbers beside the blind floors, and what it
said of every sample.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.markup import escape
from rich.table import Table

from downstream import AnyTask
from downstream.task import Result, TaskConfig
from objectives.collectives import rank
from vlp.checkpoint.load import FinetunedConfig, LoadedConfig
from vlp.checkpoint.native import weights_of
from vlp.config import Config, Layer, leaves, slot_of
from vlp.data.loader import DataConfig
from vlp.data.reader import Reader
from vlp.loaded import Loaded
from vlp.model import Model
from vlp.run import Parts, RunConfig, open_training_data, open_validation_data

logger = logging.getLogger(__name__)

RESULT = "result.json"
PREDICTIONS = "predictions.jsonl"
SPEED = ("batch", "pairs")
"""Settings of tasks that change the speed alone."""
LIBRARIES = ("vlp", "torch", "torchvision", "timm", "transformers", "tokenizers", "open_clip_torch", "pillow", "numpy")


class EvaluateConfig(Config):
    """A checkpoint, a task and its data."""

    task: AnyTask
    """What is asked of the model."""
    checkpoint: str = ""
    """Whose model: as for vlp.load."""
    data: DataConfig = Field(default_factory=DataConfig)
    """`data.val` is scored; `data.train`, if named, gives the blind floors."""


def inherited(config: LoadedConfig, training: bool = False) -> Layer:
    """Return what an evaluation or finetuning takes from its checkpoint, to lie below recipe and flags: how images and
    texts are prepared. The image size is left to the model, so that it may be changed there; augmentation is left to
    the recipe (colours that are jittered in pretraining may be what a task asks for), and so is, in ``training``, what
    gives images of several sizes. An evaluation also takes the task's settings of a finetuning, so that it repeats its
    score; where another task is asked for, its kind replaces them.
    """
    data = config.data
    exactly = set() if training else {"antialias", "resampler", "crop", "crop_share", "multiple", "max_patches"}
    transform = data.transform.model_dump(include={"resize", "interpolation", "fill", *exactly})
    tokenizer = data.tokenizer.model_dump()
    read = {"tokenizer": tokenizer, "max_length": data.max_length, "whole_region": data.whole_region}
    prefix = {} if training else {"prefix": data.prefix}  # which a task that is trained states itself
    task = {} if training else inherited_task(config)
    return Layer({"data": read | prefix | {"transform": transform}} | ({"task": task} if task else {}), "checkpoint")


def inherited_task(config: LoadedConfig) -> dict[str, Any]:
    """Return the task settings of the finetuning that made a checkpoint, without those that are its data's."""
    task = config.task if isinstance(config, FinetunedConfig) else {}
    cls = slot_of(AnyTask).classes.get(task.get("kind", ""))
    return {name: value for name, value in task.items() if name not in getattr(cls, "of_data", ())}


def settings_note(task: AnyTask, config: LoadedConfig) -> tuple[str, ...]:
    """Say how a task's settings differ from those of the finetuning that made the checkpoint, where that was of it.

    Settings that change the speed alone are not looked at.
    """
    if not isinstance(config, FinetunedConfig) or config.task.get("kind") != task.kind:
        return ()
    here, there = leaves(task.model_dump(mode="json")), leaves(config.task)
    names = [name for name in {**here, **there} if name not in SPEED and name.partition(".")[0] in config.task]
    others = [f"{n} {_word(here.get(n))} (there {_word(there.get(n))})" for n in names if here.get(n) != there.get(n)]
    but = f", but for {', '.join(others)}" if others else ""
    return (f"the task's settings are those of the finetuning that made the checkpoint{but}",)


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def parts_of(loaded: Loaded, data: DataConfig) -> Parts:
    """Return a loaded model as what tasks take, with these data settings."""
    run = RunConfig(model=loaded.model.config, objectives=dict(loaded.config.objectives), data=data)
    return Parts(run, loaded.model, loaded.tokenizer, None)


def open_data(data: DataConfig, which: str) -> Reader:
    """Open ``data.train`` or ``data.val``, which may be a part of the first.

    Raises:
        ValueError: it is not named, or cannot be opened.
    """
    if which == "val":
        return open_validation_data(data)
    if not data.train:
        raise ValueError("data.train is not set; name the data with --data.train (shards, a table or a folder)")
    return open_training_data(data)


def evaluate(run: EvaluateConfig, loaded: Loaded, folder: Path, *, command: str = "") -> Result:
    """Score a loaded model on ``data.val``; write ``result.json`` and ``predictions.jsonl`` into ``folder``.

    Args:
        run: task and data.
        loaded: the checkpoint, where it shall run.
        folder: to write to.
        command: for the result.

    Raises:
        ValueError: the data are not the task's, or the model lacks a part that the task needs.
    """
    task: TaskConfig = run.task
    data = task.settings(run.data)
    reader = open_data(data, "val")
    survey = task.survey(open_data(data, "train"), data) if data.train else None
    parts = parts_of(loaded, data)
    result = task.evaluate(parts, reader, survey)
    result = replace(result, notes=(*result.notes, *settings_note(run.task, loaded.config)))
    facts = {"checkpoint": {"source": run.checkpoint, "sha256": weights_hash(loaded.model)}, "command": command}
    write_result(folder, run.task, result, data_facts(data, reader) | facts)
    return result


def evaluate_run(folder: Path, loaded: Loaded, data: DataConfig, task: AnyTask, *, command: str = "") -> Result:
    """Score a pretraining run, loaded, on its own ``data.val``; writes into a folder of the run's.

    Raises:
        ValueError: as ``evaluate``.
    """
    config = EvaluateConfig(task=task, checkpoint=str(folder), data=data.model_copy(update={"train": None}))
    return evaluate(config, loaded, folder / task.kind, command=command)


def predict(run: EvaluateConfig, loaded: Loaded, path: Path) -> int:
    """Write a prediction for every sample of ``data.val``, which needs no labels, as JSON lines; return how many.

    Rank 0 writes; the ranks share the work where the task does.

    Raises:
        ValueError: the data cannot be read, or the model lacks a part that the task needs.
    """
    data = run.task.settings(run.data)
    for note in settings_note(run.task, loaded.config):
        logger.info("%s", note)
    rows = run.task.predict(parts_of(loaded, data), open_data(data, "val"))
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    with (path if rank() == 0 else Path(os.devnull)).open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, 1):  # noqa: B007 - the last number is the count
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return number


def check_submission(task: AnyTask) -> None:
    """Refuse a task that has no official format.

    Raises:
        ValueError: it has none.
    """
    if type(task).submission is TaskConfig.submission:
        raise ValueError(
            f"--submission: task {task.kind} has no official format; leave it out, predictions are written"
        )


def write_submission(path: Path, task: AnyTask, predictions: Sequence[Mapping[str, Any]]) -> None:
    """Write predictions in a task's official format: JSON, or the text that the task gives; rank 0 does.

    Raises:
        ValueError: the task has none, or the rows lack what it asks for.
    """
    check_submission(task)
    if rank() != 0:
        return
    made = task.submission(predictions)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made if isinstance(made, str) else json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")
    logger.info("%d predictions in the official format in %s", len(predictions), path)


def data_facts(data: DataConfig, reader: Reader) -> dict[str, Any]:
    """Return what a number must name: which split, and by what hash it is known again."""
    where = data.where if data.val_where is None else data.val_where
    split = _named(data.val) if data.val or not data.split else f"{data.split:g} of {_named(data.train)}, by image"
    split += f" where {', '.join(f'{name}={value}' for name, value in where.items())}" if where else ""
    return {
        "split": split,
        "data": {
            "val": data.val,
            "where": where,
            "fingerprint": reader.fingerprint,
            "train": data.train,
            "split": data.split,
        },
    }


def _named(spec: str | Sequence[str] | None) -> str:
    """The names of files, without their folders."""
    specs = [spec] if isinstance(spec, str) else list(spec or ())
    return ", ".join(one if ":" in one else Path(one).name for one in specs)


def write_result(folder: Path, task: AnyTask, result: Result, facts: Mapping[str, Any]) -> None:
    """Write ``result.json`` and ``predictions.jsonl``; rank 0 does, the others have the same result."""
    if rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "task": task.kind,
        "headline": task.headline,
        "metrics": result.metrics,
        "floors": result.floors,
        "counts": {"samples": len(result.predictions), **result.counts, "bad": len(result.bad)},
        "bad": result.bad,
        "notes": result.notes,
        **facts,
        "settings": task.model_dump(mode="json"),
        "versions": versions(),
    }
    (folder / RESULT).write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with (folder / PREDICTIONS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result.predictions)


def weights_hash(model: Model) -> str:
    """Return the SHA-256 of a model's weights and their names, wherever they came from and in whatever file."""
    state = hashlib.sha256()
    for name, tensor in sorted(weights_of(model).items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed
            found[name] = "not installed"
    return found


def result_table(task: AnyTask, result: Result, before: Result | None = None, title: str = "") -> Table:
    """Return the metrics as a table to print: before (where there is one), now, and each blind floor."""
    columns: list[tuple[str, Mapping[str, float]]] = [("before", before.metrics)] if before is not None else []
    columns += [("after" if before is not None else "model", result.metrics), *result.floors.items()]
    table = Table(title=title or task.kind, caption=escape("\n".join(result.notes)), caption_justify="left")
    table.add_column("metric")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for name in headline_first(task, list(result.metrics)):
        table.add_row(name, *(f"{values[name]:.3f}" if name in values else "" for _, values in columns))
    return table


def headline_first(task: AnyTask, names: Sequence[str]) -> list[str]:
    """Return metric names with the task's headline first."""
    return sorted(names, key=lambda name: name != task.headline)
