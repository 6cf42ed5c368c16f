"""What the commands about a task share: which task, and whose model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.cli.checkpoints import average_option, config_option
from vlp.cli.command import Arguments, Parser, device_option
from vlp.recipes import did_you_mean

if TYPE_CHECKING:
    from vlp.config import Layer
    from vlp.loaded import Loaded

logger = logging.getLogger(__name__)


def task_arguments(parser: Parser) -> None:
    """Declare what finetune, evaluate and predict share."""
    from downstream import AnyTask
    from vlp.config import slot_of

    kinds = ", ".join(kind for kind in slot_of(AnyTask).classes if kind)
    parser.add_argument("task", nargs="?", help=f"{kinds}; or, to finetune, a recipe of configs/finetune")
    foreign_options(parser)
    device_option(parser)


def foreign_options(parser: Parser) -> None:
    """Declare what loading takes: what another project's checkpoint may need, and which weights of ours."""
    parser.add_argument("--tokenizer", metavar="FOLDER", help="a foreign checkpoint's tokenizer, folder or hub id")
    config_option(parser)
    average_option(parser)


def foreign(arguments: Arguments) -> dict[str, Any]:
    """Return what :func:`foreign_options` gave, as vlp.load takes it."""
    given = {"tokenizer": arguments.tokenizer, "config": arguments.config}
    found: dict[str, Any] = {name: str(value) for name, value in given.items() if value is not None}
    return found if arguments.average is None else found | {"average": arguments.average}


def load_model(arguments: Arguments, source: str) -> Loaded:
    """Load a checkpoint with what the options say of it.

    Raises:
        ValueError: it cannot be loaded.
    """
    from vlp.checkpoint.load import load
    from vlp.train.distributed import pick_device

    return load(source, device=pick_device(arguments.device), **foreign(arguments))


def choose_task(arguments: Arguments, flags: list[str], *, recipes: bool = True) -> tuple[str | None, Layer]:
    """Return recipe and lowest layer of the word TASK, which may name either.

    Args:
        arguments: with the word.
        flags: of the config tree.
        recipes: whether it may name a recipe.

    Raises:
        ValueError: it names neither.
    """
    from downstream import AnyTask
    from vlp.config import Layer, list_recipes, slot_of

    kinds = [kind for kind in slot_of(AnyTask).classes if kind]
    known = [name.removeprefix("finetune/") for name in list_recipes("finetune")] if recipes else []
    task = arguments.task
    if task is None and "--help" in flags:
        task = kinds[0]
    if task is None:
        raise ValueError(f"name a task: {', '.join(kinds)}")
    if task in kinds:
        return task if task in known else None, Layer({"task": {"kind": task}})
    if task in known or (recipes and task.endswith((".yaml", ".yml"))):
        return task, Layer({})
    what = "task or recipe" if recipes else "task"
    raise ValueError(f"task {task}: no such {what}; {did_you_mean(task, dict.fromkeys([*kinds, *known]))}")


def open_checkpoint(arguments: Arguments, source: str | None, name: str, flags: list[str]) -> Loaded | None:
    """Load the model of a task command; None for help, and for a dry run where it is not there."""
    if "--help" in flags:
        return None
    if source is None:
        raise ValueError(f"{name} is missing; name a run, a checkpoint or a hub id")
    if arguments.dry_run and not Path(source).exists():
        logger.warning("%s is not here; the tree below lacks what it would say", source)
        return None
    return load_model(arguments, source)
