"""`vlp finetune`: a pretrained checkpoint, one task, and the metric before and after."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from downstream.choose import choose_training
from downstream.evaluate import data_facts, open_data, parts_of, result_table, weights_hash, write_result
from downstream.finetune_config import FinetuneConfig, TuneConfig, checkpoint_layer, finetune_config
from downstream.forgetting import probe
from downstream.own_data import look_at, settle_data, write_split
from downstream.selection import Selection, some
from downstream.task import Result
from downstream.transfer import say_transfer, take_weights
from objectives.collectives import rank, world_size
from vlp.checkpoint.folder import mark_best
from vlp.checkpoint.load import load
from vlp.checkpoint.migrate import migrate
from vlp.checkpoint.native import CONFIG, LoadReport, load_weights, read_config, read_weights
from vlp.config import Layer, build
from vlp.data.reader import Reader
from vlp.data.tokenizer import load_tokenizer
from vlp.flags import from_command_line
from vlp.loaded import Loaded
from vlp.pretrain import refuse_changes, restore_weights, say_changes, with_hash
from vlp.recipes import lift
from vlp.run import Parts, assemble
from vlp.train.loop import Outcome, train
from vlp.train.state import read_state
from vlp.train.step import Rewrite

__all__ = [
    "FinetuneConfig",
    "Finetuned",
    "TuneConfig",
    "checkpoint_layer",
    "finetune",
    "finetune_config",
    "finetune_table",
    "resume",
    "resumed_config",
]

logger = logging.getLogger(__name__)

BEFORE = "before.json"


@dataclass(frozen=True)
class Before:
    """What the checkpoint could do, as a resumed run finds it again."""

    metrics: dict[str, float] | None
    """Of the task; None where it could not do it."""
    lacked: str | None
    """What it lacked for that."""
    probe: dict[str, float] | str | None
    """Zero-shot retrieval, or why it cannot be scored; None: not asked for."""


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
    """What became of the checkpoint's weights: `missing` ones are new, `unexpected` ones were left out. Empty for a
    resumed run."""
    outcome: Outcome
    forgetting: tuple[dict[str, float] | str, dict[str, float] | str] | None = None
    """Zero-shot retrieval before and after, or why it cannot be scored; None: not asked for, or interrupted."""


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
        ValueError: the folder holds a run, the data are not the task's, too many samples are broken, or the
            checkpoint's parts do not serve the task.
        NonFiniteError: training diverged.
    """
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
        raise ValueError(f"--out {folder}: holds a run already; choose another folder, or go on with --resume {folder}")
    periodic = bool(run.auto) or (run.data.val is None and run.data.split is None)
    run = settle_data(run)
    write_split(run.data, folder)
    scored = _Scored.of(run)
    adapted = run.task.adapt(run, loaded.config.objectives, scored.survey)
    look_at(adapted, open_data(run.data, "train"), open_data(run.data, "val"))
    before, score = _before(run, loaded, scored, device)
    parts = with_hash(assemble(adapted, tokenizer=loaded.tokenizer, pretrained=False))
    transfer = take_weights(parts.model, loaded.model.to("cpu"))
    say_transfer(transfer)
    rewrite = run.task.rewrite(parts, scored.survey)
    parts = _settled(parts, device, periodic, rewrite)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BEFORE).write_text(json.dumps(asdict(before), indent=1) + "\n", encoding="utf-8")
    prepare = run.task.prepare(parts.run)
    more: dict[str, Any] = {"evaluation": _selection(parts, scored), "rewrite": rewrite, "command": command}
    outcome = train(parts, folder, device, prepare=prepare, **more)
    done = Finetuned(score, before.lacked, None, transfer, outcome)
    return _finish(done, parts, before, loaded, folder, scored, command)


