"""`vlp compare`: its arguments, and the grid that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.cli.command import Arguments, Command, Parser, device_option, print_result

if TYPE_CHECKING:
    from vlp.config import Config
    from vlp.run import RunConfig

DEFAULT = "demo_small"
"""The recipe of the default grid."""
ALL = ("single_stream", "cross", "co", "multiway", "none"), ("itc", "itm", "itc+itm+mlm"), 2
"""Fusions, objectives and seeds without a recipe."""
OWN = ("single_stream", "cross", "co"), (), 1
"""Those of a recipe that the user names; no objectives = the recipe's own."""


def compare_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp compare`."""
    parser.add_argument(
        "recipe",
        nargs="?",
        help=f"name of a recipe or a .yaml file; without it: {DEFAULT}, fusions {' '.join(ALL[0])}, objectives "
        f"{' '.join(ALL[1])}, {ALL[2]} seeds",
    )
    parser.add_argument(
        "--fusions",
        nargs="+",
        metavar="NAME",
        help=f"any of {' '.join(ALL[0])} bridge ({' '.join(OWN[0])}), with the sizes of the recipe's fusion",
    )
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME:FLAG=VALUE,...",
        dest="variants",
        help="in place of --fusions a variant of one's own, as wide:model.fusion.width=256; NAME: is the recipe as it "
        "is; may be repeated",
    )
    parser.add_argument("--grid", type=Path, metavar="FILE", help="YAML file of variants: name to tree of settings")
    parser.add_argument(
        "--objectives",
        nargs="+",
        metavar="A+B",
        help="sets of objectives, as itc itc+itm itc+mim, for every variant (the recipe's own); one that the recipe "
        "lacks has its default settings",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help=f"seeds, from train.seed on ({OWN[2]})")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the runs (runs/compare); done ones are kept, others go on"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="page with markers compare:begin and compare:end; writes the table between them",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="models trained at once, on the GPUs in turn or each with its share of the cores (1)",
    )
    device_option(parser)


def compare_config(arguments: Arguments, flags: list[str]) -> Config:
    """Return the config that all variants start from."""
    from vlp.flags import from_command_line
    from vlp.run import RunConfig

    recipe = arguments.recipe or DEFAULT
    return from_command_line(RunConfig, flags, recipe, prog=f"vlp compare {recipe}", group="pretrain")


def compare_variants(arguments: Arguments, config: Any) -> Mapping[str, RunConfig]:
    """Return the config of each variant by name: those that are asked for, else each fusion.

    Raises:
        ValueError: a variant is named twice, changes nothing, or is wrong.
    """
    from downstream.grid import with_fusion
    from vlp.config import Layer
    from vlp.flags import from_command_line
    from vlp.recipes import read_tree
    from vlp.run import RunConfig

    if not arguments.variants and arguments.grid is None:
        fusions = words(arguments.fusions) or (OWN if arguments.recipe else ALL)[0]
        return {name: with_fusion(config, name) for name in fusions}
    if arguments.fusions:
        raise ValueError("--fusions: are variants too, and cannot be combined with --variant or --grid; leave out one")
    runs: dict[str, RunConfig] = {}
    asked: list[tuple[str, list[str], Layer]] = []
    for word in arguments.variants or ():
        name, colon, settings = word.partition(":")
        if not colon:
            raise ValueError(
                f"--variant {word}: says no settings, as {word}:model.fusion.layers=2 would; for the recipe as it is "
                f"write {word}:"
            )
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


def words(given: list[str] | None) -> list[str]:
    """Return the words of an option, which may also be joined by commas."""
    return [word for one in given or () for word in one.split(",") if word]


def compare(arguments: Arguments, config: Any) -> None:
    """Run `vlp compare`."""
    from downstream import compare as comparison
    from downstream.grid import make_grid
    from vlp.train.distributed import pick_device, process_group

    _, objectives, seeds = OWN if arguments.recipe or arguments.variants or arguments.grid else ALL
    seeds = seeds if arguments.seeds is None else arguments.seeds
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: give at least 1")
    grid = make_grid(compare_variants(arguments, config), words(arguments.objectives) or objectives, seeds)
    if arguments.markdown is not None:
        comparison.check_page(arguments.markdown)
    folder = arguments.out or Path("runs") / "compare"
    device = pick_device(arguments.device)
    with process_group(device):
        done = comparison.compare(grid.cells, folder, device, command=arguments.command, jobs=arguments.jobs)
        if arguments.markdown is not None and len(done) == len(grid.cells):
            comparison.write_markdown(arguments.markdown, comparison.markdown(done, grid.refused))
    print_result(comparison.compare_table(done, grid.refused))


COMPARE = Command(
    "train a grid of fusions and objectives on the same data and budget, and print their table",
    compare_arguments,
    compare,
    compare_config,
)
