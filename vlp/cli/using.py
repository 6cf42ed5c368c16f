"""Commands that use a checkpoint: evaluate, predict, embed, search."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.cli.command import Arguments, Command, Parser, device_option, print_result
from vlp.cli.tasks import choose_task, foreign_options, load_model, open_checkpoint, task_arguments

if TYPE_CHECKING:
    from vlp.config import Config

logger = logging.getLogger(__name__)

LONGEST = 80
"""Letters that the task's settings have in a folder's name; of longer ones there is a hash."""


def evaluate_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp evaluate` and `vlp predict`."""
    task_arguments(parser)
    parser.add_argument("checkpoint", nargs="?", help="run, checkpoint or hub id")
    parser.add_argument("--data", nargs="+", metavar="DATA", help="shards, a table or a folder")
    parser.add_argument("--out", type=Path, metavar="PATH", help="folder of an evaluation, .jsonl file of predictions")
    parser.add_argument(
        "--submission", type=Path, metavar="FILE", help="also write the predictions in the task's official format"
    )


def evaluate_or_compare_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp evaluate`."""
    evaluate_arguments(parser)
    parser.add_argument(
        "--predictions",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="compare two predictions.jsonl of the same samples instead; --out writes it as JSON",
    )


def evaluate_or_compare_config(arguments: Arguments, flags: list[str]) -> Config | None:
    """Return the config of an evaluation; None to compare two."""
    if arguments.predictions is None:
        return evaluate_config(arguments, flags)
    if arguments.task is not None or flags:
        raise ValueError("--predictions A B compares two files and takes nothing beside it but --out")
    return None


def evaluate_config(arguments: Arguments, flags: list[str]) -> Config:
    """Return the config of an evaluation."""
    from downstream.evaluate import EvaluateConfig, check_submission, inherited
    from vlp.config import Layer
    from vlp.flags import from_command_line

    if arguments.task is not None and arguments.checkpoint is None and "--help" not in flags:
        raise ValueError("name a task and a checkpoint: vlp evaluate retrieval runs/demo --data DATA")
    _, task = choose_task(arguments, flags, recipes=False)
    loaded = arguments.loaded = open_checkpoint(arguments, arguments.checkpoint, "CHECKPOINT", flags)
    below = [task] if loaded is None else [inherited(loaded.config), task]
    below.append(Layer({"checkpoint": arguments.checkpoint or ""}))
    data = arguments.data if arguments.data is None or len(arguments.data) > 1 else arguments.data[0]
    below += [] if data is None else [Layer({"data": {"val": data}}, "--data")]
    config = from_command_line(
        EvaluateConfig, flags, prog=f"vlp evaluate {arguments.task or 'TASK'} CHECKPOINT", below=below
    )
    if arguments.submission is not None:
        check_submission(config.task)
    return config


def evaluate(arguments: Arguments, config: Any) -> None:
    """Run `vlp evaluate`."""
    from downstream import evaluate as evaluation
    from vlp.train.distributed import pick_device, process_group

    if arguments.predictions is not None:
        return compare_predictions(arguments)
    folder = arguments.out or own_folder(config, arguments.average)
    config = with_columns(config)
    with process_group(pick_device(arguments.device)):
        result = evaluation.evaluate(config, arguments.loaded, folder, command=arguments.command)
        if arguments.submission is not None:
            evaluation.write_submission(arguments.submission, config.task, result.predictions)
    print_result(evaluation.result_table(config.task, result))
    logger.info("%s and predictions in %s", evaluation.RESULT, folder)


def with_columns(config: Any, *, labelled: bool = True) -> Any:
    """Return the config of an evaluation with the columns of a table found where nobody named them."""
    from downstream.columns import guess_columns

    task, data = guess_columns(config.task, config.data, config.data.val, labelled=labelled)
    return config.model_copy(update={"task": task, "data": data})


def name_of(config: Any, average: bool | None = None) -> str:
    """Return task, checkpoint, data and what of the task is set otherwise in one word, by which results are told apart.

    Args:
        config: as the user asked for it.
        average: which weights were asked for.
    """
    specs = [config.data.val] if isinstance(config.data.val, str) else list(config.data.val or ["held-out"])
    where = config.data.where if config.data.val_where is None else config.data.val_where
    words = [config.task.kind, Path(config.checkpoint).name, *(Path(spec).stem for spec in specs[:2])]
    words += [f"{name}={value}" for name, value in (where or {}).items()]
    words += [] if average is None else ["average" if average else "last"]
    settings = [f"{name}={value}" for name, value in changed(config.task)]
    words += settings if len("-".join(settings)) <= LONGEST else [sha256(repr(settings).encode()).hexdigest()[:8]]
    return re.sub(r"[^\w=.-]+", "_", "-".join(words))


def changed(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the settings that are not the default, by dotted name; not those that change the speed alone."""
    from downstream.evaluate import SPEED
    from vlp.config import leaves

    known = leaves(type(config)().model_dump(mode="json"))
    for name, value in leaves(config.model_dump(mode="json")).items():
        if known.get(name) != value and name not in SPEED:
            yield name, value


def own_folder(config: Any, average: bool | None = None) -> Path:
    """Return where an evaluation goes that was told nothing else.

    Raises:
        ValueError: the result of another checkpoint or of other data is there.
    """
    from downstream.evaluate import RESULT

    folder = Path("runs") / name_of(config, average)
    if (folder / RESULT).is_file():
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        there = [found.get("checkpoint", {}).get("source"), found.get("data", {}).get("val")]
        if there != (asked := json.loads(json.dumps([config.checkpoint, config.data.val]))):
            raise ValueError(f"{folder}: holds the result of {there}, not of {asked}; name another folder with --out")
    return folder


def compare_predictions(arguments: Arguments) -> None:
    """Run `vlp evaluate --predictions A B`."""
    from downstream import paired

    a, b = arguments.predictions
    found = paired.compare_predictions(a, b)
    for table in paired.comparison_tables(a, b, found):
        print_result(table)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(paired.comparison_json(a, b, found), indent=1) + "\n", encoding="utf-8")


def predict(arguments: Arguments, config: Any) -> None:
    """Run `vlp predict`."""
    from downstream import evaluate as evaluation
    from objectives.collectives import rank
    from vlp.train.distributed import pick_device, process_group

    path = arguments.out or Path("runs") / f"{name_of(config, arguments.average)}.jsonl"
    config = with_columns(config, labelled=False)
    with process_group(pick_device(arguments.device)):
        number = evaluation.predict(config, arguments.loaded, path)
        if arguments.submission is not None and rank() == 0:  # which alone has written the predictions
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            evaluation.write_submission(arguments.submission, config.task, rows)
    logger.info("%d predictions in %s", number, path)


def embed_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp embed`."""
    parser.add_argument("data", help="a folder of images, shards or a table")
    parser.add_argument("--checkpoint", required=True, help="run, checkpoint or hub id")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="index to write: .npz or .parquet")
    parser.add_argument("--modality", choices=("image", "text"), default="image", help="what is embedded (image)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples run at a time (64)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that decode images (0: this one)"
    )
    foreign_options(parser)
    device_option(parser)


def embed(arguments: Arguments, config: Any) -> None:
    """Run `vlp embed`."""
    from downstream.embedding import embed_folder

    loaded = load_model(arguments, arguments.checkpoint)
    embed_folder(
        loaded,
        arguments.data,
        arguments.out,
        modality=arguments.modality,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
    )


def search_arguments(parser: Parser) -> None:
    """Declare the arguments of `vlp search`."""
    parser.add_argument("index", type=Path, help="what vlp embed wrote")
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="a text, or an image file")
    parser.add_argument("--checkpoint", required=True, help="run, checkpoint or hub id that made the index")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="how many of each (10)")
    foreign_options(parser)
    device_option(parser)


def search(arguments: Arguments, config: Any) -> None:
    """Run `vlp search`."""
    from rich.markup import escape
    from rich.table import Table

    from downstream import embedding

    loaded = load_model(arguments, arguments.checkpoint)
    found = embedding.search(loaded, arguments.index, arguments.queries, arguments.top)
    for query, rows in zip(arguments.queries, found, strict=True):
        table = Table("cosine", "found", title=escape(query), title_justify="left")
        for key, cosine in rows:
            table.add_row(f"{cosine:.3f}", escape(key))
        print_result(table)


EVALUATE = Command(
    "score a checkpoint on a task's data, or compare two evaluations sample by sample",
    evaluate_or_compare_arguments,
    evaluate,
    evaluate_or_compare_config,
)
PREDICT = Command("write what a checkpoint says of data without labels", evaluate_arguments, predict, evaluate_config)
EMBED = Command("write the vectors of a folder's images, or of texts", embed_arguments, embed)
SEARCH = Command("find what is nearest to a text or an image in such a file", search_arguments, search)
