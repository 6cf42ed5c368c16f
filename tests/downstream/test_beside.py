"""Work in processes of its own: at most so many at once, what they print, and how they end."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from downstream.beside import LOG, Job, run_beside

CPU = torch.device("cpu")


def meet(folder: Path, other: Path, device: torch.device) -> bool:
    """Return once the other is there, too."""
    print("here", torch.get_num_threads(), flush=True)
    (folder / "here").touch()
    for _ in range(600):
        if (other / "here").exists():
            return True
        time.sleep(0.1)
    raise TimeoutError


def refuse(other: Path, device: torch.device) -> bool:
    """Fail once the other is there."""
    while not (other / "here").exists():
        time.sleep(0.05)
    raise ValueError("model.width 7: an even one, please")


def until_signal(folder: Path, device: torch.device) -> None:
    """As a training does: end in good order."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    (folder / "here").touch()
    stop.wait(60)
    print("saved", flush=True)


def test_two_at_once(tmp_path: Path) -> None:
    """Each waits for the other, which would never come if one began when the other had ended."""
    a, b = tmp_path / "a", tmp_path / "b"
    jobs = [Job(mine.name, mine, partial(meet, mine, other)) for mine, other in ((a, b), (b, a))]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert run_beside(jobs, CPU, 2)
    finally:
        torch.set_num_threads(before)
    assert [(place / LOG).read_text() for place in (a, b)] == ["here 1\n"] * 2


def test_one_that_fails_stops_the_others(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    jobs = [Job("a", a, partial(until_signal, a)), Job("b", b, partial(refuse, a)), Job("c", tmp_path / "c", refuse)]
    with pytest.raises(ValueError, match=r"b failed: model.width 7: an even one, please \(all of it: .*log.txt\)"):
        run_beside(jobs, CPU, 2)
    assert (a / LOG).read_text() == "saved\n"
    assert not (tmp_path / "c").exists()


def test_a_signal_ends_all_in_good_order(tmp_path: Path) -> None:
    a = tmp_path / "a"

    def interrupt() -> None:
        while not (a / "here").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert not run_beside([Job("a", a, partial(until_signal, a)), Job("b", tmp_path / "b", refuse)], CPU, 1)
    thread.join()
    assert (a / LOG).read_text() == "saved\n" and not (tmp_path / "b").exists()
