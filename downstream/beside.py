"""Pieces of work beside each other: each a process on a GPU of its own, or with its share of the cores."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from vlp.train.signals import stop_signal

logger = logging.getLogger(__name__)

LOG = "log.txt"
"""In the folder of a piece of work: what its process printed."""
STOPPED = 3
"""Exit code of a process that a signal stopped in good order."""


@dataclass(frozen=True)
class Job:
    """One piece of work."""

    name: str
    folder: Path
    work: Callable[[torch.device], object | None]
    """Does it on a device and returns None if a signal stopped it; can be pickled."""


def run_beside(jobs: Sequence[Job], device: torch.device, number: int) -> bool:
    """Do ``number`` pieces of work at once; return False if a signal stopped them.

    Args:
        jobs: begun in this order.
        device: CPU, whose cores are shared out, or the kind of accelerator, of which each process takes one in turn.
        number: of processes.

    Raises:
        ValueError: one failed; the others are stopped as by a signal.
    """
    number = min(number, len(jobs))
    waiting, running, done, begun = deque(jobs), dict[int, tuple[Job, BaseProcess]](), 0, time.monotonic()
    failed: Job | None = None
    with stop_signal() as stop:
        while running or (waiting and not stop.is_set()):
            for slot in range(number):
                if waiting and not stop.is_set() and slot not in running:
                    job = waiting.popleft()
                    running[slot] = job, _start(job, device, slot, number)
            connection.wait([process.sentinel for _, process in running.values()], timeout=1.0)
            if stop.is_set():
                for _, process in running.values():
                    process.terminate()
            for slot, (job, process) in [*running.items()]:
                if process.exitcode is None:
                    continue
                del running[slot]
                if process.exitcode == 0:
                    done += 1
                    left = (time.monotonic() - begun) / done * (len(jobs) - done)
                    logger.info("%s done, %d of %d, ETA %d min", job.name, done, len(jobs), round(left / 60))
                elif not stop.is_set():
                    failed = None if process.exitcode == STOPPED else job
                    stop.set()
    if failed is not None:
        lines = (failed.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        raise ValueError(f"{failed.name} failed: {last} (all of it: {failed.folder / LOG}); the same command goes on")
    return done == len(jobs)


def _start(job: Job, device: torch.device, slot: int, number: int) -> BaseProcess:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / LOG).touch()  # also where the process does not come so far as to write
    logger.info("%s begins, output in %s", job.name, job.folder / LOG)
    if device.type != "cpu":
        device = torch.device(device.type, slot % torch.accelerator.device_count())
    threads = max(1, torch.get_num_threads() // number)
    process = get_context("spawn").Process(target=_work, args=(job, device, threads), name=job.name)
    process.start()
    return process


def _work(job: Job, device: torch.device, threads: int) -> None:
    """The life of a process, whose output goes to the log."""
    with (job.folder / LOG).open("a", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    logging.basicConfig(level=logging.INFO, format="%(levelname)-7s %(message)s", force=True)
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        found = job.work(device)
    except (ValueError, OSError) as error:  # of which the message alone is for the user
        sys.exit(str(error))
    sys.exit(STOPPED if found is None else 0)
