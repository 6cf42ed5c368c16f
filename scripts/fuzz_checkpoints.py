"""Load damaged and hostile checkpoints: ``python scripts/fuzz_checkpoints.py --count 2000 --seed 0``.

Each mutated file must end in a load report or in one clear line (ValueError), never in another exception, a hang or
code that ran. What is mutated are the golden cases in tests/goldens and a checkpoint folder of ours.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import logging
import os
import pickle
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

import vlp
from scripts.goldens.base import Case
from scripts.goldens.cases import ADAPTERS
from vlp.checkpoint.foreign import WEIGHT_FILES, read_state

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60
"""Seconds after which a load counts as hung."""


@dataclass(frozen=True)
class Seedling:
    """A whole checkpoint: files to copy, which of them holds the weights, and what ``vlp.load`` needs beside them."""

    folder: Path
    weights: str
    config: Mapping[str, Any] | None = None

    def copy(self, target: Path) -> Path:
        """Copy it and return its file of weights."""
        shutil.copytree(self.folder, target)
        return target / self.weights


class Hostile:
    """Unpickling this creates a file: the sign that code ran."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.sign}",)


def seedlings() -> list[Seedling]:
    """Return the whole checkpoints."""
    found = [Seedling(ROOT / "tests" / "vlp" / "checkpoint" / "format_1", "model.safetensors")]
    for path in sorted((ROOT / "tests" / "goldens").glob("*/case.json")):
        case = Case(path.parent)
        adapter = next((one for pattern, one in ADAPTERS.items() if re.fullmatch(pattern, case.name)), None)
        weights = next((name for name in WEIGHT_FILES if (case.folder / name).is_file()), None)
        if adapter is not None and weights is not None:
            found.append(Seedling(case.folder, weights, adapter.config(case)))
    return found


def truncate(file: Path, draw: random.Random, sign: Path) -> None:
    """Cut the file."""
    with file.open("r+b") as handle:
        handle.truncate(draw.randrange(file.stat().st_size))


def flip_bits(file: Path, draw: random.Random, sign: Path) -> None:
    """Flip some bits, most of them near the beginning, where the header is, or near the end, where a zip's is."""
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 3, 30))):
        reach = draw.choice((64, 2048, len(content)))
        at = draw.randrange(min(reach, len(content)))
        content[at if draw.random() < 0.5 else -1 - at] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def rename_keys(file: Path, draw: random.Random, sign: Path) -> None:
    """Rename, drop or double some weights."""
    state = read_state(file)
    for name in draw.sample(sorted(state), min(len(state), draw.choice((1, 2, 10)))):
        tensor = state.pop(name).clone()
        what = draw.randrange(3)
        if what == 0:
            state[name.replace(".", "_", 1)] = tensor
        elif what == 1:
            state[f"{name}.more"] = tensor
    _write(file, state)


def reshape(file: Path, draw: random.Random, sign: Path) -> None:
    """Give some weights another shape or type."""
    state = read_state(file)
    for name in draw.sample(sorted(state), min(len(state), draw.choice((1, 2, 10)))):
        tensor = state[name]
        state[name] = draw.choice(
            (
                tensor.flatten(),
                tensor[..., :-1] if tensor.dim() else tensor,
                tensor[None],
                tensor.new_empty(0),
                tensor.bool(),
            )
        ).clone()
    _write(file, state)


def poison(file: Path, draw: random.Random, sign: Path) -> None:
    """Replace the file by a pickle that wants to run code, under the file's own name or a torch one."""
    hostile = {"model": {"weight": Hostile(sign)}, "state_dict": Hostile(sign)}
    if draw.random() < 0.5:
        file.write_bytes(pickle.dumps(hostile))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(hostile))
            archive.writestr("archive/version", "3\n")


def bomb(file: Path, draw: random.Random, sign: Path) -> None:
    """Replace the file by an archive that expands a thousandfold, or a header that promises petabytes."""
    if draw.random() < 0.5:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}))
            archive.writestr("archive/data/0", bytes(50_000_000))
    else:
        header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
        file.write_bytes(struct.pack("<Q", draw.choice((len(header), 1 << 60))) + header)