def resume(
    folder: Path, flags: Sequence[str], device: torch.device, *, command: str = "", found: Path | None = None
) -> Finetuned:
    """Go on with a stopped finetuning from its newest whole checkpoint, exactly as if there had been no interruption.

    Args:
        folder: of the run.
        flags: changed settings, which extend or change the run.
        device: of this rank.
        command: for the model card.
        found: its newest whole checkpoint, by a caller who has looked already.

    Raises:
        ValueError: there is no whole checkpoint, it does not fit the changed settings, or the data changed.
        NonFiniteError: training diverged.
    """
    checkpoint, state = read_state(found or folder)
    run, seen = resumed_config(checkpoint, flags), int(state["seen"])
    source = str(checkpoint / CONFIG)
    old = build(FinetuneConfig, Layer(lift(read_config(checkpoint), source, migrate), source))
    scored = _Scored.of(run)
    parts = assemble(run, tokenizer=load_tokenizer(checkpoint), pretrained=False)
    select = _selection(parts, scored)
    over = run.train.samples - seen < world_size()
    if select is not None and "evaluation" in state:
        select.load_state_dict(state["evaluation"])
        over = over or select.exhausted
    if over:
        refuse_changes(folder, old, run)
    say_changes(old, run)
    restore_weights(parts.model, checkpoint, folder)
    parts = with_hash(replace(parts, model=parts.model.to(device)))
    before = Before(**json.loads((folder / BEFORE).read_text(encoding="utf-8")))
    loaded = None if before.probe is None else _reopened(run)
    if over:
        logger.info("%s has ended after %s samples; extend it with --train.samples", folder, f"{seen:,}")
        best = state.get("best")
        outcome = Outcome(checkpoint, seen, True, None if best is None else folder / "checkpoints" / best)
    else:
        logger.info("going on with %s at %s of %s samples", folder, f"{seen:,}", f"{run.train.samples:,}")
        more: dict[str, Any] = {"seen": seen, "restored": state, "evaluation": select, "command": command}
        more["rewrite"] = run.task.rewrite(parts, scored.survey)
        outcome = train(parts, folder, device, prepare=run.task.prepare(parts.run), **more)
    score = None if before.metrics is None else Result(before.metrics, {}, [])
    done = Finetuned(score, before.lacked, None, LoadReport(), outcome)
    return _finish(done, parts, before, loaded, folder, scored, command)


def resumed_config(checkpoint: Path, flags: Sequence[str]) -> FinetuneConfig:
    """Return the config of a finetuning's checkpoint with changed settings laid over it.

    Raises:
        ConfigError: with all problems of both.
        ValueError: it is no finetuning.
    """
    if "task" not in read_config(checkpoint):
        raise ValueError(f"--resume {checkpoint}: is no finetuning; go on with it by vlp pretrain --resume")
    prog = "vlp finetune --resume RUN"
    return from_command_line(FinetuneConfig, flags, checkpoint / CONFIG, prog=prog, migrate=migrate)


@dataclass(frozen=True)
class _Scored:
    """What a model is scored with."""

    test: Reader
    """Before and after."""
    val: Reader
    """During training."""
    survey: Any
    """Of the training data."""
    train: Reader

    @classmethod
    def of(cls, run: FinetuneConfig) -> _Scored:
        """Open a run's data."""
        train, val, test = open_data(run.data, "train"), open_data(run.data, "val"), None
        if run.test is not None:
            test = open_data(_test_data(run), "val")
        return cls(test or val, val, run.task.survey(train, run.data), train)


def _test_data(run: FinetuneConfig) -> Any:
    """The data settings under which the scored data are `val`."""
    where = run.data.where if run.test_where is None else run.test_where
    return run.data if run.test is None else run.data.model_copy(update={"val": run.test, "val_where": where})


def _before(run: FinetuneConfig, loaded: Loaded, scored: _Scored, device: torch.device) -> tuple[Before, Result | None]:
    """What the checkpoint can do as it is."""
    task, score = run.task, None
    loaded.model.to(device)
    if (lacked := task.lacks(loaded.model)) is None:
        score = task.evaluate(parts_of(loaded, run.data), scored.test, scored.survey)
        logger.info("before: %s %.3f", task.headline, score.metrics[task.headline])
    else:
        logger.info("before: n/a, the checkpoint lacks %s", lacked)
    found = None if run.tune.probe is None else probe(loaded, run.tune.probe)
    return Before(None if score is None else score.metrics, lacked, found), score


