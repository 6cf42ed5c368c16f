"""`vlp evaluate --predictions A B`: two evaluations of the same samples, sample by sample.

For each metric that is a mean over samples: both means, how many samples gained and lost, an exact test of whether a
fair coin decides between them, and a bootstrap interval of the difference. Samples that show the same image are drawn
together, for they are not independent. Metrics of a whole corpus (BLEU, medians) are taken from the results beside the
files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

Row = dict[str, Any]
Key = tuple[str, int]
"""A sample's key, and how many of the same key came before it."""
Values = Mapping[Key, tuple[float, float]]
"""What each sample adds to a metric in A and in B."""

RESULT = "result.json"
PLAIN = ("accuracy", "correct", "exact")
"""Fields that are compared in rows without "metrics"."""
TRUTH = ("direction", "question", "answers", "references", "targets", "true", "true box", "label", "text", "source")
"""Fields that say what the sample is, and cannot differ between two predictions of it."""
RESAMPLES, LEVEL = 5000, 0.95


@dataclass(frozen=True)
class Difference:
    """One metric in both files."""

    metric: str
    a: float
    b: float
    samples: int
    """Samples that have it; 0 for a metric of the whole corpus, which nothing below is known of."""
    wins: int = 0
    """Samples where B is better."""
    losses: int = 0
    p: float | None = None
    """Two-sided, of the exact sign test; where all values are 0 or 1, that is McNemar's exact test."""
    interval: tuple[float, float] | None = None
    """95 % of the bootstrapped differences."""

    @property
    def difference(self) -> float:
        """B - A."""
        return self.b - self.a

    @property
    def ties(self) -> int:
        """Samples that are as good in both."""
        return self.samples - self.wins - self.losses


@dataclass(frozen=True)
class Change:
    """A sample that changed."""

    key: str
    a: float
    b: float
    said_a: str
    """The first field that differs."""
    said_b: str


@dataclass(frozen=True)
class Comparison:
    """Two files of predictions."""

    samples: int
    groups: int
    """Images; the number of samples where rows name none."""
    differences: list[Difference]
    metric: str
    """That of ``changes``."""
    changes: list[Change]
    """Those that changed most, best gains first, then worst losses first."""


def compare_predictions(a: Path, b: Path, shown: int = 10, resamples: int = RESAMPLES) -> Comparison:
    """Compare two files of predictions of the same samples.

    Args:
        a: JSON lines, as ``vlp evaluate`` writes them.
        b: the same samples, in any order.
        shown: changed samples to name.
        resamples: of the bootstrap, whose seed is fixed.

    Raises:
        ValueError: a file cannot be read, they are of other samples, or nothing in them can be compared.
    """
    first, second = read_rows(a), read_rows(b)
    check_same(a, b, first, second)
    pairs: dict[str, dict[Key, tuple[float, float]]] = {}
    for key, row in first.items():
        other = values_of(second[key])
        for name, value in values_of(row).items():
            if name in other:
                pairs.setdefault(name, {})[key] = value, other[name]
    if not pairs:
        raise ValueError(
            f"{a}: its rows have neither metrics nor any of {', '.join(PLAIN)}; evaluate with labels, "
            "predictions alone cannot be compared"
        )
    clusters = {key: row.get("image", key) for key, row in first.items()}
    intervals = bootstrap(pairs, clusters, resamples)
    found = [sign_test(name, pairs[name], intervals[name]) for name in pairs]
    found += _corpus_metrics(a, b, pairs)
    head = str(_result(a).get("headline"))
    metric = head if head in pairs else next(iter(pairs))
    changes = most_changed(pairs[metric], first, second, shown)
    return Comparison(len(first), len(set(map(str, clusters.values()))), found, metric, changes)


def read_rows(path: Path) -> dict[Key, Row]:
    """Return a file's rows by their keys.

    Raises:
        ValueError: a line is no row of predictions, or there is none.
    """
    rows: dict[Key, Row] = {}
    seen: Counter[str] = Counter()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key = str(row["key"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}, line {number}: not a row of predictions, a JSON object with a key; name the "
                    "predictions.jsonl of an evaluation"
                ) from None
            rows[key, seen[key]] = row
            seen[key] += 1
    if not rows:
        raise ValueError(f"{path}: has no rows; name the predictions.jsonl of an evaluation")
    return rows


def check_same(a: Path, b: Path, first: Mapping[Key, Row], second: Mapping[Key, Row]) -> None:
    """Refuse files of other samples.

    Raises:
        ValueError: keys or what a sample asks differ.
    """
    for path, rows, other in ((a, first, second), (b, second, first)):
        if extra := rows.keys() - other.keys():
            raise ValueError(
                f"{a} and {b} are of other samples: {len(extra)} of {len(rows)} are in {path} alone, as "
                f"{min(extra)[0]!r}; compare predictions of the same data"
            )
    for key, row in first.items():
        for name in TRUTH:
            if name in row and name in second[key] and row[name] != second[key][name]:
                raise ValueError(
                    f"{a} and {b} are of other samples: {name} of {key[0]!r} is {_short(row[name])!r} in one, "
                    f"{_short(second[key][name])!r} in the other; compare predictions of the same data"
                )


def values_of(row: Row) -> dict[str, float]:
    """Return what a row adds to each metric."""
    given = row.get("metrics")
    if not isinstance(given, dict):
        given = {name: row[name] for name in PLAIN if name in row}
    return {name: float(value) for name, value in given.items() if isinstance(value, int | float)}


