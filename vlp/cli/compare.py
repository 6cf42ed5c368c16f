"""`vlp compare`: its arguments, and the variants that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.cli.command import Arguments, Command, Parser, device_option, print_result

if TYPE_CHECKING:
    from vlp.config import Config
    from vlp.run import RunConfig


def compare_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp compare`."""
    parser.add_argument("recipe", nargs="?", help="name of a recipe or a .yaml file, of which each variant differs")
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME:FLAG=VALUE,...",
        dest="variants",
        help="one variant, as co:model.fusion.attention=co; may be repeated",
    )
    parser.add_argument("--grid", type=Path, metavar="FILE", help="YAML file of variants: name to tree of settings")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the runs (runs/compare); done variants are kept"
    )
    device_option(parser)


def compare_config(arguments: Arguments, flags: list[str]) -> Config:
    """Return the config that all variants start from."""
    from vlp.flags import from_command_line
    from vlp.run import RunConfig

    if arguments.recipe is None and "--help" not in flags:
        raise ValueError("vlp compare: name a recipe (vlp recipes lists them)")
    return from_command_line(
        RunConfig, flags, arguments.recipe, prog=f"vlp compare {arguments.recipe or 'RECIPE'}", group="pretrain"
    )


def compare_variants(arguments: Arguments, config: Any) -> Mapping[str, RunConfig]:
    """Return the config of each variant by name: those that are asked for, else each fusion.

    Raises:
        ValueError: a variant is named twice, or is wrong.
    """
    from downstream.compare import each_fusion
    from vlp.config import Layer
    from vlp.flags import from_command_line
    from vlp.recipes import read_tree
    from vlp.run import RunConfig

    if not arguments.variants and arguments.grid is None:
        return each_fusion(config)
    runs: dict[str, RunConfig] = {}
    asked: list[tuple[str, list[str], Layer]] = []
    for word in arguments.variants or ():
        name, _, settings = word.partition(":")
        own = [f"--{setting}" for setting in settings.split(",") if setting]
        asked.append((name, own, Layer({})))
    for name, tree in read_tree(arguments.grid).items() if arguments.grid else ():
        asked.append((name, [], Layer(tree or {}, str(arguments.grid))))
    for name, own, layer in asked:
        if not name or name in runs or "/" in name:
            raise ValueError(
                f"--variant {name or '(no name)'}: give each variant a name of its own, NAME:FLAG=VALUE,..."
            )
        below = Layer(config.model_dump(mode="json"))
        runs[name] = from_command_line(RunConfig, own, below=[below, layer])
    return runs


def compare(arguments: Arguments, config: Any) -> None:
    """Run `vlp compare`."""
    from downstream import compare as comparison
    from vlp.train.distributed import pick_device, process_group

    runs = compare_variants(arguments, config)
    folder = arguments.out or Path("runs") / "compare"
    device = pick_device(arguments.device)
    with process_group(device):
        done = comparison.compare(runs, folder, device, command=arguments.command)
    print_result(comparison.compare_table(done))


COMPARE = Command(
    "train variants of a recipe on the same data and budget, and print their table",
    compare_arguments,
    compare,
    compare_config,
)
