"""A clean end: signals that ask a run to stop, heard by all ranks alike."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from objectives.collectives import sum_no_grad, world_size


def agreed(stop: bool) -> bool:
    """Return whether any rank wants to stop, the same on all; asked on the host, so no device is waited for."""
    return stop if world_size() == 1 else bool(sum_no_grad(torch.tensor(float(stop))).item())


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Give an event that SIGTERM and ctrl-C set; a second ctrl-C interrupts at once."""
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
