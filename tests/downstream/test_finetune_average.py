"""A finetuning with a moving average of the weights: what is scored, loaded and evaluated are the same weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import toys

from downstream.evaluate import weights_hash
from vlp import load
from vlp.cli import main

SETTINGS = {"data.workers": 0, "data.split": 0.25, "task.generation.method": "greedy", "train.optim.ema": 0.8}


@pytest.fixture(autouse=True)
def own_logging():
    """The command line's log goes to a stream that is closed after its test."""
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


def scored(folder: Path) -> str:
    return json.loads((folder / "result.json").read_text())["checkpoint"]["sha256"]


@pytest.mark.parametrize("every", ["24", "none"])
def test_the_average_is_scored_loaded_and_evaluated(tmp_path, every, capsys):
    toys.checkpoint(tmp_path, ("lm",), fusion={"kind": "none"})
    data = toys.caption_table(tmp_path)
    run = tmp_path / "run"
    flags = [f"--{name}={value}" for name, value in {**SETTINGS, "train.samples": 48, "tune.every": every}.items()]
    begin = ["finetune", "captioning", "--init", str(tmp_path / "checkpoint"), "--data", str(data), "--out", str(run)]
    assert main([*begin, "--published", "--device", "cpu", "--train.global-batch=8", *flags]) == 0
    last, average = (weights_hash(load(run, average=one).model) for one in (False, True))
    assert last != average == scored(run) == weights_hash(load(run).model)
    ask = [
        "evaluate",
        "captioning",
        str(run),
        "--data",
        str(data),
        "--device",
        "cpu",
        "--task.generation.method=greedy",
    ]
    for name, words, whose, said in (
        ("own", (), average, "the moving average of the weights"),
        ("last", ("--no-average",), last, "the last weights, not their moving average"),
    ):
        capsys.readouterr()
        assert main([*ask, "--out", str(tmp_path / name), *words]) == 0
        assert scored(tmp_path / name) == whose and f"{said}, " in capsys.readouterr().err
