"""What a run leaves to read: metrics.jsonl, TensorBoard events, and a progress line."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class RunLog:
    """Writes records keyed by samples seen; silent on all ranks but the first.

    Args:
        folder: of the run.
        total: samples of the whole run.
        seen: samples at the start; later records of an earlier attempt are dropped.
        chances: chance level by objective, shown beside its loss.
        quiet: write nothing (other ranks).
    """

    def __init__(self, folder: Path, total: int, seen: int, chances: Mapping[str, float], quiet: bool) -> None:
        self.chances, self.quiet, self._start, self._first = chances, quiet, time.perf_counter(), seen
        self._progress: Progress | None = None
        if quiet:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["seen"] <= seen] if path.exists() else []
        partial = path.with_suffix(".partial")  # a kill here must not cost the log
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=seen + 1)
        console = Console(stderr=True)
        self._tty = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.completed:,.0f} / {task.total:,.0f} samples"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not self._tty,
        )
        self._task = self._progress.add_task("train", total=total, completed=seen, rate="", losses="")
        self._progress.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record; it has "seen", "samples_per_second" and "NAME/loss" entries."""
        if self._progress is None:
            return
        self._keep(record)
        losses = "  ".join(
            self._shown(name.removesuffix("/loss"), value) for name, value in record.items() if name.endswith("/loss")
        )
        rate = f"{record['samples_per_second']:.0f}/s"
        self._progress.update(self._task, completed=record["seen"], rate=rate, losses=losses)
        if not self._tty:
            total = self._progress.tasks[0].total or 0
            left = (total - record["seen"]) / max(record["samples_per_second"], 1e-9)
            logger.info(
                "%s / %s samples  %s  ETA %s  %s", f"{record['seen']:,}", f"{total:,.0f}", rate, _clock(left), losses
            )

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a record of something else than losses; it has "seen"."""
        if self._progress is not None:
            self._keep(record)

    def _keep(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, float):
                self._events.add_scalar(name, value, record["seen"])

    def _shown(self, name: str, value: float) -> str:
        chance = self.chances.get(name)
        return f"{name} {value:.3f}" + ("" if chance is None else f" (chance {chance:.3f})")

    def close(self) -> None:
        """Flush and close everything."""
        if self._progress is not None:
            self._progress.stop()
            self._file.close()
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; a last line torn by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
