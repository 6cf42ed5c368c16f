"""`vlp pretrain`: a run from its config to its last checkpoint, begun or taken up again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from objectives.collectives import world_size
from vlp.checkpoint.folder import is_checkpoint
from vlp.checkpoint.load import load
from vlp.checkpoint.migrate import migrate
from vlp.checkpoint.native import CONFIG, find_checkpoint, holds_average, load_weights, read_config, read_weights
from vlp.config import Config, Layer, build, leaves
from vlp.data.loader import check_hash
from vlp.data.tokenizer import Tokenizer, load_tokenizer
from vlp.flags import from_command_line
from vlp.model import Model
from vlp.recipes import lift
from vlp.run import Parts, RunConfig, assemble
from vlp.train.loop import Outcome, train
from vlp.train.state import read_state

logger = logging.getLogger(__name__)

HARMLESS = ("data.workers", "data.bad_samples", "train.save_every", "train.keep", "train.log_every")
"""Settings that change no weight: with others changed, a resumed run is not the one that was begun."""


def pretrain(
    run: RunConfig, folder: Path, device: torch.device, *, command: str = "", init: str | Path | None = None
) -> Outcome:
    """Train from the beginning.

    Args:
        run: the config.
        folder: of the run; must not hold one yet.
        device: of this rank.
        command: for the model card.
        init: checkpoint whose weights and tokenizer to start from, ours, or another project's as ``vlp.load`` takes it;
            parts that it lacks keep their initial ones.

    Raises:
        ValueError: the folder holds a run, the config is not complete, or the data are unusable.
        NonFiniteError: training diverged.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; give a folder")
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
        raise ValueError(f"--out {folder}: holds a run already; go on with --resume {folder}, or choose another folder")
    if not run.data.train:
        raise ValueError(
            "data.train is not set; name the training data with --data.train (shards, a table or a folder)"
        )
    if not run.objectives:
        raise ValueError(
            "objectives is empty, so there is nothing to train; choose a recipe, or add one: --objectives.itc {}"
        )
    begin = None if init is None else _beginning(init)
    parts = assemble(run, tokenizer=None if begin is None else begin[1], pretrained=begin is None)
    if begin is not None:
        report = load_weights(parts.model, begin[0], strict=False)
        if not report.loaded and not report.resized:
            raise ValueError(
                f"--init {init}: none of its weights is part of this model; use a recipe of the same parts"
            )
        logger.info("from %s: %s", init, report.summary())
    parts = with_hash(parts)
    return train(parts, folder, device, command=command)


def _beginning(init: str | Path) -> tuple[Mapping[str, Tensor], Tokenizer]:
    """Weights and tokenizer of a checkpoint or run of ours, or of whatever else `vlp.load` takes."""
    if Path(init).is_dir() and (is_checkpoint(Path(init)) or (Path(init) / "checkpoints").is_dir()):
        source = find_checkpoint(init)
        if holds_average(source):
            logger.info("%s: begins at the moving average of the weights", source)
        return read_weights(source, average=None), load_tokenizer(source)
    loaded = load(init)
    return loaded.model.state_dict(), loaded.tokenizer


def resume(
    folder: Path, flags: Sequence[str], device: torch.device, *, command: str = "", found: Path | None = None
) -> Outcome:
    """Go on from the newest whole checkpoint, exactly as if there had been no interruption.

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
    if is_checkpoint(folder):
        raise ValueError(f"--resume {folder}: is one checkpoint; give the run's folder, or begin a new run with --init")
    checkpoint, state = read_state(found or folder)
    run = resumed_config(checkpoint, flags)
    seen: int = state["seen"]
    say_changes(stored_config(checkpoint), run)
    if run.train.samples - seen < world_size():
        refuse_changes(folder, stored_config(checkpoint), run)
        logger.info("%s has seen its %s samples; extend it with --train.samples", folder, f"{run.train.samples:,}")
        return Outcome(checkpoint, seen, finished=True)
    parts = assemble(run, tokenizer=load_tokenizer(checkpoint), pretrained=False)
    restore_weights(parts.model, checkpoint, folder)
    parts = with_hash(parts)
    logger.info("going on with %s at %s of %s samples", folder, f"{seen:,}", f"{run.train.samples:,}")
    return train(parts, folder, device, command=command, seen=seen, restored=state)


def restore_weights(model: Model, checkpoint: Path, folder: Path) -> None:
    """Fill the model of a run that goes on with the weights of its checkpoint.

    Raises:
        ValueError: they do not fit, as the settings were changed.
    """
    try:
        load_weights(model, read_weights(checkpoint))
    except ValueError as error:
        raise ValueError(
            f"--resume {folder}: {error}; begin a new run from its weights with --init {folder}"
        ) from error


def resumed_config(checkpoint: Path, flags: Sequence[str]) -> RunConfig:
    """Return the config of a checkpoint with changed settings laid over it.

    Raises:
        ConfigError: with all problems of both.
        ValueError: it is a finetuning.
    """
    if "task" in read_config(checkpoint):
        raise ValueError(f"--resume {checkpoint}: is a finetuning; go on with it by vlp finetune --resume")
    return from_command_line(RunConfig, flags, checkpoint / CONFIG, prog="vlp pretrain --resume RUN", migrate=migrate)


def stored_config(checkpoint: Path) -> RunConfig:
    """Return the config that a checkpoint was trained with."""
    source = str(checkpoint / CONFIG)
    return build(RunConfig, Layer(lift(read_config(checkpoint), source, migrate), source))


def say_changes(before: Config, after: Config) -> None:
    """Warn about every setting that makes a resumed run another one than was begun."""
    if changed := changes(before, after):
        logger.warning("the resumed run is no longer exactly the one that was begun: %s", ", ".join(changed.values()))


def refuse_changes(folder: Path, before: Config, after: Config) -> None:
    """Refuse changed settings of a run that has ended, which would train nothing; how it is scored may change.

    Raises:
        ValueError: there are such settings.
    """
    scoring = ("data.val", "train.samples", "task.", "test", "tune.")
    changed = {name: shown for name, shown in changes(before, after).items() if not name.startswith(scoring)}
    if changed:
        raise ValueError(
            f"--resume {folder}: the run has ended, so nothing would be trained with {', '.join(changed.values())}; "
            f"extend it with --train.samples, or begin a new run with --init {folder}"
        )


def changes(before: Config, after: Config) -> dict[str, str]:
    """Return how the settings that change weights differ, in words by dotted name."""
    old, new = leaves(before.model_dump()), leaves(after.model_dump())
    changed = [name for name in old | new if old.get(name) != new.get(name) and name not in HARMLESS]
    return {name: f"{name} {old.get(name)} -> {new.get(name)}" for name in changed}


def with_hash(parts: Parts) -> Parts:
    """Return the parts with the fingerprint of their training data written down, or checked if it was.

    Raises:
        ValueError: the data are not those that the run began with.
    """
    assert parts.reader is not None
    data, sources = parts.run.data, dict(parts.run.data.sources)
    check_hash(parts.reader, data)
    for name, reader in parts.sources.items():
        check_hash(reader, data.of(name), name)
        sources[name] = sources[name].model_copy(update={"hash": reader.fingerprint})
    data = data.model_copy(update={"hash": parts.reader.fingerprint, "sources": sources})
    return replace(parts, run=parts.run.model_copy(update={"data": data}))
