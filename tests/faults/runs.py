"""Runs of the real command line that can be killed: a tiny recipe, and processes that start in a moment.

A server process has imported what a run needs; every run is forked from it, so that it is a process of its own (with
its own signals, workers and exit code) without the seconds that importing takes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlp.recipes import dump_yaml

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("vlp.cli", "vlp.pretrain", "vlp.checkpoint.card", "downstream.finetune"),
        *("tokenizers", "transformers.tokenization_utils_tokenizers", "torch.utils.tensorboard"),
    ]
)

BATCH = 6
WORDS = ("red", "blue", "green", "dog", "cat", "car", "house", "tree", "small", "large")
TINY: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "dropout": 0.1}


def write_data(folder: Path, samples: int = 20, name: str = "pairs.csv") -> Path:
    """Write a table of small images of noise, each with a caption of its own; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for number in range(samples):
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,a {' '.join(rng.choice(WORDS, 3))} {number}")
    table = folder / name
    table.write_text("\n".join(lines) + "\n")
    return table


def write_recipe(path: Path, data: Path | str, **train: Any) -> Path:
    """Write a recipe with everything that draws random numbers: four objectives, dropout, augmentation, a shuffle."""
    tree = {
        "model": {
            "vision": {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 16, "patch_size": 8}
            | {"width": 16, "depth": 1, "heads": 2, "drop_path": 0.1},
            "text": {**TINY, "max_length": 12},
            "fusion": {"kind": "dual_stream", **TINY},
            "decoder": TINY,
            "embed": {"width": 8},
        },
        "objectives": {"itc": {}, "itm": {}, "mlm": {}, "lm": {}},
        "data": {
            "train": str(data),
            "max_length": 12,
            "workers": 0,
            "tokenizer": {"size": 80, "min_frequency": 1},
            "transform": {"crop_scale": [0.6, 1.0], "rotation": 10, "color_jitter": 0.2},
        },
        "train": {
            "samples": 20 * BATCH,
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "save_every": 3 * BATCH,
            "log_every": 2,
            "optim": {"lr": 1e-3, "warmup": 2 * BATCH, "ema": 0.9},
            **train,
        },
    }
    path.write_text(dump_yaml(tree))
    return path


@dataclass
class Run:
    """One process of the command line.

    Attributes:
        process: it.
        output: file that its standard output and error go to.
        folder: of the run.
    """

    process: ForkServerProcess
    output: Path
    folder: Path

    def wait_for(self, seen: int, timeout: float = 60) -> None:
        """Wait until the run's log has a record of at least ``seen`` samples."""
        end = time.monotonic() + timeout
        while not any(record["seen"] >= seen for record in records(self.folder)):
            assert self.process.is_alive() and time.monotonic() < end, self.said()
            time.sleep(0.002)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill_group(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it and its workers, as a terminal, `timeout` and Slurm do."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, number)

    def end(self, timeout: float = 60) -> int:
        """Wait until it ends; return its exit code, negative for a signal. What does not end is killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill_group()
            self.process.join()
            raise AssertionError(f"did not end in {timeout:g} s: {self.said()}")
        return self.process.exitcode

    def said(self) -> str:
        """Everything that it printed."""
        return self.output.read_text()


def start(folder: Path, *words: str | Path, env: Mapping[str, str] | None = None, tag: str = "") -> Run:
    """Start ``vlp WORDS`` whose run is, or is to be, in ``folder``; a process group of its own."""
    output = folder.parent / f"{folder.name}{tag}.out"
    process = SERVER.Process(target=_work, args=([str(word) for word in words], str(output), dict(env or {})))
    process.start()
    return Run(process, output, folder)


def pretrain(recipe: Path, folder: Path, *flags: str | Path) -> Run:
    """Start a run."""
    return start(folder, "pretrain", recipe, "--out", folder, "--device", "cpu", *flags)


def resume(folder: Path, *flags: str | Path) -> Run:
    """Go on with a run."""
    return start(folder, "pretrain", "--resume", folder, "--device", "cpu", *flags)


def _work(words: Sequence[str], output: str, env: Mapping[str, str]) -> None:
    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a process of its own
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(env)
    import torch

    from vlp.cli import main

    torch.set_num_threads(1)
    sys.exit(main(words))


def both(begin: Callable[..., Run], *words: str | Path) -> list[Run]:
    """Start the two ranks of a run, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    envs = ({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2))
    return [begin(*words, env=env, tag=env["RANK"]) for env in envs]


def end_both(ranks: Sequence[Run], timeout: float = 60) -> list[int]:
    """Wait until both ranks end; return their exit codes. Where one does not, both are killed."""
    try:
        return [run.end(timeout) for run in ranks]
    finally:
        for run in ranks:
            if run.process.is_alive():
                run.kill_group()


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log; a line that is being written is left out."""
    found = []
    with suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            found.append(json.loads(line))
    return found


def losses(folder: Path) -> list[dict[str, Any]]:
    """The records without what depends on the clock."""
    clock = ("samples_per_second", "wait_share")
    return [{name: value for name, value in record.items() if name not in clock} for record in records(folder)]


def weights(folder: Path) -> bytes:
    """The bytes of a run's newest weights."""
    return (checkpoints(folder)[-1] / "model.safetensors").read_bytes()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("[0-9]*"))
