"""`vlp COMMAND ...`: finds the command, reads its arguments, and turns the user's mistakes into one line each."""

from __future__ import annotations

import difflib
import logging
import os
import shlex
import sys
from collections.abc import Sequence

from vlp.cli import checkpoints, compare, convert, data, looking, training, using
from vlp.cli.command import Command, Parser
from vlp.recipes import did_you_mean

COMMANDS = {
    "pretrain": training.PRETRAIN,
    "finetune": training.FINETUNE,
    "evaluate": using.EVALUATE,
    "predict": using.PREDICT,
    "embed": using.EMBED,
    "search": using.SEARCH,
    "show": looking.SHOW,
    "demo": looking.DEMO,
    "recipes": looking.RECIPES,
    "compare": compare.COMPARE,
    "inspect": checkpoints.INSPECT,
    "convert": convert.CONVERT,
    "push": checkpoints.PUSH,
    "interpolate": checkpoints.INTERPOLATE,
    "data check": data.CHECK,
    "data convert": data.CONVERT,
}
"""By name: one word, or two for the commands of a family."""

EXTRAS = {"easy_vqa": "demo", "pyarrow": "parquet", "sentencepiece": "spm", "wandb": "track", "peft": "lora"}
"""Packages that an extra installs."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command of ``words`` (None: of the process) and return its exit code.

    0: done. 2: the user's mistake, said in one line each. 130: interrupted. Anything else is a bug, with its traceback.
    """
    words = sys.argv[1:] if words is None else list(words)
    try:
        dispatch(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        message = explain(error)
        if message is None or "--traceback" in words:
            raise
        for line in message.splitlines():
            sys.stderr.write(f"error: {line}\n")
        return 2
    return 0


def explain(error: Exception) -> str | None:
    """Say what the user can do about an error, one line a problem; None if it is ours."""
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get((error.name or "").split(".")[0])
        return extra and f"this needs the package {error.name}; install it with: pip install 'vlp[{extra}]'"
    if isinstance(error, OSError):  # a full disk, a folder that may not be written
        return error.filename and f"{error.filename}: {error.strerror}"
    return str(error) or None


def dispatch(words: Sequence[str]) -> None:
    """Run the command that the first word names.

    Raises:
        ValueError: there is no such command, or its arguments are wrong.
    """
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return
    if words[0] == "--version":
        from importlib.metadata import PackageNotFoundError, version

        try:
            sys.stdout.write(f"vlp {version('vlp')}\n")
        except PackageNotFoundError:
            sys.stdout.write("vlp, a checkout that is not installed\n")
        return
    name = choose(words)
    if name is None:
        sys.stdout.write(overview(f"{words[0]} "))
        return
    command = COMMANDS[name]
    parser = parser_of(name, command)
    rest = words[len(name.split()) :]
    own, flags = split([word for word in rest if word not in ("-h", "--help")], parser)
    wants_help = bool({"-h", "--help"} & set(words))
    if wants_help:
        sys.stdout.write(parser.format_help())
        if command.config is None:
            return
        sys.stdout.write("\n")
        flags.append("--help")
    if flags and command.config is None:
        raise ValueError(f"vlp {name}: unknown option {flags[0]}; {did_you_mean(flags[0], parser.options)}")
    check_options(flags, parser)
    arguments = parser.parse_args(own)
    arguments.name, arguments.flags, arguments.command = name, flags, shlex.join(["vlp", *words])
    start_logging(arguments.quiet or wants_help)
    config = None if command.config is None else command.config(arguments, flags)  # with --help prints and exits
    if config is not None and arguments.dry_run:
        from vlp.config import to_yaml

        sys.stdout.write(to_yaml(config))
        return
    command.run(arguments, config)


def choose(words: Sequence[str]) -> str | None:
    """Return the name of the command that the first word or two give; None: a family's help is asked for.

    Raises:
        ValueError: there is no such command.
    """
    if (pair := " ".join(words[:2])) in COMMANDS:
        return pair
    if words[0] in COMMANDS:
        return words[0]
    family = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if not family:
        raise ValueError(f"vlp {words[0]}: no such command; {did_you_mean(words[0], COMMANDS)}")
    if {"-h", "--help"} & set(words):
        return None
    raise ValueError(f"vlp {words[0]}: name what to do, {', '.join(f'vlp {name}' for name in family)}")


def overview(family: str = "") -> str:
    """What `vlp --help` prints, or the help of a family of commands."""
    rows = [f"  {name:<12} {command.about}" for name, command in COMMANDS.items() if name.startswith(family)]
    head = "usage: vlp COMMAND ...\n\nVision-language pretraining with fused models.\n\n"
    return head + "\n".join(rows) + "\n\nvlp COMMAND --help explains one; vlp --version says which vlp this is.\n"


def parser_of(name: str, command: Command) -> Parser:
    """Return the parser of a command's own arguments."""
    parser = Parser(f"vlp {name}", command.about)
    command.arguments(parser)
    if command.config is not None:
        parser.add_argument("--dry-run", action="store_true", help="print the resolved config tree and stop")
        parser.epilog = "Every field of the config tree is an option too, and listed below."
    parser.add_argument("--quiet", action="store_true", help="log warnings only")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def split(words: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """Divide words into a command's own arguments and the flags of its config tree.

    A word without dashes goes with the option before it; the first ones are the command's.
    """
    own: list[str] = []
    flags: list[str] = []
    current = own
    for word in words:
        if word.startswith("--") and len(word) > 2:
            current = own if word.partition("=")[0] in parser.options else flags
        current.append(word)
    return own, flags


def check_options(flags: Sequence[str], parser: Parser) -> None:
    """Look for misspelt options of the command itself among the flags of its config tree.

    Raises:
        ValueError: there is one.
    """
    for name in (word.partition("=")[0] for word in flags if word.startswith("--") and word != "--help"):
        near = difflib.get_close_matches(name, parser.options, n=1, cutoff=0.8)
        if near and "." not in name:
            raise ValueError(f"{name}: unknown option; perhaps you meant {near[0]}")


def start_logging(quiet: bool) -> None:
    """Log to standard error, one plain line a record where it is no terminal.

    Of the ranks beside the first only errors, and the bad samples, of which each rank meets its own.
    """
    level = logging.ERROR if os.environ.get("RANK", "0") != "0" else logging.WARNING if quiet else logging.INFO
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)-7s %(message)s"))
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%X")
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    for name in ("vlp", "encoders", "objectives", "downstream"):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("vlp.data.loader").setLevel(min(level, logging.WARNING))
