"""The report of a run: one HTML file with results, loss curves and examples that opens anywhere, and its table as text.

The file holds all it shows (styles, drawings, images as data URIs), has no script, and forbids its reader's browser
every request. What it says is data here; how it looks is in ``templates/``.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from downstream.charts import NONE, draw, number
from vlp.train.log import read_metrics

Picture: TypeAlias = bytes | Tensor
"""An encoded image (PNG, WebP, JPEG or GIF) as it is, or pixels uint8 [3, H, W]."""

OBJECTIVES = {
    "itc": "Image-text contrast (ITC)",
    "itm": "Image-text matching (ITM)",
    "mlm": "Masked words (MLM)",
    "lm": "Writing captions (LM)",
    "answer": "Answering",
}
"""Objectives' names in words; others are shown as they are called."""

_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


@dataclass(frozen=True)
class Row:
    """One number of the results. Rows of a task and split make one table: a line a method, a column a metric."""

    task: str
    split: str
    metric: str
    value: float
    """Shares in 0..1 are of kind percent."""
    floor: float | Mapping[str, float] | None = None
    """What blindness reaches, in the same unit; by name where there are several, {"majority": 0.37}."""
    higher_is_better: bool = True
    note: str = ""
    """A sentence below the table."""
    method: str = ""
    """How the number was reached, where there are several ways: "ITC", "ITM rerank"."""
    kind: Literal["percent", "plain"] = "percent"
    headline: str = ""
    """In words what the number says; rows that have one are also shown large, on top of the report."""

    @property
    def floors(self) -> dict[str, float]:
        """The floors by name."""
        if self.floor is None:
            return {}
        return dict(self.floor) if isinstance(self.floor, Mapping) else {"floor": self.floor}

    def show(self, value: float) -> str:
        """Return a value of this metric in words."""
        return percent(value) if self.kind == "percent" else number(value)


@dataclass(frozen=True)
class Curve:
    """A loss over training."""

    name: str
    points: Sequence[tuple[float, float]]
    """(samples seen, value), in order."""
    chance: float | None = None
    """The loss of guessing."""


@dataclass(frozen=True)
class Hit:
    """Something that a query found."""

    image: Picture | None
    """None if a text was found."""
    label: str
    """The text, or what the image shows."""
    score: float | None
    right: bool


@dataclass(frozen=True)
class Query:
    """A text that looks for its image, or an image that looks for its text."""

    query: str | Picture
    truth: str | Picture
    """What it should find; shown if it did not."""
    hits: Sequence[Hit]
    """The first few, best first."""
    rank: int | None = None
    """Of the truth among all candidates, 1 = first; None = unknown."""


@dataclass(frozen=True)
class Question:
    """A question about an image, and what the model answered."""

    image: Picture
    question: str
    answer: str
    """The right one."""
    prediction: str
    right: bool
    confidence: float | None = None
    """Probability of the prediction, in 0..1."""


@dataclass(frozen=True)
class Caption:
    """A caption that the model wrote, and what people wrote."""

    image: Picture
    candidate: str
    references: Sequence[str]


@dataclass(frozen=True)
class Report:
    """All that a report says; sections without content are left out."""

    title: str
    lead: str
    """A paragraph: what was trained, on what, and what the numbers below are about."""
    facts: Sequence[tuple[str, str]] = ()
    """Name and value of what a number must come with: seed, samples, time, split hash, versions, hardware, command."""
    rows: Sequence[Row] = ()
    splits: Mapping[str, str] = field(default_factory=dict)
    """Split -> a sentence that says what it is, shown above its tables."""
    curves: Sequence[Curve] = ()
    queries: Mapping[str, Sequence[Query]] = field(default_factory=dict)
    """Heading -> queries."""
    questions: Sequence[Question] = ()
    captions: Sequence[Caption] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Cell:
    """A number in a table."""

    text: str
    best: bool
    """Of several methods' numbers."""
    share: float | None
    """The value where it is a share of one, for a bar."""


@dataclass(frozen=True)
class Block:
    """One table: the rows of a task and split, each method a line, the floors last."""

    task: str
    split: str
    columns: tuple[tuple[str, bool], ...]
    """Metric, and whether higher is better."""
    lines: tuple[tuple[str, tuple[Cell, ...]], ...]
    floors: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...]