def damage_settings(file: Path, draw: random.Random, sign: Path) -> None:
    """Cut a config beside the weights, flip its bits, or give some of its settings another value or none."""
    names = [name for name in SETTINGS if (file.parent / name).is_file()]
    if not names:
        return  # what is given as config= is spoilt instead
    config = file.parent / draw.choice(names)
    if draw.random() < 0.3:
        draw.choice((truncate, flip_bits))(config, draw, sign)
    elif config.suffix == ".json":
        config.write_text(json.dumps(spoilt(json.loads(config.read_text(encoding="utf-8")), draw)), encoding="utf-8")


def spoilt(tree: Any, draw: random.Random) -> Any:
    """A copy of settings in which some have another value or are missing."""
    found = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 3))):
        place = found
        while isinstance(place, dict) and place:
            name = draw.choice(sorted(place))
            if isinstance(place[name], dict) and draw.random() < 0.7:
                place = place[name]
                continue
            value = draw.choice(ODD)
            if value is GONE:
                del place[name]
            else:
                place[name] = copy.copy(value)
            break
    return found


GONE = object()
ODD: tuple[Any, ...] = (
    GONE,
    None,
    -1,
    0,
    7,
    10**6,
    0.5,
    "gelu",
    "../../secret",
    "",
    [],
    {},
    [1, 2],
    {"x": 1},
    True,
    float("nan"),
)
SETTINGS = ("config.json", "open_clip_config.json", "preprocessor_config.json", "config.yaml")
MUTATIONS = (truncate, flip_bits, flip_bits, rename_keys, reshape, poison, bomb, damage_settings)


def _write(file: Path, state: Mapping[str, torch.Tensor]) -> None:
    ready = {name: tensor.contiguous() for name, tensor in state.items()}
    other = file.with_name(f"new-{file.name}")  # the tensors are mapped from the file itself
    if file.suffix == ".safetensors":
        save_file(ready, other)
    else:
        torch.save({"model": ready}, other)
    other.replace(file)


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after some seconds."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"still loading after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(seedling: Seedling, mutate: Callable[[Path, random.Random, Path], None], number: int, seed: int) -> str:
    """Mutate a copy and load it: "report", "error", or what should not have happened."""
    with tempfile.TemporaryDirectory() as folder:
        sign = Path(folder) / "ran"
        file = seedling.copy(Path(folder) / "checkpoint")
        draw = random.Random(f"{seed}/{number}")
        mutate(file, draw, sign)
        config = spoilt(seedling.config, draw) if mutate is damage_settings else seedling.config
        # Our folders are read whole, with their manifest; foreign files may also lie alone.
        source = file.parent if (file.parent / "manifest.json").is_file() else file
        try:
            with patience(PATIENCE):
                vlp.load(source, config=config)
            found = "report"
        except ValueError as error:
            found = "error" if "\n" not in str(error) else f"an error of several lines: {str(error)[:200]!r}"
        except Exception as error:
            found = f"{type(error).__name__}: {str(error)[:200]}"
        return "code was executed" if sign.exists() else found


def fuzz(count: int, seed: int = 0, seconds: float | None = None) -> tuple[collections.Counter[str], list[str]]:
    """Load ``count`` mutated checkpoints, or as many as fit into ``seconds``; return outcomes by kind, and failures."""
    known = seedlings()
    outcomes: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    started = time.monotonic()
    for number in range(count):
        if seconds is not None and time.monotonic() - started > seconds:
            break
        draw = random.Random(f"{seed}:{number}")
        seedling, mutate = draw.choice(known), draw.choice(MUTATIONS)
        found = attempt(seedling, mutate, number, seed)
        outcomes[f"{mutate.__name__}: {found if found in ('report', 'error') else 'FAILED'}"] += 1
        if found not in ("report", "error"):
            failures.append(f"number {number}, {mutate.__name__} of {seedling.folder.name}: {found}")
        if sys.stderr.isatty() and number % 20 == 0:
            rate = (number + 1) / (time.monotonic() - started)
            sys.stderr.write(f"\r{number + 1} / {count}  {rate:.1f}/s  {len(failures)} failed")
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    outcomes, failures = fuzz(arguments.count, arguments.seed)
    for what, number in sorted(outcomes.items()):
        print(f"{number:6d}  {what}")
    for line in failures:
        print(line)
    print(
        f"{sum(outcomes.values()) - len(failures)} of {sum(outcomes.values())} mutated checkpoints ended as they should"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
