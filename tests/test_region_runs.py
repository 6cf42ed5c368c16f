"""Recipes of region models, shrunk, as whole runs: from a detector's arrays to a checkpoint that loads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_recipes import resolved

import vlp
from vlp.data.shards import write_shards
from vlp.pretrain import pretrain
from vlp.run import RunConfig, settle
from vlp.show import show
from vlp.shrink import shrink
from vlp.train.log import read_metrics

SAMPLES = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator, samples = np.random.default_rng(0), []
    for number in range(SAMPLES):
        count = 4 + number % 6
        low = generator.uniform(0, 50, (count, 2))
        found = {
            "features": generator.normal(size=(count, 2048)).astype(np.float16),
            "boxes": np.concatenate([low, low + 40], 1),
            "width": 100,
            "height": 90,
            "objects": generator.integers(0, 1600, count),
            "attributes": generator.integers(0, 400, count),
            "confidence": generator.random(count),
            "attributes_confidence": generator.random(count),
            "classes": generator.dirichlet(np.ones(1601), count).astype(np.float16),
        }
        file = io.BytesIO()
        np.savez(file, **found)
        texts = [f"a dog of number {number}", f"number {number} again"]
        spans = {"spans": [[[2, 5, "object"], [6, 8, "relation"]], []]}
        samples.append(
            {
                "__key__": f"{number:02d}",
                "npz": file.getvalue(),
                "json": {"captions": texts, "tags": "dog cat", **spans},
            }
        )
    folder = tmp_path_factory.mktemp("regions")
    (folder / "texts.txt").write_text("".join(f"words of line {number} alone\n" for number in range(SAMPLES)))
    return write_shards(samples, str(folder / "%02d.tar"))[0]


def small(recipe: str, shards: str) -> RunConfig:
    run = shrink(resolved(f"pretrain/{recipe}"))
    tokenizer = type(run.data.tokenizer)(size=64, min_frequency=1)
    texts = str(Path(shards).with_name("texts.txt"))
    sources = {name: one.model_copy(update={"train": texts}) for name, one in run.data.sources.items()}
    own = {"train": shards, "workers": 0, "tokenizer": tokenizer, "sources": sources}
    data = run.data.model_copy(update=own)
    optim = run.train.optim.model_copy(update={"warmup": 0, "lr": 1e-3})
    train = {"samples": 32, "global_batch": 8, "micro_batch": 8, "log_every": 1, "optim": optim}
    return settle(run.model_copy(update={"data": data, "train": run.train.model_copy(update=train)}))


@pytest.mark.parametrize(
    "recipe",
    [
        "visualbert",
        "vilbert",
        "lxmert",
        "uniter_base",
        "villa",
        "imagebert",
        "vlp_unified",
        "oscar",
        "vinvl",
        "interbert",
        "vl_bert",
        "ernie_vil",
        "xgpt",
    ],
)
def test_a_run(recipe: str, shards: str, tmp_path: Path) -> None:
    run = small(recipe, shards)
    found = pretrain(run, tmp_path / "run", torch.device("cpu"))
    assert found.finished and found.seen == 32
    records: list[dict[str, Any]] = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 4 and all(np.isfinite(record["loss"]) for record in records)
    named = {name.split("/")[0] for record in records for name in record if name.endswith("/loss")}
    if run.train.sample:
        groups = [set(group.split("+")) for group in run.train.sample]
        steps = [{n.split("/")[0] for n in record if n.endswith("/loss")} for record in records]
        assert all(step in groups for step in steps)
    else:
        assert named == set(run.objectives)
    loaded = vlp.load(found.checkpoint)
    assert loaded.model.config.vision.kind == "region"
    if recipe == "oscar":
        ids, _ = loaded.tokenizer.encode("cat", 8)
        assert len(ids) == 3, "the tags' words are words of the tokenizer"


def test_show_says_what_share_of_the_steps_trains_what() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show(shrink(resolved("pretrain/vlp_unified"))))
    assert "mlm in 25 %, seq2seq_mlm in 75 % of the steps" in console.export_text()
