"""`vlp compare`: variants of one recipe on the same data order, seeds and budget, and the table of their scores.

Parts that variants share begin with the same weights (a part's are drawn from the seed and its name alone), and see the
same samples in the same order with the same masks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from downstream.evaluate import evaluate_run, open_data
from downstream.retrieval import RetrievalConfig
from encoders.text import BesideConfig
from objectives.collectives import rank
from vlp.checkpoint.load import load
from vlp.config import to_yaml
from vlp.fusion.dual import DualStreamConfig
from vlp.fusion.single import SingleStreamConfig
from vlp.parts import parameters_by_part
from vlp.pretrain import leaves, pretrain, resume
from vlp.run import RunConfig
from vlp.train.log import read_metrics

logger = logging.getLogger(__name__)

VARIANT, ROW = "variant.yaml", "row.json"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    parameters: int
    """Of the whole model, shared ones once."""
    samples_per_second: float
    """Median over the log's records."""
    losses: dict[str, float]
    """By objective, in the last record of the log."""
    metrics: dict[str, float]
    """Of retrieval on ``data.val``."""
    chance: dict[str, float]


def each_fusion(run: RunConfig) -> dict[str, RunConfig]:
    """Return the run with each fusion in place of its own, which gives them the settings that they know."""
    own = run.model.fusion.model_dump(include=set(BesideConfig.model_fields) - {"init"})
    fusions = {
        "single_stream": SingleStreamConfig(**own),
        "cross": DualStreamConfig(**own, attention="cross"),
        "co": DualStreamConfig(**own, attention="co"),
    }
    found = {}
    for name, fusion in fusions.items():
        found[name] = run.model_copy(update={"model": run.model.model_copy(update={"fusion": fusion})})
    return found


def compare(
    runs: Mapping[str, RunConfig],
    folder: Path,
    device: torch.device,
    *,
    task: RetrievalConfig | None = None,
    command: str = "",
) -> list[Row]:
    """Train every variant and score its retrieval; what is done already is kept, what was interrupted goes on.

    Args:
        runs: config by name.
        folder: of the comparison; each variant has a folder in it, a run like any other.
        device: of this rank.
        task: how retrieval is scored.
        command: for the model cards.

    Raises:
        ValueError: a folder holds another variant of that name, or the data are unusable.
        NonFiniteError: a variant diverged.
    """
    for run in runs.values():
        open_data(run.data, "val")  # before anything is trained
    if unequal := unheld(runs):
        logger.warning(
            "variants differ in more than the model, in %s: compare their scores with care", ", ".join(unequal)
        )
    rows = []
    for number, (name, run) in enumerate(runs.items(), 1):
        place = folder / name
        claim(place, run)
        if (place / ROW).is_file():
            rows.append(Row(**json.loads((place / ROW).read_text(encoding="utf-8"))))
            continue
        logger.info("variant %s, %d of %d", name, number, len(runs))
        if not finish(place, run, device, command):
            logger.warning("interrupted; the same command goes on")
            break
        rows.append(score(name, place, run, device, task or RetrievalConfig(), command))
    return rows


def unheld(runs: Mapping[str, RunConfig]) -> list[str]:
    """Return the settings of data, seed and budget in which variants differ."""
    trees = [dict(leaves(run.model_dump(include={"data", "train"}))) for run in runs.values()]
    return sorted({name for tree in trees for name in tree if tree[name] != trees[0].get(name)})


def claim(place: Path, run: RunConfig) -> None:
    """Write a variant's config into its folder, or check that it is the one that is there.

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
    """Train a variant to its end, from where it is; return False if a signal stopped it."""
    begun = (place / "checkpoints").is_dir() and any((place / "checkpoints").iterdir())
    outcome = resume(place, (), device, command=command) if begun else pretrain(run, place, device, command=command)
    return outcome.finished


def score(name: str, place: Path, run: RunConfig, device: torch.device, task: RetrievalConfig, command: str) -> Row:
    """Score a trained variant; write its row and return it."""
    loaded = load(place, device=device)
    result = evaluate_run(place, loaded, run.data, task, command=command)
    records = read_metrics(place / "metrics.jsonl")
    row = Row(
        name,
        sum(parameters_by_part(loaded.model).values()),
        median(record["samples_per_second"] for record in records),
        {key.removesuffix("/loss"): value for key, value in records[-1].items() if key.endswith("/loss")},
        result.metrics,
        result.floors["chance"],
    )
    if rank() == 0:
        (place / ROW).write_text(json.dumps(asdict(row), indent=1) + "\n", encoding="utf-8")
    return row


def compare_table(rows: list[Row]) -> Table:
    """Return the table to print: recalls of the variants' best scoring and by embeddings alone, beside chance."""
    shown = ("t2i/R@1", "t2i/R@10", "i2t/R@1", "i2t/R@10")
    table = Table(title="Variants: retrieval on data.val, recalls in %", title_justify="left")
    objectives = list(dict.fromkeys(name for row in rows for name in row.losses))
    columns = ("variant", "M weights", "samples/s", *(f"{name} loss" for name in objectives), *shown, "ITC t2i/R@1")
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for row in rows:
        losses = [f"{row.losses[name]:.3f}" if name in row.losses else "" for name in objectives]
        scores = [percent(row.metrics.get(name)) for name in (*shown, "ITC/t2i/R@1")]
        table.add_row(row.name, f"{row.parameters / 1e6:.2f}", f"{row.samples_per_second:.0f}", *losses, *scores)
    if rows:
        chance = [percent(rows[0].chance.get(name)) for name in (*shown, "ITC/t2i/R@1")]
        table.add_row("chance", "", "", *("" for _ in objectives), *chance, style="dim")
    return table


def percent(share: float | None) -> str:
    """A share in 0..1 as a table shows it."""
    return "" if share is None else f"{100 * share:.2f}"
