"""What a command of the command line is, and what several of them share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp.config import C, Config

Arguments = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that every mistake is reported in one way; knows its options.

    Attributes:
        options: the names that begin with two dashes.
    """

    def __init__(self, prog: str, about: str) -> None:
        self.options: list[str] = []
        super().__init__(prog, description=about, allow_abbrev=False, add_help=False)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Declare an argument, as argparse does."""
        self.options += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> Any:
        """Raise ValueError."""
        raise ValueError(f"{message}; {self.prog} --help lists the arguments")


@dataclass(frozen=True)
class Command:
    """One word behind `vlp`."""

    about: str
    """What it does, in one sentence."""
    arguments: Callable[[Parser], None]
    """Declares its own arguments."""
    run: Callable[[Arguments, Any], None]
    """Does it, given its arguments and config."""
    config: Callable[[Arguments, list[str]], Config | None] | None = None
    """For commands with a config tree: the tree that arguments and flags give; none where these need none."""


def device_option(parser: Parser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps, ...; the best that there is by default")


def shrink_option(parser: Parser) -> None:
    """Add `--shrink`."""
    parser.add_argument("--shrink", action="store_true", help="every part of the recipe tiny and untrained, to try it")


def recipe_config(cls: type[C], recipe: str | None, arguments: Arguments, flags: list[str], prog: str) -> C:
    """Return the config of a pretraining recipe under flags, small where :func:`shrink_option` says so."""
    from vlp.checkpoint.migrate import migrate
    from vlp.flags import from_command_line
    from vlp.shrink import shrunk_layer

    if arguments.shrink and recipe is not None:
        below = [shrunk_layer(cls, recipe, group="pretrain", migrate=migrate)]
        return from_command_line(cls, flags, prog=prog, below=below)
    return from_command_line(cls, flags, recipe, prog=prog, group="pretrain", migrate=migrate)


def print_result(what: Any) -> None:
    """Print something of rich on rank 0, wide enough for tables where no terminal says how wide."""
    from rich.console import Console

    if os.environ.get("RANK", "0") == "0":
        Console(width=None if sys.stdout.isatty() else 140).print(what)
