"""Commands that train: pretrain, finetune."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.cli.command import Arguments, Command, Parser, device_option, print_result, recipe_config, shrink_option
from vlp.cli.tasks import choose_task, foreign, open_checkpoint, task_arguments

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from vlp.config import Config
    from vlp.run import RunConfig

logger = logging.getLogger(__name__)


def pretrain_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp pretrain`."""
    parser.add_argument("recipe", nargs="?", help="name of a recipe (vlp recipes lists them) or a .yaml file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (runs/RECIPE)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run, exactly; changed flags extend it")
    parser.add_argument("--init", metavar="CHECKPOINT", help="begin with the weights and the tokenizer of a checkpoint")
    shrink_option(parser)
    device_option(parser)


def pretrain_config(arguments: Arguments, flags: list[str]) -> Config:
    """Return the run's config."""
    from vlp.checkpoint.native import find_checkpoint
    from vlp.pretrain import resumed_config
    from vlp.run import RunConfig

    if arguments.resume is not None:
        if arguments.recipe or arguments.out or arguments.init or arguments.shrink:
            raise ValueError(
                "--resume takes recipe, folder and weights from the run; leave out RECIPE, --out, --init and --shrink"
            )
        arguments.found = find_checkpoint(arguments.resume, newest=True)
        return resumed_config(arguments.found, flags)
    prog = f"vlp pretrain {arguments.recipe or 'RECIPE'}"
    if arguments.recipe is None and "--help" not in flags:
        raise ValueError("vlp pretrain: name a recipe (vlp recipes lists them), or --resume RUN")
    return recipe_config(RunConfig, arguments.recipe, arguments, flags, prog)


def pretrain(arguments: Arguments, config: Any) -> None:
    """Run `vlp pretrain`; score retrieval on `data.val` where that is named."""
    from downstream.evaluate import open_data
    from vlp import pretrain as training
    from vlp.train.distributed import pick_device, process_group

    if config.data.val is not None:
        open_data(config.data, "val")  # what is wrong with it is said before anything is trained
    device = pick_device(arguments.device)
    with process_group(device):
        if arguments.resume is not None:
            folder, found = arguments.resume, arguments.found
            outcome = training.resume(folder, arguments.flags, device, command=arguments.command, found=found)
        else:
            folder = arguments.out or Path("runs") / Path(arguments.recipe).stem
            outcome = training.pretrain(config, folder, device, command=arguments.command, init=arguments.init)
        scores = validate(folder, config, device, arguments.command) if outcome.finished else None
    if scores is not None:
        print_result(scores)
    logger.info("%s samples seen; checkpoint %s", f"{outcome.seen:,}", outcome.checkpoint)


def validate(folder: Path, config: RunConfig, device: torch.device, command: str) -> Table | None:
    """Return the retrieval scores of a run on `data.val` to print; None where it names none."""
    from downstream.evaluate import evaluate_run, result_table
    from downstream.retrieval import RetrievalConfig
    from vlp.checkpoint.load import load

    task = RetrievalConfig()
    if config.data.val is None:
        return None
    loaded = load(folder, device=device)
    if (missing := task.lacks(loaded.model)) is not None:
        logger.warning("data.val is not scored: retrieval takes %s", missing)
        return None
    if config.data.boxes is not None:
        logger.warning("data.val is not scored: retrieval compares whole images, without data.boxes")
        return None
    return result_table(task, evaluate_run(folder, loaded, config.data, task, command=command), title="data.val")


def finetune_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp finetune`."""
    task_arguments(parser)
    parser.add_argument("--init", metavar="CHECKPOINT", help="run, checkpoint (also another project's) or hub id")
    parser.add_argument(
        "--data", nargs="+", metavar="DATA", help="training data; validation data (else held out of them); test data"
    )
    parser.add_argument("--published", action="store_true", help="batch, rate and duration of the task's recipe")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (runs/TASK)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped finetuning, exactly")
    lora = "train low-rank differences of the towers and the fusion (8; extra lora)"
    parser.add_argument("--lora", nargs="?", type=int, const=8, metavar="RANK", help=lora)


def finetune_config(arguments: Arguments, flags: list[str]) -> Config:
    """Return the config of a finetuning.

    A task's name alone leaves batch, learning rate and duration to be chosen; a recipe states them.
    """
    from downstream.choose import ALL, given
    from downstream.finetune import FinetuneConfig, checkpoint_layer, resumed_config
    from vlp.checkpoint.migrate import migrate
    from vlp.checkpoint.native import find_checkpoint
    from vlp.config import Layer, load_recipe
    from vlp.flags import from_command_line

    if arguments.resume is not None:
        if arguments.task or arguments.out or arguments.init or arguments.data:
            raise ValueError("--resume takes everything from the run; leave out TASK, --data, --out and --init")
        if arguments.lora is not None or arguments.published:
            raise ValueError("--resume goes on with the run's own settings; leave out --lora and --published")
        arguments.found = find_checkpoint(arguments.resume, newest=True)
        return resumed_config(arguments.found, flags)
    recipe, task = choose_task(arguments, flags)
    loaded = arguments.loaded = open_checkpoint(arguments, arguments.init, "--init", flags)
    below = [task] if loaded is None else [checkpoint_layer(loaded.config), task]
    if arguments.init is not None:
        below.append(Layer({"init": arguments.init, "init_options": foreign(arguments)}, "--init"))
    if task.tree and not arguments.published:
        layers = () if recipe is None else load_recipe(recipe, group="finetune", migrate=migrate)
        below += [Layer({k: v for k, v in one.tree.items() if k != "train"}, one.source) for one in layers]
        below.append(Layer({"auto": [name for name in ALL if name not in given(flags)]}, "vlp finetune"))
        recipe = None
    flags = flags if arguments.lora is None else [*flags, "--train.lora.rank", str(arguments.lora)]
    names = ("data.train", "data.val", "test")
    if len(arguments.data or ()) > len(names):
        raise ValueError(
            f"--data {' '.join(arguments.data)}: give training data, validation data, test data; others by --data.train"
        )
    words = [word for pair in zip(names, arguments.data or ()) for word in (f"--{pair[0]}", pair[1])]
    prog = f"vlp finetune {arguments.task or 'TASK'}"
    return from_command_line(
        FinetuneConfig, [*words, *flags], recipe, prog=prog, group="finetune", migrate=migrate, below=below
    )


def finetune(arguments: Arguments, config: Any) -> None:
    """Run `vlp finetune`."""
    from downstream import finetune as tuning
    from vlp.train.distributed import pick_device, process_group

    device = pick_device(arguments.device)
    with process_group(device):
        if arguments.resume is not None:
            more = {"command": arguments.command, "found": arguments.found}
            done = tuning.resume(arguments.resume, arguments.flags, device, **more)
        else:
            folder = arguments.out or Path("runs") / config.task.kind
            done = tuning.finetune(config, arguments.loaded, folder, device, command=arguments.command)
    if (table := tuning.finetune_table(config, done)) is not None:
        print_result(table)
    logger.info("checkpoint %s", done.outcome.checkpoint)


PRETRAIN = Command("train a model from a recipe, or go on with a run", pretrain_arguments, pretrain, pretrain_config)
FINETUNE = Command(
    "train a checkpoint for a task, with the metric before and after", finetune_arguments, finetune, finetune_config
)
