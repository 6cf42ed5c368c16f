"""An evaluation during training: when it is asked, what it keeps and stops, and that resuming changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import runs
import torch
from runs import BATCH, checkpoints, losses, weights

from vlp.checkpoint.native import load_weights, read_weights
from vlp.config import load
from vlp.model import Model
from vlp.pretrain import with_hash
from vlp.run import RunConfig, assemble
from vlp.train.evaluation import Verdict
from vlp.train.log import read_metrics
from vlp.train.loop import Outcome, train
from vlp.train.state import read_state

SCORES = [0.1, 0.5, 0.4, 0.3, 0.9]


@dataclass
class Scripted:
    """Gives one score after the other; stops after so many that are not the best."""

    patience: int = 9
    every: int = 2 * BATCH
    scores: list[float] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    heads: list[float] = field(default_factory=list)

    def __call__(self, model: Model, seen: int) -> Verdict:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)  # whatever an evaluation draws is not the training's
        score = SCORES[len(self.scores)]
        best = score > max(self.scores, default=0)
        self.scores.append(score)
        self.seen.append(seen)
        self.heads.append(model.get_parameter("embed.main.text.weight").abs().sum().item())
        return Verdict({"score": score}, best, len(self.scores) - self.scores.index(max(self.scores)) > self.patience)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": list(self.scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scores = list(state["scores"])


def run_of(folder: Path, **train: Any) -> RunConfig:
    folder.mkdir(exist_ok=True)
    return load(RunConfig, runs.write_recipe(folder / "r.yaml", runs.write_data(folder / "data"), **train))


def begin(run: RunConfig, folder: Path, evaluation: Scripted | None) -> Outcome:
    return train(with_hash(assemble(run)), folder, torch.device("cpu"), evaluation=evaluation)


def test_best_is_kept_and_nothing_else_changes(tmp_path: Path) -> None:
    run = run_of(tmp_path, samples=9 * BATCH, save_every=BATCH, keep=1)
    asked = Scripted()
    done = begin(run, tmp_path / "asked", asked)
    assert asked.seen == [2 * BATCH, 4 * BATCH, 6 * BATCH, 8 * BATCH, 9 * BATCH], "every so often, and at the end"
    assert done.finished and done.best == done.checkpoint
    begin(run, tmp_path / "alone", None)
    assert weights(tmp_path / "asked") == weights(tmp_path / "alone")
    records = [record for record in read_metrics(tmp_path / "asked" / "metrics.jsonl") if "val/score" in record]
    assert [(one["seen"], one["val/score"]) for one in records] == list(zip(asked.seen, SCORES, strict=True))
    assert losses(tmp_path / "alone") == [one for one in losses(tmp_path / "asked") if "val/score" not in one]


def test_stopped_early_and_resumed_exactly(tmp_path: Path) -> None:
    run = run_of(tmp_path, samples=20 * BATCH, save_every=3 * BATCH, keep=9)
    done = begin(run, tmp_path / "whole", Scripted(patience=2))
    assert done.finished and done.seen == 8 * BATCH
    assert done.best is not None and done.best.name == f"{4 * BATCH:012d}"
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for path in checkpoints(tmp_path / "run")[-2:]:
        shutil.rmtree(path)
    checkpoint, state = read_state(tmp_path / "run")
    assert checkpoint.name == f"{4 * BATCH:012d}"
    parts = with_hash(assemble(run))
    load_weights(parts.model, read_weights(checkpoint))
    again = Scripted(patience=2)
    device = torch.device("cpu")
    other = train(parts, tmp_path / "run", device, seen=state["seen"], restored=state, evaluation=again)
    assert (other.seen, other.best) == (done.seen, tmp_path / "run" / "checkpoints" / done.best.name)
    assert again.scores == SCORES[:4]
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_best_outlives_the_newest(tmp_path: Path) -> None:
    run = run_of(tmp_path, samples=8 * BATCH, save_every=BATCH, keep=1)
    done = begin(run, tmp_path / "run", Scripted())
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"{n * BATCH:012d}" for n in (4, 8)]
    assert done.best == checkpoints(tmp_path / "run")[0]


def test_the_average_is_what_is_evaluated(tmp_path: Path) -> None:
    run = run_of(tmp_path, samples=4 * BATCH, optim={"lr": 1e-2, "ema": 0.9})
    asked, parts = Scripted(), with_hash(assemble(run))
    train(parts, tmp_path / "run", torch.device("cpu"), evaluation=asked)
    trained = parts.model.get_parameter("embed.main.text.weight").abs().sum().item()
    assert asked.heads[-1] != trained
    stored = read_weights(checkpoints(tmp_path / "run")[-1], average=True)
    assert asked.heads[-1] == stored["embed.main.text.weight"].abs().sum().item()
