"""The command that writes a checkpoint in another format."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vlp.cli.checkpoints import average_option, config_option
from vlp.cli.command import Arguments, Command, Parser

logger = logging.getLogger(__name__)


def convert_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp convert`."""
    parser.add_argument("source", help="whatever vlp.load takes: file, folder, address, hub id, open_clip:MODEL/TAG")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--to", default="vlp", metavar="FORMAT", help="vlp (default), hf, open_clip, ...")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="a foreign checkpoint's tokenizer, folder or hub id")
    average_option(parser)
    config_option(parser)


def convert(arguments: Arguments, config: Any) -> None:
    """Run `vlp convert`."""
    from vlp.checkpoint.export import convert as write
    from vlp.checkpoint.export import formats
    from vlp.checkpoint.load import load

    if arguments.to not in formats():
        raise ValueError(f"--to {arguments.to}: unknown format; known are {', '.join(formats())}")
    loaded = load(
        arguments.source,
        config=arguments.config,
        tokenizer=arguments.tokenizer,
        average=arguments.average,
    )
    left_out = write(loaded, arguments.target, arguments.to, arguments.command)
    if left_out:
        shown = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else "")
        logger.warning("the format has no place for %s", shown)
    logger.info("wrote %s", arguments.target)


CONVERT = Command(
    "write a checkpoint in another library's format, or a foreign one in ours", convert_arguments, convert
)
