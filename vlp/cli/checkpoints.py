"""Commands about checkpoints as files: inspect, push, interpolate."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vlp.cli.command import Arguments, Command, Parser, print_result

logger = logging.getLogger(__name__)


def config_option(parser: Parser) -> None:
    """Declare ``--config``."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a foreign checkpoint's settings in the authors' keys, JSON or YAML"
    )


def average_option(parser: Parser) -> None:
    """Declare ``--average`` and ``--no-average``."""
    which: dict[str, Any] = {"dest": "average", "default": None}
    what = "take the moving average of the weights (it is taken where there is one)"
    parser.add_argument("--average", action="store_true", help=what, **which)
    parser.add_argument("--no-average", action="store_false", help="take the last weights instead", **which)


def inspect_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp inspect`."""
    parser.add_argument("checkpoint", help="file, folder, address or hub id")
    config_option(parser)


def inspect(arguments: Arguments, config: Any) -> None:
    """Run `vlp inspect`."""
    from rich.markup import escape
    from rich.table import Table

    from vlp.checkpoint.inspect import inspect as tell
    from vlp.config import to_yaml

    found = tell(arguments.checkpoint, arguments.config)
    table = Table(show_header=False, box=None)
    table.add_row("family", found.family)
    table.add_row("stored", f"{found.parameters:,} values in {found.tensors:,} tensors")
    table.add_row("can", ", ".join(found.abilities) or "encode only (no objective's head is stored)")
    table.add_row("tokenizer", found.words or "none: no text can be read until vlp.load(..., tokenizer=FOLDER) has one")
    for one in found.assumed:
        table.add_row("note", escape(one))
    print_result(table)
    print_result(to_yaml(found.config))


def push_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp push`."""
    parser.add_argument("checkpoint", help="run or checkpoint folder")
    parser.add_argument("repository", help="owner/name on the hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", default="", help="of the commit")


def push(arguments: Arguments, config: Any) -> None:
    """Run `vlp push`."""
    from vlp.checkpoint.push import push as upload

    address = upload(arguments.checkpoint, arguments.repository, private=arguments.private, message=arguments.message)
    logger.info("pushed to %s", address)


def interpolate_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp interpolate`."""
    parser.add_argument("first", help="pretrained checkpoint or run")
    parser.add_argument("second", help="the one finetuned from it")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of the second, 0 to 1 (0.5)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")


def interpolate(arguments: Arguments, config: Any) -> None:
    """Run `vlp interpolate`."""
    from vlp.checkpoint.interpolate import write_between
    from vlp.checkpoint.load import load

    models = load(arguments.first), load(arguments.second)
    write_between(*models, arguments.alpha, arguments.out, arguments.command)
    logger.info("wrote %s", arguments.out)


INSPECT = Command("tell what a checkpoint is, ours or another project's", inspect_arguments, inspect)
PUSH = Command("upload a checkpoint with its model card to the hub", push_arguments, push)
INTERPOLATE = Command(
    "mix the weights of a checkpoint and one finetuned from it (WiSE-FT)", interpolate_arguments, interpolate
)