def _settled(parts: Parts, device: torch.device, periodic: bool, rewrite: Rewrite | None) -> Parts:
    """The parts on their device, with everything chosen that was left to us."""
    run = parts.run
    assert isinstance(run, FinetuneConfig) and parts.reader is not None
    parts.model.to(device)
    config = choose_training(parts, run.auto, run.task.prepare(run), rewrite)
    tune = run.tune
    if tune.every is None and periodic:
        every = min(max(len(parts.reader), config.samples // 20), config.samples)
        logger.info("evaluated every %s samples, the best checkpoint is kept (tune.every)", f"{every:,}")
        tune = tune.model_copy(update={"every": every})
    return replace(parts, run=run.model_copy(update={"train": config, "auto": (), "tune": tune}))


def _selection(parts: Parts, scored: _Scored) -> Selection | None:
    """What looks at the model during training, if anything does."""
    run = parts.run
    assert isinstance(run, FinetuneConfig)
    if run.tune.every is None:
        return None
    held = some(scored.val, run.tune.samples)
    survey = run.task.for_scores(scored.survey)
    return Selection(run.task.often(), replace(parts, reader=None), held, run.tune.every, run.tune.patience, survey)


def _reopened(run: FinetuneConfig) -> Loaded | None:
    """The checkpoint that a run began at, if it is still there."""
    try:
        return load(run.init, **run.init_options)
    except ValueError as error:
        logger.warning("forgetting is not scored after training: %s", error)
        return None


def _finish(
    done: Finetuned,
    parts: Parts,
    before: Before,
    loaded: Loaded | None,
    folder: Path,
    scored: _Scored,
    command: str,
) -> Finetuned:
    """Score what training ended with, or its best checkpoint, and write the result."""
    run, outcome = parts.run, done.outcome
    assert isinstance(run, FinetuneConfig)
    if not outcome.finished:
        return done
    if (best := outcome.best) is not None:
        outcome = replace(outcome, checkpoint=best)
        if rank() == 0:
            mark_best(folder, best)
        logger.info("the best checkpoint is %s", best)
    if best is not None or run.train.optim.ema is not None:  # what vlp.load takes: the moving average, if there is one
        load_weights(parts.model, read_weights(outcome.checkpoint, average=None))
    after = run.task.evaluate(parts, scored.test, scored.survey)
    if run.tune.every is not None and run.test is None:
        note = "the checkpoint is the best of several on these data, so its score flatters; name others with --test"
        after = replace(after, notes=(*after.notes, note))
    forgetting = None
    if before.probe is not None and loaded is not None:
        assert run.tune.probe is not None
        loaded.model.to(parts.model.device)
        forgetting = before.probe, probe(loaded, run.tune.probe, parts.model)
    facts = data_facts(_test_data(run), scored.test) | {
        "before": before.metrics,
        "before_lacked": before.lacked,
        "zero_shot_retrieval": None if forgetting is None else dict(zip(("before", "after"), forgetting, strict=True)),
        "checkpoint": {"source": str(outcome.checkpoint), "sha256": weights_hash(parts.model)},
        "init": {"source": run.init} | ({} if loaded is None else {"sha256": weights_hash(loaded.model)}),
        "samples": outcome.seen,
        "seed": run.train.seed,
        "train_fingerprint": scored.train.fingerprint,
        "command": command,
    }
    write_result(folder, run.task, after, facts)
    return replace(done, after=after, outcome=outcome, forgetting=forgetting)


def finetune_table(run: FinetuneConfig, done: Finetuned) -> Table | None:
    """Return the before/after table to print, with the blind floors; None if training was interrupted."""
    if done.after is None:
        return None
    table = result_table(run.task, done.after, done.before, f"{run.task.kind} after {done.outcome.seen:,} samples")
    lines = [] if done.lacked is None else [f"before: n/a, the checkpoint lacks {done.lacked}"]
    lines += [str(table.caption)] if table.caption else []
    if done.forgetting is not None:
        lines.append(_add_forgetting(table, run, done.before is not None, *done.forgetting))
    table.caption = "\n".join(lines)
    return table


def _add_forgetting(
    table: Table, run: FinetuneConfig, two: bool, before: dict[str, float] | str, after: dict[str, float] | str
) -> str:
    """Add zero-shot retrieval before and after to the table, in one column or ``two``; return what it is."""
    if isinstance(before, str) or isinstance(after, str):
        return f"zero-shot retrieval: n/a, {before if isinstance(before, str) else after}"
    table.add_section()
    for name in (name for name in before if name in after):
        shown = [f"{before[name]:.3f}", f"{after[name]:.3f}"]
        table.add_row(f"zero-shot {name}", *(shown if two else [" -> ".join(shown)]))
    spec = run.tune.probe if isinstance(run.tune.probe, str) else ", ".join(run.tune.probe or ())
    return f"zero-shot: retrieval on {spec} by the checkpoint, and with the finetuned weights in it"
