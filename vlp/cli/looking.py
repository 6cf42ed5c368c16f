"""Commands to begin with: show, recipes, demo."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.cli.command import Arguments, Command, Parser, device_option, print_result, recipe_config, shrink_option

if TYPE_CHECKING:
    from vlp.config import Config


def show_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp show`."""
    parser.add_argument("recipe", nargs="?", help="a recipe (vlp recipes lists them), a .yaml file, or a run's folder")
    shrink_option(parser)


def show_config(arguments: Arguments, flags: list[str]) -> Config:
    """Return the config to show: a recipe's, or that of a run, finetuned ones included.

    Raises:
        ValueError: there is none, or it is a finetuning's recipe, which says nothing without a checkpoint.
    """
    from vlp.checkpoint.migrate import migrate
    from vlp.checkpoint.native import CONFIG
    from vlp.recipes import list_recipes, load_recipe
    from vlp.run import RunConfig

    kind: type[RunConfig] = RunConfig
    recipe = arguments.recipe
    if recipe is None and "--help" not in flags:
        raise ValueError("vlp show: name a recipe (vlp recipes lists them)")
    if recipe is not None:
        recipe = f"finetune/{recipe}" if f"finetune/{recipe}" in list_recipes("finetune") else stored(recipe)
        trees = [layer.tree for layer in load_recipe(recipe, group="pretrain", migrate=migrate)]
        if any("task" in tree for tree in trees):
            from downstream.finetune import FinetuneConfig  # takes a second

            kind = FinetuneConfig
            if Path(recipe).name != CONFIG and not any(tree.get("init") for tree in trees):
                raise ValueError(
                    f"vlp show {arguments.recipe}: a finetuning's recipe lies over a checkpoint; see it with vlp "
                    f"finetune {arguments.recipe} --init CHECKPOINT --dry-run, or show a finetuned run by its folder"
                )
    prog = f"vlp show {recipe or 'RECIPE'}"
    return recipe_config(kind, recipe, arguments, flags, prog)


def stored(recipe: str) -> str:
    """Return the config file in the folder of a run or checkpoint; another word, or a recipe's name, as it is."""
    from vlp.checkpoint.native import CONFIG, find_checkpoint
    from vlp.recipes import list_recipes

    folder = Path(recipe)
    if not folder.is_dir() or {recipe, f"pretrain/{recipe}"} & set(list_recipes()):
        return recipe
    return str(folder / CONFIG if (folder / CONFIG).is_file() else find_checkpoint(folder) / CONFIG)


def show(arguments: Arguments, config: Any) -> None:
    """Run `vlp show`."""
    from vlp import show as showing

    print_result(showing.show(config))


def recipes_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp recipes`."""
    parser.add_argument("recipe", nargs="?", help="print this one as it is written, then its line in detail")
    parser.add_argument("--names", action="store_true", help="names and first sentences alone")


def recipes(arguments: Arguments, config: Any) -> None:
    """Run `vlp recipes`."""
    from vlp.recipes import find_recipe, list_recipes

    if arguments.recipe is not None:
        path = find_recipe(arguments.recipe)
        sys.stdout.write(path.read_text(encoding="utf-8"))
        if path.parent.name == "pretrain":
            from vlp import survey

            sys.stdout.write(survey.details(survey.survey(str(path))) + "\n")
        return
    names = list_recipes()
    if not arguments.names:
        print_survey([name for name in names if name.startswith("pretrain/")])
        names = [name for name in names if not name.startswith("pretrain/")]
    width = max(map(len, names), default=0)
    for name in names:
        sys.stdout.write(f"{name:<{width}}  {headline(find_recipe(name))}\n")


def print_survey(names: list[str]) -> None:
    """Count every recipe's sizes and costs, saying how far it is, and print the table."""
    from rich.console import Console
    from rich.progress import track

    from vlp import survey

    shown = track(names, "Counting weights and FLOPs", console=Console(stderr=True), transient=True)
    print_result(survey.survey_table([survey.survey(name) for name in shown]))


def headline(recipe: Path) -> str:
    """Return the first sentence of a recipe's head comment, or nothing."""
    lines = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.strip("# "))
    return re.split(r"\.\s+(?=[A-Z])", " ".join(lines))[0].removesuffix(".")


def demo_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp demo`."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder to write (runs/demo)"
    )
    device_option(parser)


def demo_config(arguments: Arguments, flags: list[str]) -> Config:
    """Return the demo's budgets."""
    from downstream.demo import DemoConfig
    from vlp.flags import from_command_line

    return from_command_line(DemoConfig, flags, prog="vlp demo")


def demo(arguments: Arguments, config: Any) -> None:
    """Run `vlp demo`."""
    from downstream import demo as demonstration
    from downstream.report import table, write_report
    from vlp.train.distributed import pick_device

    device = pick_device(arguments.device)
    report = demonstration.demo(config, arguments.out, device, command=arguments.command)
    write_report(report, arguments.out / "report.html")
    print_result(table(report))


SHOW = Command("print a recipe's settings, the plan of a step, parameters and FLOPs", show_arguments, show, show_config)
DEMO = Command(
    "pretrain, evaluate and finetune on data that comes with vlp, and write a report", demo_arguments, demo, demo_config
)
RECIPES = Command("print the recipes as the survey's table, or one of them", recipes_arguments, recipes)