def sign_test(metric: str, pairs: Values, interval: tuple[float, float]) -> Difference:
    """Return a metric's difference with the exact two-sided sign test: of wins + losses, each with probability 1/2."""
    array = np.array(list(pairs.values()), dtype=np.float64)
    change = array[:, 1] - array[:, 0]
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    a, b = array.mean(0).tolist()
    return Difference(metric, a, b, len(pairs), wins, losses, binomial_two_sided(wins, losses), interval)


def binomial_two_sided(wins: int, losses: int) -> float:
    """Return the probability that a fair coin gives a split at least as uneven; 1 without wins and losses."""
    number, fewer = wins + losses, min(wins, losses)
    term = total = 1
    for i in range(fewer):
        term = term * (number - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**number)


def bootstrap(
    pairs: Mapping[str, Values], clusters: Mapping[Key, Any], resamples: int
) -> dict[str, tuple[float, float]]:
    """Return the percentile interval of each metric's mean difference; what shares a cluster is drawn together."""
    number = {name: n for n, name in enumerate(dict.fromkeys(map(str, clusters.values())))}
    sums, counts = (np.zeros((len(number), len(pairs))) for _ in range(2))
    for column, values in enumerate(pairs.values()):
        for key, (one, other) in values.items():
            row = number[str(clusters[key])]
            sums[row, column] += other - one
            counts[row, column] += 1
    draw, means = np.random.default_rng(0), np.empty((resamples, len(pairs)))
    for i in range(resamples):
        times = np.bincount(draw.integers(len(number), size=len(number)), minlength=len(number))
        total = times @ counts
        means[i] = np.divide(times @ sums, total, out=np.full(len(pairs), np.nan), where=total > 0)
    low, high = np.nanpercentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
    return {name: (float(low[n]), float(high[n])) for n, name in enumerate(pairs)}


def most_changed(pairs: Values, first: Mapping[Key, Row], second: Mapping[Key, Row], shown: int) -> list[Change]:
    """Return the samples that changed most: half of those shown gained, half lost, where there are as many."""
    change = {key: other - one for key, (one, other) in pairs.items() if other != one}
    gains = sorted((key for key in change if change[key] > 0), key=lambda key: (-change[key], key))
    losses = sorted((key for key in change if change[key] < 0), key=lambda key: (change[key], key))
    lost = min(len(losses), max(shown // 2, shown - len(gains)))
    chosen = gains[: shown - lost] + losses[:lost]
    return [Change(key[0], *pairs[key], *_said(first[key], second[key])) for key in chosen]


def _said(one: Row, other: Row) -> tuple[str, str]:
    """What two predictions of a sample say, in the first field where they differ."""
    for name, value in one.items():
        if name in (*TRUTH, "metrics", "key", "image") or isinstance(value, bool | float | dict):
            continue
        if name in other and other[name] != value:
            return _short(value), _short(other[name])
    return "", ""


def _short(value: Any) -> str:
    while isinstance(value, list) and value:
        value = value[0]
    text = str(value)
    return text if len(text) <= 50 else text[:49] + "…"


def _result(path: Path) -> dict[str, Any]:
    beside = path.with_name(RESULT)
    return json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}


def _corpus_metrics(a: Path, b: Path, known: Mapping[str, Any]) -> list[Difference]:
    """Metrics that the results beside both files have, and the rows do not."""
    if a.parent == b.parent:
        return []
    one, other = (_result(path).get("metrics", {}) for path in (a, b))
    return [Difference(name, one[name], other[name], 0) for name in one if name in other and name not in known]


def comparison_tables(a: Path, b: Path, found: Comparison) -> list[Table]:
    """Return what to print: the metrics, and the samples that changed most."""
    intro = f"A = {a}\nB = {b}\n{found.samples} samples of {found.groups} images or other groups"
    notes = (
        "p: exact two-sided sign test (McNemar's where values are 0 or 1); interval: 95 %, bootstrap over groups; "
        "a metric without them is of the whole corpus, and shown where it differs"
    )
    metrics = Table(title=escape(intro), title_justify="left", caption=notes, caption_justify="left")
    for name in ("metric", "A", "B", "B - A", "95 % interval", "wins", "losses", "ties", "p"):
        metrics.add_column(name, justify="left" if name == "metric" else "right")
    for one in found.differences:
        if not one.samples and one.a == one.b:
            continue  # of the whole corpus, and the same
        cells = [escape(one.metric), f"{one.a:.4f}", f"{one.b:.4f}", f"{one.difference:+.4f}"]
        if one.interval is not None and one.p is not None:
            low, high = one.interval
            cells += [f"{low:+.4f} .. {high:+.4f}", str(one.wins), str(one.losses), str(one.ties), f"{one.p:.3g}"]
        metrics.add_row(*cells)
    changes = Table(title=f"changed most in {found.metric}", title_justify="left")
    for name in ("sample", "A", "B", "A said", "B said"):
        changes.add_column(name, justify="right" if len(name) == 1 else "left")
    for change in found.changes:
        cells = [escape(change.key), f"{change.a:.3f}", f"{change.b:.3f}", escape(change.said_a), escape(change.said_b)]
        changes.add_row(*cells)
    return [metrics, changes] if found.changes else [metrics]


def comparison_json(a: Path, b: Path, found: Comparison) -> dict[str, Any]:
    """Return the comparison as plain data, for `--out`."""
    tree = asdict(found)
    for row, one in zip(tree["differences"], found.differences, strict=True):
        row |= {"difference": one.difference, "ties": one.ties}
    return {"a": str(a), "b": str(b), **tree}