def render(report: Report) -> str:
    """Return the report as one HTML page.

    Raises:
        ValueError: an image is of no known format, or not uint8 [3, H, W].
    """
    environment = Environment(
        loader=PackageLoader("downstream"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"uri": data_uri, "percent": percent, "number": number, "ordinal": ordinal}
    environment.tests["text"] = lambda value: isinstance(value, str)
    charts = [draw(one.name, one.points, one.chance, "samples") for one in report.curves]
    return environment.get_template("report.html.j2").render(
        report=report,
        blocks=blocks(report.rows),
        headlines=[row for row in report.rows if row.headline],
        charts=[chart for chart in charts if chart is not None],
        queries={heading: queries for heading, queries in report.queries.items() if queries},
    )


def write_report(report: Report, path: str | Path) -> Path:
    """Write the report as one HTML file, its folder too where there is none; return where it is."""
    path = Path(path)
    page = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def table(report: Report) -> Table:
    """Return the report's numbers for the terminal, the same tables one below the other."""
    made = blocks(report.rows)
    shown = Table(title=escape(report.title), title_style="bold", show_header=False, padding=(0, 1))
    width = max((len(block.columns) for block in made), default=0)
    shown.add_column(overflow="fold")
    for _ in range(width):
        shown.add_column(justify="right", no_wrap=True)
    for block in made:
        heading = escape(f"{block.task}, {block.split}" if block.split else block.task)
        shown.add_row(heading, *(escape(_arrow(*column)) for column in block.columns), style="bold")
        for name, cells in block.lines:
            values = (f"[bold]{cell.text}[/]" if cell.best else cell.text for cell in cells)
            shown.add_row(f"  {escape(name or 'model')}", *values)
        for name, cells in block.floors:
            shown.add_row(f"  {escape(name)}", *(cell.text for cell in cells), style="dim")
        shown.add_section()
    return shown


def curves_from_metrics(path: str | Path, chances: Mapping[str, float | None]) -> list[Curve]:
    """Return one curve for each objective in a run's metrics.jsonl, in the order of their appearance.

    Args:
        path: of the file.
        chances: chance level by objective, as "itc"; may lack some.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for record in read_metrics(Path(path)):
        for key, value in record.items():
            if key.endswith("/loss") and value is not None:
                points.setdefault(key.removesuffix("/loss"), []).append((record["seen"], float(value)))
    return [Curve(OBJECTIVES.get(name, name), found, chances.get(name)) for name, found in points.items()]


def blocks(rows: Sequence[Row]) -> list[Block]:
    """Group rows into tables, tasks together, everything else in the order given."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: tasks.index(row.task)):
        groups.setdefault((row.task, row.split), []).append(row)
    return [_block(task, split, group) for (task, split), group in groups.items()]


def _block(task: str, split: str, rows: Sequence[Row]) -> Block:
    metrics = {row.metric: row for row in rows}
    values = {(row.method, row.metric): row.value for row in rows}
    floors = {(name, row.metric): value for row in rows for name, value in row.floors.items()}
    methods = list(dict.fromkeys(row.method for row in rows))
    top = {metric: _best(row, [row.value for row in rows if row.metric == metric]) for metric, row in metrics.items()}

    def cells(name: str, source: Mapping[tuple[str, str], float], mark: bool) -> tuple[Cell, ...]:
        line = []
        for metric, row in metrics.items():
            value = source.get((name, metric), math.nan)
            share = min(max(value, 0.0), 1.0) if row.kind == "percent" and math.isfinite(value) else None
            line.append(Cell(row.show(value), mark and value == top[metric], share))
        return tuple(line)

    return Block(
        task,
        split,
        tuple((metric, row.higher_is_better) for metric, row in metrics.items()),
        tuple((method, cells(method, values, len(methods) > 1)) for method in methods),
        tuple((name, cells(name, floors, False)) for name in dict.fromkeys(name for name, _ in floors)),
        tuple(dict.fromkeys(row.note for row in rows if row.note)),
    )


def _best(row: Row, values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return (max if row.higher_is_better else min)(finite, default=math.nan)


def _arrow(metric: str, higher_is_better: bool) -> str:
    """The metric's name, with a mark where lower is better."""
    return metric if higher_is_better else f"{metric} (lower is better)"


def percent(value: float) -> str:
    """Return a share as percent: 18.3 %, and 0.09 % with the figures that small ones need."""
    if not math.isfinite(value):
        return NONE
    return f"{100 * value:.{2 if 0 < abs(value) < 0.00995 else 1}f}\N{NO-BREAK SPACE}%"


def ordinal(value: int) -> str:
    """Return 1st, 2nd, 3rd, 4th, ..., 11th."""
    last = {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th") if value % 100 not in (11, 12, 13) else "th"
    return f"{value:,}{last}"


def data_uri(image: Picture) -> str:
    """Return the image as a data URI; pixels become a PNG.

    Raises:
        ValueError: the bytes are of no known format, or the pixels are not uint8 [3, H, W].
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"image: {image.dtype} {tuple(image.shape)} cannot be shown; give uint8 [3, H, W] or an encoded image"
            )
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG")
        image = buffer.getvalue()
    kind = next((name for start, name in _SIGNATURES.items() if image.startswith(start)), None)
    if kind is None and image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise ValueError(
            f"image: {len(image)} bytes that start with {image[:4]!r} are no PNG, WebP, JPEG or GIF; encode it first"
        )
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
