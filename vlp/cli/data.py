"""Commands about data: `vlp data convert`, from a data set's official files to a table of ours."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from vlp.cli.command import Arguments, Command, Parser
from vlp.recipes import did_you_mean

logger = logging.getLogger(__name__)


def convert_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp data convert`: the options of all converters, of which each takes some."""
    from downstream.convert import CONVERTERS
    from downstream.convert.write import parameters

    parser.add_argument("converter", metavar="NAME", help="the data set, see below")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="table to write, .jsonl")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, each of which is looked for")
    takers: dict[str, list[str]] = {}
    flags: set[str] = set()
    for name, converter in CONVERTERS.items():
        for one in parameters(converter):
            takers.setdefault(one.name, []).append(name)
            flags |= {one.name} if one.kind is bool else set()
    for option, names in takers.items():
        how: dict[str, Any] = {"action": "store_true"} if option in flags else {"nargs": "+", "metavar": "VALUE"}
        parser.add_argument("--" + option.replace("_", "-"), help=", ".join(names), **how)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, CONVERTERS), default=0)
    about = (f"  {name:<{width}}  {(one.__doc__ or '').splitlines()[0]}" for name, one in CONVERTERS.items())
    parser.epilog = "data sets:\n" + "\n".join(about)


def convert(arguments: Arguments, config: Any) -> None:
    """Run `vlp data convert`."""
    from downstream.convert import CONVERTERS
    from downstream.convert.write import bind, parameters, write_rows

    name = arguments.converter
    if name not in CONVERTERS:
        raise ValueError(f"{name}: no converter for such a data set; {did_you_mean(name, CONVERTERS)}")
    options = {one.name for converter in CONVERTERS.values() for one in parameters(converter)}
    given = {option: getattr(arguments, option) for option in sorted(options)}
    entries = CONVERTERS[name](**bind(name, CONVERTERS[name], given))
    logger.info("%s: %s", arguments.out, write_rows(entries, arguments.out, arguments.images))


CONVERT = Command("turn a data set's official annotation files into a table", convert_arguments, convert)
