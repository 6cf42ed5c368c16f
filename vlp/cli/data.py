"""Commands about data: `vlp data check`, what is wrong with it; `vlp data convert`, from official files to a table."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from vlp.cli.command import Arguments, Command, Parser, device_option
from vlp.cli.tasks import foreign_options, load_model
from vlp.recipes import did_you_mean

logger = logging.getLogger(__name__)


def convert_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp data convert`: the options of all converters, of which each takes some."""
    from downstream.convert import CONVERTERS
    from downstream.convert.write import parameters

    parser.add_argument("converter", metavar="NAME", help="the data set, see below")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="table to write, .jsonl")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, each of which is looked for")
    parser.add_argument("--dry-run", action="store_true", help="check the options and stop")
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
    if arguments.dry_run:
        logger.info("%s: not converted, the options are right", arguments.out)
        return
    logger.info("%s: %s", arguments.out, write_rows(entries, arguments.out, arguments.images))


CONVERT = Command("turn a data set's official annotation files into a table", convert_arguments, convert)


def check_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp data check`."""
    parser.add_argument("data", nargs="+", help="training data, then validation data: shards, a table or a folder")
    parser.add_argument("--checkpoint", help="run, checkpoint or hub id whose tokens and answers count")
    parser.add_argument("--image", nargs="+", metavar="COLUMN", help="column or columns of the images (guessed)")
    parser.add_argument("--text", metavar="COLUMN", help="column of the texts (guessed)")
    parser.add_argument("--answer", metavar="COLUMN", help="column of the answers (guessed)")
    parser.add_argument("--root", metavar="DIR", help="folder that image paths are relative to (the table's own)")
    parser.add_argument(
        "--bad-samples",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share that may be broken (0.01; a few always may)",
    )
    foreign_options(parser)
    device_option(parser)


def check(arguments: Arguments, config: Any) -> None:
    """Run `vlp data check`: a line a finding, with the samples' keys; fails where too many samples are broken."""
    from downstream.check import check_data
    from vlp.data.loader import DataConfig

    if len(arguments.data) > 2:
        raise ValueError(f"{' '.join(arguments.data)}: give training data, then validation data")
    if not 0 <= arguments.bad_samples <= 1:
        raise ValueError(f"--bad-samples {arguments.bad_samples:g}: is a share, between 0 and 1")
    image = arguments.image and (arguments.image[0] if len(arguments.image) == 1 else tuple(arguments.image))
    train, val = arguments.data[0], (arguments.data[1] if len(arguments.data) > 1 else None)
    data = DataConfig(train=train, val=val, image=image, text=arguments.text, root=arguments.root)
    loaded = None if arguments.checkpoint is None else load_model(arguments, arguments.checkpoint)
    found = check_data(data, arguments.answer, loaded)
    for line in found.lines:
        sys.stdout.write(f"{line}\n")
    for one in found.parts:
        one.refuse(arguments.bad_samples)


CHECK = Command("look for what is broken, twice there or in both splits", check_arguments, check)
