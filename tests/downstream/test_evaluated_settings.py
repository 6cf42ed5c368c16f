"""An evaluation of a finetuned checkpoint asks what the finetuning asked, unless it is told otherwise."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import toys

import vlp
from downstream import AnyTask
from downstream.evaluate import EvaluateConfig, inherited, settings_note
from downstream.task import TaskConfig
from vlp.checkpoint.export import convert
from vlp.checkpoint.load import FinetunedConfig, LoadedConfig
from vlp.cli import main
from vlp.config import build, slot_of

MIN, MAX = "--task.generation.min-length=12", "--task.generation.max-length=14"


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


def test_the_score_is_that_of_the_finetuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.checkpoint(tmp_path, ("lm",), fusion={"kind": "none"})
    table, own = str(toys.caption_table(tmp_path)), [MIN, MAX, "--task.generation.method=greedy", "--task.neighbours=0"]
    start = ["finetune", "captioning", "--init", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "run")]
    more = ["--data.workers=0", "--device=cpu", "--train.samples=8", "--train.global-batch=8", "--tune.probe=none"]
    assert main([*start, "--data", table, table, *own, *more]) == 0
    capsys.readouterr()

    def scored(checkpoint: Path, name: str, *flags: str) -> dict:
        asked = ["evaluate", "captioning", str(checkpoint), "--data", table, "--out", str(tmp_path / name)]
        assert main([*asked, "--device=cpu", *flags]) == 0
        return json.loads((tmp_path / name / "result.json").read_text())

    trained = json.loads((tmp_path / "run" / "result.json").read_text())
    found = scored(tmp_path / "run", "same")
    assert found["metrics"] == trained["metrics"] and found["settings"] == trained["settings"]
    note = "the task's settings are those of the finetuning that made the checkpoint"
    assert note in found["notes"] and note in " ".join(capsys.readouterr().out.split())
    other = scored(tmp_path / "run", "other", "--task.generation.min-length=3")
    assert other["settings"]["generation"]["min_length"] == 3 and other["settings"]["generation"]["max_length"] == 14
    assert f"{note}, but for generation.min_length 3 (there 12)" in other["notes"]
    loaded = vlp.load(tmp_path / "run")
    convert(loaded, tmp_path / "copy", "vlp")
    assert vlp.load(tmp_path / "copy").config.task == loaded.config.task
    assert main(["show", str(tmp_path / "copy")]) == 0


def test_what_names_the_data_is_not_taken_over() -> None:
    task = {"kind": "retrieval", "k": 20, "weight_data": "gone.csv", "weight_where": {"split": "val"}, "folds": 2}
    config = build(FinetunedConfig, {"task": task})
    again = build(EvaluateConfig, inherited(config), {"task": {"kind": "retrieval", "folds": 3}}).task
    assert (again.k, again.folds, again.weight_data, again.weight_where) == (20, 3, None, {})
    [note] = settings_note(again, config)
    assert "folds 3 (there 2)" in note and "weight_data none (there gone.csv)" in note and "k 20" not in note
    assert "weight_where.split none (there val)" in note
    another = build(EvaluateConfig, inherited(config), {"task": {"kind": "vqa"}}).task
    assert another == build(EvaluateConfig, {"task": {"kind": "vqa"}}).task and not settings_note(another, config)
    assert "task" not in inherited(config, training=True).tree and "task" not in inherited(LoadedConfig()).tree


@pytest.mark.parametrize("kind", [kind for kind in slot_of(AnyTask).classes if kind])
def test_each_task_names_settings_that_it_has(kind: str) -> None:
    cls = slot_of(AnyTask).classes[kind]
    assert issubclass(cls, TaskConfig) and set(cls.of_data) <= set(cls.model_fields)
