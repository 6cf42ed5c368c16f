"""The command line as two gloo ranks: tasks are finetuned and scored as by one process, and go on after a signal.

Every rank that does not end is killed with its loader workers (``end_both``), so that nothing here can hang the suite.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import BATCH, WORDS, Run, both, checkpoints, end_both, weights

from downstream.evaluate import EvaluateConfig, evaluate
from downstream.gallery import FEW
from vlp.checkpoint.load import load
from vlp.checkpoint.native import save_checkpoint
from vlp.config import build
from vlp.config import load as load_config
from vlp.run import RunConfig, assemble

SMALL = {
    "retrieval": {"task.k": 10, "task.weight": 0.5, "task.folds": 2, "task.batch": 2},
    "captioning": {"task.generation.method": "greedy", "task.generation.max-length": 6},
    "vqa": {},
    "nlvr2": {},
}
TIMEOUT = 120
TRAIN = {"train.samples": 8 * BATCH, "train.global-batch": BATCH, "train.log-every": 1, "train.save-every": 3 * BATCH}
TUNE = {"tune.every": 4 * BATCH, "tune.patience": 9, "tune.probe": "none"}


def row(kind: str, n: int) -> dict[str, Any]:
    """Row ``n`` of a task's table; its image is ``runs.write_data``'s."""
    image, word = f"{n}.png", WORDS[n % 4]
    return {
        "retrieval": {"image": image, "caption": [f"a {word} dog {n}", f"the {word} cat"]},
        "captioning": {"image": image, "caption": f"a {word} dog"},
        "vqa": {"image": image, "question": f"a {word} dog", "answer": WORDS[n % 3]},
        "nlvr2": {
            "left": image,
            "right": f"{(n + 1) % 20}.png",
            "sentence": f"a {word} dog",
            "identifier": f"a-{n}-0-0",
        }
        | {"label": ("True", "False")[n % 2]},
    }[kind]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny untrained checkpoint, and of each task 13 samples to train on and 7, which two ranks cannot halve."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe = runs.write_recipe(folder / "tiny.yaml", runs.write_data(folder))
    parts = assemble(load_config(RunConfig, recipe), pretrained=False)
    save_checkpoint(folder / "checkpoint", parts.model, parts.run, parts.tokenizer, "# tiny")
    for kind in SMALL:
        for name, numbers in (("train", range(13)), ("val", range(13, 20))):
            lines = [json.dumps(row(kind, n)) for n in numbers]
            (folder / f"{kind}_{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def begin(place: Path, kind: str, folder: Path, **settings: Any) -> list[Run]:
    """Start two ranks of a finetuning."""
    data = [place / f"{kind}_{name}.jsonl" for name in ("train", "val")]
    command = ("finetune", kind, "--init", place / "checkpoint", "--out", folder, "--data", *data, "--device", "cpu")
    return both(runs.start, folder, *command, *flags({**TRAIN, **TUNE, **SMALL[kind], **settings}))


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def ended(ranks: list[Run]) -> list[str]:
    """What each rank said; both must have done well, and the second one holds its tongue."""
    assert end_both(ranks, TIMEOUT) == [0, 0], "".join(run.said() for run in ranks)
    said = [run.said() for run in ranks]
    assert said[1] == "" and "Warning" not in said[0] and "Traceback" not in said[0]
    return said


def assert_as_one(folder: Path, checkpoint: Path, val: Path) -> None:
    """The result in ``folder`` is what one process without workers finds, by the same task's settings."""
    found, loaded = json.loads((folder / "result.json").read_text()), load(checkpoint)
    data = loaded.config.data.model_dump() | {"train": None, "val": str(val), "split": None, "hash": None, "text": None}
    tree = {"task": found["settings"], "checkpoint": str(checkpoint), "data": data | {"workers": 0}}
    one = evaluate(build(EvaluateConfig, tree), loaded, folder.with_name(f"{folder.name}-one"))
    assert found["metrics"] == pytest.approx(one.metrics, abs=1e-4)
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == found["counts"]["samples"]


@pytest.fixture(scope="module")
def finetuned(place) -> Callable[[str], tuple[Path, str]]:
    """Finetunes a task once, without workers -> the run, and what it said."""

    @cache
    def run(kind: str) -> tuple[Path, str]:
        folder = place / "runs" / kind
        folder.parent.mkdir(exist_ok=True)
        more = {"tune.probe": "emoji:fluent3d"} if kind == "vqa" else {}
        return folder, ended(begin(place, kind, folder, **{"data.workers": 0}, **more))[0]

    return run


@pytest.mark.parametrize("kind", SMALL)
def test_two_ranks_finetune_and_score_as_one(place, finetuned, kind):
    torch.set_num_threads(1)
    folder, said = finetuned(kind)
    assert said.count(f"{kind} after {8 * BATCH} samples") == 1, "one table, before and after"
    for forgetting in ("zero-shot: retrieval on emoji:fluent3d", "zero-shot t2i/R@1"):
        assert said.count(forgetting) == (kind == "vqa"), "and once what was forgotten"
    assert said.count("the best checkpoint is") == 1
    found = json.loads((folder / "result.json").read_text())
    best = (folder / "best").read_text().strip()
    assert best in [path.name for path in checkpoints(folder)] and found["checkpoint"]["source"].endswith(best)
    assert_as_one(folder, folder, place / f"{kind}_val.jsonl")


def test_evaluated_with_a_worker(place, tmp_path):
    """It is forked beside gloo's threads, to embed and again to match, as there are images enough."""
    images = place / "many"
    table = runs.write_data(images, samples=2 * FEW + 3)
    ranks = both(
        *(runs.start, tmp_path / "out", "evaluate", "retrieval", place / "checkpoint", "--out", tmp_path / "out"),
        *("--data", table, "--device", "cpu", "--data.workers=1", *flags({**SMALL["retrieval"], "task.batch": 32})),
    )
    ended(ranks)
    assert_as_one(tmp_path / "out", place / "checkpoint", table)


def test_stopped_and_resumed(place, finetuned, tmp_path):
    """With workers, which a signal to the process group reaches too; the end is that of a run left alone."""
    folder, (whole, _) = tmp_path / "run", finetuned("captioning")
    ranks = begin(place, "captioning", folder, **{"data.workers": 2})
    ranks[0].wait_for(2 * BATCH)
    for run in ranks:
        run.kill_group(signal.SIGTERM)
    said, _ = ended(ranks)
    assert said.count(f"go on with --resume {folder}") == 1
    assert int(checkpoints(folder)[-1].name) < 8 * BATCH and not (folder / "result.json").exists()
    said, _ = ended(both(runs.start, folder, "finetune", "--resume", folder, "--device", "cpu"))
    assert said.count(f"captioning after {8 * BATCH} samples") == 1 and "no longer exactly" not in said
    assert weights(folder) == weights(whole)
    results = [json.loads((one / "result.json").read_text()) for one in (whole, folder)]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["before"] == results[1]["before"]
