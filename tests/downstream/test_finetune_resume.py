"""A stopped finetuning goes on exactly; what has ended, or is something else, is not gone on with."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import toys
from safetensors.torch import load_file

from vlp.checkpoint.native import find_checkpoint
from vlp.cli import main

SMALL = {"data.workers": 0, "data.split": 0.25, "task.generation.method": "greedy"}
SETTINGS = {**SMALL, "train.samples": 64, "train.save-every": 16, "train.keep": 9, "tune.every": 24}


@pytest.fixture(autouse=True)
def own_logging():
    """The command line's log goes to a stream that is closed after its test."""
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner, finetuned without a stop and evaluated every 24 of 64 samples."""
    folder = tmp_path_factory.mktemp("resumed")
    # Retrieval cannot be scored for a checkpoint that only writes: forgetting costs nothing here.
    toys.checkpoint(folder, ("lm",), fusion={"kind": "none"})
    command = ["finetune", "captioning", "--init", folder / "checkpoint", "--data", toys.caption_table(folder)]
    extra = ["--out", folder / "whole", "--device", "cpu", *(f"--{name}={value}" for name, value in SETTINGS.items())]
    assert main([str(word) for word in (*command, *extra)]) == 0
    return folder / "whole"


def stopped(whole: Path, at: int, name: str) -> Path:
    """The run as it would be if it had been killed after so many samples."""
    folder = whole.parent / name
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > at:
            shutil.rmtree(path)
    for name in ("result.json", "predictions.jsonl", "best"):
        (folder / name).unlink(missing_ok=True)
    return folder


def weights(run: Path) -> dict[str, bytes]:
    newest = find_checkpoint(run, newest=True)
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(newest / "model.safetensors").items()}


def told(run: Path) -> dict:
    result = json.loads((run / "result.json").read_text())
    return {name: result[name] for name in ("metrics", "floors", "before", "zero_shot_retrieval", "samples", "notes")}


@pytest.mark.parametrize("at", [16, 48])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole, at, capsys):
    run = stopped(whole, at, f"stopped{at}")
    assert main(["finetune", "--resume", str(run), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert f"going on with {run} at {at} of 64 samples" in said.err and "before" in said.out
    assert weights(run) == weights(whole) and find_checkpoint(run).name == find_checkpoint(whole).name
    assert told(run) == told(whole) and told(run)["before"] is not None
    records = [(each / "metrics.jsonl").read_text().splitlines() for each in (whole, run)]
    scores = [[line for line in lines if "val/" in line] for lines in records]
    assert scores[0] == scores[1][-len(scores[0]) :] or scores[0] == scores[1]


def test_an_ended_run_is_scored_again_and_trains_nothing(whole, capsys):
    run = stopped(whole, 64, "ended")
    before = weights(run)
    assert main(["finetune", "--resume", str(run), "--device", "cpu"]) == 0
    assert "has ended after 64 samples" in capsys.readouterr().err
    assert told(run) == told(whole) and weights(run) == before
    assert main(["finetune", "--resume", str(run), "--train.optim.lr", "1", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "the run has ended, so nothing would be trained with train.optim.lr" in said and f"--init {run}" in said


def test_what_cannot_be_gone_on_with_is_said(whole, tmp_path, capsys):
    assert main(["pretrain", "--resume", str(whole)]) == 2
    assert "is a finetuning; go on with it by vlp finetune --resume" in capsys.readouterr().err
    assert main(["finetune", "--resume", str(whole.parent / "checkpoint")]) == 2
    assert "vlp pretrain --resume" in capsys.readouterr().err
    assert main(["finetune", "captioning", "--resume", str(whole)]) == 2
    assert "leave out TASK, --data, --out and --init" in capsys.readouterr().err
    for option in ("--lora", "--published"):
        assert main(["finetune", "--resume", str(whole), option]) == 2
        assert "leave out --lora and --published" in capsys.readouterr().err
    run = stopped(whole, 16, "changed")
    (whole.parent / "captions.csv").rename(tmp_path / "kept.csv")
    try:
        lines = (tmp_path / "kept.csv").read_text().replace("striped", "checked")
        (whole.parent / "captions.csv").write_text(lines)
        assert main(["finetune", "--resume", str(run), "--device", "cpu"]) == 2
        assert "the data changed since the run began" in capsys.readouterr().err
    finally:
        shutil.move(tmp_path / "kept.csv", whole.parent / "captions.csv")
