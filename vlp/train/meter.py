"""Sums of what the steps report, until they are written to the log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vlp.train.step import StepReport


class Meter:
    """Sums what steps report, on the device, until it is written."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.latest = device, dict[str, Any]()
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.steps, self.samples, self.waited, self.start = 0, 0, 0.0, time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Add one step."""
        for name, value in report.scalars.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1  # a sampled objective has fewer than steps
        self.steps += 1
        self.samples += report.seen - report.started
        self.seen, self.rate = report.seen, report.lr

    def leave_out(self, seconds: float) -> None:
        """Do not count time in which nothing was trained."""
        self.start += seconds

    def state(self) -> dict[str, Any]:
        """Return what is summed and not yet written, so that a resumed run writes the records it would have written."""
        return {"sums": dict(self.sums), "counts": dict(self.counts), "steps": self.steps, "latest": self.latest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.steps, self.latest = state["steps"], state["latest"]
        self.counts = state.get("counts") or dict.fromkeys(self.sums, self.steps)

    def record(self) -> dict[str, Any]:
        """Return the means since the last record, the same on all ranks, and begin anew. Waits for the device."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[name].reshape(()) / self.counts[name] for name in names]).tolist()
        elapsed = time.perf_counter() - self.start
        self.latest = {
            "seen": self.seen,
            **dict(zip(names, means, strict=True)),
            "lr": self.rate,
            "samples_per_second": self.samples / elapsed,
            "wait_share": min(self.waited / elapsed, 1.0),
        }
        self._clear()
        return self.latest


def losses_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the losses of a log record by objective."""
    return {name.removesuffix("/loss"): value for name, value in record.items() if name.endswith("/loss")}


def timed(steps: Iterator[Any], meter: Meter) -> Iterator[Any]:
    """Pass ``steps`` on, counting in ``meter`` the time that each was waited for."""
    while True:
        start = time.perf_counter()
        try:
            batches = next(steps)
        except StopIteration:
            return
        meter.waited += time.perf_counter() - start
        yield batches
