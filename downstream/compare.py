"""`vlp compare`: a grid of variants of one recipe on the same data order, seeds and budget, and the table of scores.

Parts that cells share begin with the same weights (a part's are drawn from the seed and its name alone), and see the
same samples in the same order with the same masks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from downstream.beside import Job, run_beside
from downstream.evaluate import evaluate_run, open_data
from downstream.grid import Cell
from downstream.metrics.retrieval import RECALL_AT
from downstream.retrieval import ITC, ITM, RetrievalConfig
from objectives.collectives import rank, world_size
from vlp.checkpoint.load import load
from vlp.config import leaves, to_yaml
from vlp.parts import parameters_by_part
from vlp.pretrain import pretrain, resume
from vlp.run import RunConfig
from vlp.train.log import read_metrics

logger = logging.getLogger(__name__)

VARIANT, ROW = "variant.yaml", "row.json"
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"
HEADERS = ("fusion", "objectives", "ranked by", "text to image", "image to text", "M weights", "samples/s")


@dataclass(frozen=True)
class Row:
    """What one cell of the grid came to."""

    variant: str
    objectives: str
    """Joined by `+`."""
    seed: int
    parameters: int
    """Of the whole model, shared ones once."""
    samples_per_second: float
    """Median over the log's records."""
    losses: dict[str, float]
    """By objective, in the last record of the log."""
    metrics: dict[str, float]
    """Of retrieval on ``data.val``; empty where the model can neither embed nor match."""
    chance: dict[str, float]


def compare(
    cells: Iterable[Cell],
    folder: Path,
    device: torch.device,
    *,
    task: RetrievalConfig | None = None,
    command: str = "",
    jobs: int = 1,
) -> list[Row]:
    """Train every cell and score its retrieval; what is done already is kept, what was interrupted goes on.

    Args:
        cells: what to train, in this order.
        folder: of the comparison; each cell has a folder in it, a run like any other.
        device: of this rank.
        task: how retrieval is scored.
        command: for the model cards.
        jobs: cells trained at once, each by a process of its own.

    Returns:
        The rows of all cells, of those before a signal if one came.

    Raises:
        ValueError: a folder holds another cell of that name, or the data are unusable.
        NonFiniteError: a cell diverged.
    """
    cells = list(cells)
    if jobs < 1 or (jobs > 1 and world_size() > 1):
        raise ValueError(f"--jobs {jobs}: give at least 1, and under torchrun, where all ranks train each cell, just 1")
    for cell in cells:
        open_data(cell.run.data, "val")  # before anything is trained
    if unequal := unheld({cell.name: cell.run for cell in cells}):
        logger.warning(
            "variants differ in more than the model, in %s: compare their scores with care", ", ".join(unequal)
        )
    for cell in cells:
        claim(folder / cell.name, cell.run)
    rows = {cell.name: row for cell in cells if (row := read_row(folder / cell.name)) is not None}
    left = [cell for cell in cells if cell.name not in rows]
    todo = [partial(train_and_score, cell, folder / cell.name, task or RetrievalConfig(), command) for cell in left]
    if jobs > 1:
        named = [Job(cell.name, folder / cell.name, work) for cell, work in zip(left, todo, strict=True)]
        run_beside(named, device, jobs)
    else:
        for cell, work in zip(left, todo, strict=True):
            logger.info("%s, %d of %d", cell.name, len(rows) + 1, len(cells))
            if (row := work(device)) is None:
                break
            rows[cell.name] = row
    rows |= {cell.name: row for cell in left if (row := read_row(folder / cell.name)) is not None}
    if len(rows) < len(cells):
        logger.warning("interrupted; the same command goes on")
    return [rows[cell.name] for cell in cells if cell.name in rows]


def train_and_score(cell: Cell, place: Path, task: RetrievalConfig, command: str, device: torch.device) -> Row | None:
    """Bring a cell to its end; return None if a signal stopped it."""
    return score(cell, place, device, task, command) if finish(place, cell.run, device, command) else None


