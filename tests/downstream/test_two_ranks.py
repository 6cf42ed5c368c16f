"""Every task evaluated by two processes equals one: metrics, floors, predictions in order, what could not be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import toys

from downstream import AnyTask
from downstream.evaluate import EvaluateConfig, evaluate
from downstream.finetune_config import FinetuneConfig, checkpoint_layer
from downstream.task import Result
from vlp.checkpoint.load import load
from vlp.config import build
from vlp.data.reader import open_reader
from vlp.run import assemble

COLORS = list(toys.COLORS)
BOXES = [[0, 0, 8, 16], [8, 0, 8, 16]]
SENTENCES = ["what color is it", "the red one is awful", "ein blue square", "a plain red square"]
SETTINGS: dict[str, dict[str, Any]] = {
    "retrieval": {"weight": 0.5, "folds": 2, "pairs": 3, "k": 10},
    "captioning": {"generation": {"max_length": 6}},
    "translation": {"generation": {"max_length": 6}},
    "zero_shot": {"templates": ["a {}"]},
}
"""Of tasks whose defaults are not small."""


def row(kind: str, n: int) -> dict[str, Any]:
    """Row ``n`` of a table of this task, without its image."""
    color, other = COLORS[n % 4], COLORS[(n + 1) % 4]
    return {
        "retrieval": {"caption": [f"a {color} square", f"it is {color}"]},
        "captioning": {"caption": f"a {color} square"},
        "vqa": {"question": "what color is it", "answer": color, "question_id": n},
        "zero_shot": {"label": color},
        "linear_probe": {"label": color},
        "nlvr2": {
            "sentence": f"the left one is {color}",
            "label": ("True", "False")[n % 2],
            "identifier": f"a-{n}-0-0",
        },
        "snli_ve": {"sentence": color, "label": ("entailment", "neutral", "contradiction")[n % 3], "pair_id": str(n)},
        "referring": {"text": f"the {color} one", "box": BOXES[n % 2], "boxes": BOXES, "width": 16, "height": 16},
        "dialogue": {"question": "what color is it", "options": [color, other], "answer_index": 0, "history": []}
        | {"round_id": 1, "image_id": n, "caption": "a square"},
        "translation": {"source": f"a {color} square", "target": [f"ein {color} square"]},
        "vcr": {
            "question": "what color is it",
            "choices": COLORS,
            "label": n % 4,
            "part": "answer",
            "annot_id": str(n),
        },
        "sentiment": {"text": f"the {color} one is awful", "label": n - 3.0},
    }[kind]


def table(folder: Path, kind: str) -> Path:
    """Seven samples, which two ranks cannot share evenly, and one whose image cannot be read."""
    rows = []
    for n in range(8):
        image = f"{n}.png"
        names = ("left", "right") if kind == "nlvr2" else ("image",)
        rows.append({**dict.fromkeys(names, image if n != 3 else "torn.png"), **row(kind, n)})
    return toys.write_table(folder / f"{kind}.jsonl", rows)


KINDS = sorted(get_args(config.model_fields["kind"].annotation)[0] for config in get_args(get_args(AnyTask)[0]))


def scored(folder: str) -> dict[str, Result]:
    """Each task on its table, by the checkpoint where it can, else with new heads of it."""
    loaded, results = load(f"{folder}/checkpoint"), {}
    for kind in KINDS:
        path = f"{folder}/{kind}.jsonl"
        settings = {
            "task": {"kind": kind, "batch": 2, **SETTINGS.get(kind, {})},
            "data": {"train": path, "val": path, "workers": 0},
        }
        run = build(FinetuneConfig, checkpoint_layer(loaded.config), settings | {"init": "toy"})
        task, data = run.task, run.task.settings(run.data)
        reader = open_reader(path, image=data.image, text=data.text)
        survey = task.survey(reader, data)
        if task.lacks(loaded.model) is None:
            run = run.model_copy(update={"objectives": dict(loaded.config.objectives)})
        else:
            run = task.adapt(run.model_copy(update={"data": data}), loaded.config.objectives, survey)
        run = run.model_copy(update={"data": data})
        parts = assemble(run, tokenizer=loaded.tokenizer, pretrained=False)
        results[kind] = task.evaluate(parts, reader, survey)
    return results


def written(folder: str, name: str) -> None:
    """A retrieval through ``evaluate``, which writes files."""
    loaded, path = load(f"{folder}/checkpoint"), f"{folder}/retrieval.jsonl"
    data = loaded.config.data.model_dump() | {"train": path, "val": path, "text": None}
    task = {"kind": "retrieval", "weight": 0.5, "folds": 7}
    run = build(EvaluateConfig, {"task": task, "checkpoint": "toy", "data": data})
    evaluate(run, loaded, Path(folder) / name, command="test")


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        written(folder, "two")
        torch.save(scored(folder), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, list[dict[str, Result]]]:
    """What both ranks found, and one process alone."""
    folder = tmp_path_factory.mktemp("ranks")
    for n in range(8):
        toys.picture(folder / f"{n}.png", COLORS[n % 4], seed=n)
    (folder / "torn.png").write_bytes(b"no image")
    for kind in KINDS:
        table(folder, kind)
    toys.checkpoint(folder, ("itc", "itm", "lm"), SENTENCES)
    mp.spawn(work, (str(folder),), nprocs=2)
    written(str(folder), "one")
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)] + [scored(str(folder))]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_evaluate_as_one(results, kind):
    first, second, one = (found[kind] for found in results[1])
    assert first == second, "every rank has the whole result"
    assert one.metrics == pytest.approx(first.metrics, abs=1e-4)
    assert one.floors.keys() == first.floors.keys()
    for name, floor in one.floors.items():
        assert floor == pytest.approx(first.floors[name], abs=1e-4), name
    assert len(one.predictions) >= 7
    assert [row["key"] for row in one.predictions] == [row["key"] for row in first.predictions]
    assert list(one.bad) == list(first.bad) and len(one.bad) == 1
    assert (one.notes, one.counts) == (first.notes, first.counts)


def test_the_result_file_says_what_was_scored(results):
    folder, _ = results
    one, two = (json.loads((folder / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["metrics"] == pytest.approx(two["metrics"], abs=1e-4)
    same = ("floors", "counts", "bad", "split", "checkpoint", "data", "versions", "settings", "notes")
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    rows = [(folder / name / "predictions.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(row)["key"] for row in rows[0]] == [json.loads(row)["key"] for row in rows[1]]
    assert one["counts"] == {"samples": 21, "images": 7, "texts": 14, "bad": 1}
    assert one["split"] == "retrieval.jsonl" and len(one["data"]["fingerprint"]) >= 8
    assert len(one["checkpoint"]["sha256"]) == 64 and one["floors"]["chance"]["t2i/R@1"] == pytest.approx(1 / 7)
    assert one["metrics"]["7 folds/t2i/R@1"] == 1.0  # of one image each
    assert {"torch", "timm", "tokenizers", "pillow", "numpy"} <= set(one["versions"])
