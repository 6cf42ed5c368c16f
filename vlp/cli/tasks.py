"""What the commands about a task share: which task, and whose model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.cli.command import Arguments, Parser, device_option
from vlp.recipes import did_you_mean

if TYPE_CHECKING:
    from vlp.config import Layer
    from vlp.loaded import Loaded

logger = logging.getLogger(__name__)


def task_arguments(parser: Parser) -> None:
    """Declare what finetune, evaluate and predict share."""
    parser.add_argument("task", nargs="?", help="retrieval, vqa, captioning, or a recipe of configs/finetune")
    device_option(parser)


def choose_task(arguments: Arguments, flags: list[str]) -> tuple[str | None, Layer]:
    """Return recipe and lowest layer of the word TASK, which may name either.

    Raises:
        ValueError: it names neither.
    """
    from downstream import AnyTask
    from vlp.config import Layer, list_recipes, slot_of

    kinds = [kind for kind in slot_of(AnyTask).classes if kind]
    task, recipes = arguments.task, [name.removeprefix("finetune/") for name in list_recipes("finetune")]
    if task is None and "--help" in flags:
        task = kinds[0]
    if task is None:
        raise ValueError(f"name a task: {', '.join(kinds)}")
    if task in kinds:
        return task if task in recipes else None, Layer({"task": {"kind": task}})
    if task in recipes or task.endswith((".yaml", ".yml")):
        return task, Layer({})
    raise ValueError(f"task {task}: no such task or recipe; {did_you_mean(task, [*kinds, *recipes])}")


def open_checkpoint(arguments: Arguments, source: str | None, name: str, flags: list[str]) -> Loaded | None:
    """Load the model of a task command; None for help, and for a dry run where it is not there."""
    if "--help" in flags:
        return None
    if source is None:
        raise ValueError(f"{name} is missing; name a run, a checkpoint or a hub id")
    from vlp.checkpoint.load import load
    from vlp.train.distributed import pick_device

    if arguments.dry_run and not Path(source).exists():
        logger.warning("%s is not here; the tree below lacks what it would say", source)
        return None
    return load(source, device=pick_device(arguments.device))