def read_row(place: Path) -> Row | None:
    """Return the row of a cell that is done."""
    path = place / ROW
    return Row(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def unheld(runs: Mapping[str, RunConfig]) -> list[str]:
    """Return the settings of data and budget in which variants differ, seeds and single parts' learning rates apart."""
    trees = [leaves(run.model_dump(include={"data", "train"})) for run in runs.values()]
    names = {name for tree in trees for name in tree}
    held = {name for name in names if name == "train.seed" or name.startswith("train.optim.lr_scale")}
    return sorted(name for name in names - held if any(tree.get(name) != trees[0].get(name) for tree in trees))


def claim(place: Path, run: RunConfig) -> None:
    """Write a cell's config into its folder, or check that it is the one that is there.

    Raises:
        ValueError: it is another.
    """
    path, text = place / VARIANT, to_yaml(run)
    if rank() != 0:
        return
    if not path.is_file():
        place.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{place} holds a variant of this name with other settings; remove it or choose another --out")


def finish(place: Path, run: RunConfig, device: torch.device, command: str) -> bool:
    """Train a cell to its end, from where it is; return False if a signal stopped it."""
    begun = (place / "checkpoints").is_dir() and any((place / "checkpoints").iterdir())
    outcome = resume(place, (), device, command=command) if begun else pretrain(run, place, device, command=command)
    return outcome.finished


def score(cell: Cell, place: Path, device: torch.device, task: RetrievalConfig, command: str) -> Row:
    """Score a trained cell; write its row and return it."""
    loaded = load(place, device=device)
    metrics: dict[str, float] = {}
    chance: dict[str, float] = {}
    if task.lacks(loaded.model) is None and cell.run.data.boxes is None:  # galleries are of whole images
        result = evaluate_run(place, loaded, cell.run.data, task, command=command)
        metrics, chance = result.metrics, result.floors["chance"]
    records = read_metrics(place / "metrics.jsonl")
    row = Row(
        cell.variant,
        cell.objectives,
        cell.run.train.seed,
        sum(parameters_by_part(loaded.model).values()),
        median(record["samples_per_second"] for record in records),
        {key.removesuffix("/loss"): value for key, value in records[-1].items() if key.endswith("/loss")},
        metrics,
        chance,
    )
    if rank() == 0:
        (place / ROW).write_text(json.dumps(asdict(row), indent=1) + "\n", encoding="utf-8")
    return row


def table_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return the table's lines below ``HEADERS``: variant by variant, each scoring that its model has, then chance.

    Recalls are R@1 / 5 / 10 in %, mean and standard deviation over seeds.
    """
    rows = list(rows)
    found: list[tuple[str, ...]] = []
    for group in grouped(rows):
        first = group[0]
        sizes = f"{first.parameters / 1e6:.2f}", f"{mean(row.samples_per_second for row in group):.0f}"
        names = {ITC: ITC, ITM: "ITC, then ITM" if f"{ITC}/t2i/R@1" in first.metrics else "ITM"}
        scorings = [(name, shown) for name, shown in names.items() if f"{name}/t2i/R@1" in first.metrics]
        for name, shown in scorings or [("", "")]:
            recalls = (recall_cell([row.metrics for row in group], f"{name}/{way}") for way in ("t2i", "i2t"))
            found.append((first.variant, first.objectives, shown, *recalls, *sizes))
    scored = [row.chance for row in rows if row.chance]
    if scored:
        found.append(("chance", "", "", *(recall_cell(scored[:1], way) for way in ("t2i", "i2t")), "", ""))
    return found


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of each combination of variant and objectives, which differ in their seeds."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.variant, row.objectives), []).append(row)
    return list(found.values())


def recall_cell(metrics: list[dict[str, float]], prefix: str) -> str:
    """R@1 / 5 / 10 of one direction over seeds, in %."""
    columns = [[one[f"{prefix}/R@{k}"] for one in metrics if f"{prefix}/R@{k}" in one] for k in RECALL_AT]
    return " / ".join(spread([100 * share for share in shares], 1) for shares in columns if shares)


def spread(values: list[float], digits: int) -> str:
    """The mean, and where there are several values their standard deviation (of n - 1)."""
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def compare_table(rows: list[Row], refused: Mapping[tuple[str, str], str] | None = None) -> Group:
    """Return what to print: recalls beside chance, last training losses, and what could not be built and why."""
    seeds = sorted({row.seed for row in rows})
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± standard deviation over seeds {seeds}"
    table = Table(title=f"Retrieval on data.val, R@1 / 5 / 10 in %, {named}", title_justify="left")
    for column in HEADERS:
        table.add_column(column, justify="left" if column in HEADERS[:3] else "right")
    for line in table_rows(rows):
        table.add_row(*line, style="dim" if line[0] == "chance" else "")
    losses = Table(title="Last training losses", title_justify="left")
    names = list(dict.fromkeys(name for row in rows for name in row.losses))
    for column in (*HEADERS[:2], *names):
        losses.add_column(column, justify="left" if column in HEADERS else "right")
    for group in grouped(rows):
        cells = (spread([row.losses[name] for row in group if name in row.losses], 3) for name in names)
        losses.add_row(group[0].variant, group[0].objectives, *cells)
    reasons = [Text(f"not legal: {' x '.join(pair)}: {reason}") for pair, reason in (refused or {}).items()]
    return Group(table, losses, *reasons)


def markdown(rows: list[Row], refused: Mapping[tuple[str, str], str]) -> str:
    """Return the same recalls as a Markdown table, with what could not be built below it."""
    lines = [HEADERS, ("---",) * len(HEADERS), *table_rows(rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    pairs: dict[str, list[str]] = {}
    for pair, reason in refused.items():
        pairs.setdefault(reason, []).append(" x ".join(pair))
    notes = [f"Not legal: {', '.join(combined)} ({reason})." for reason, combined in pairs.items()]
    return "\n\n".join([text, *notes])


def check_page(page: Path) -> None:
    """Look for the place of the table in a page.

    Raises:
        ValueError: there is none.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text.split(BEGIN)[1]:
        raise ValueError(f"--markdown {page}: has no lines {BEGIN} and {END}, between which the table goes; add them")


def write_markdown(page: Path, table: str) -> None:
    """Replace what stands between the markers of a page; other ranks than the first do nothing."""
    if rank() != 0:
        return
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")
