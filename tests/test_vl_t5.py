"""The recipe of VL-T5, shrunk, as a whole run: three tasks in words, from arrays to a checkpoint that answers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from test_recipes import resolved

import vlp
from objectives.base import Fuse
from vlp.data.batch import Example, collate
from vlp.data.regions import RegionLayout, read_regions
from vlp.data.shards import write_shards
from vlp.generate import GenerationConfig, generate_text
from vlp.passes import memory_of
from vlp.pretrain import pretrain
from vlp.run import settle
from vlp.shrink import shrink
from vlp.train.log import read_metrics

SAMPLES = 12


def regions(number: int) -> bytes:
    """Arrays of one picture."""
    generator = np.random.default_rng(number)
    low = generator.uniform(0, 50, (4, 2))
    file = io.BytesIO()
    features = generator.normal(size=(4, 2048)).astype(np.float16)
    np.savez(file, features=features, boxes=np.concatenate([low, low + 40], 1), width=100, height=90)
    return file.getvalue()


def test_a_run(tmp_path: Path) -> None:
    said = [
        {"captions": [f"a dog of number {n}"], "question": f"is it number {n}", "answers": {"yes": 0.9, "no": 0.3}}
        for n in range(SAMPLES)
    ]
    samples = [{"__key__": f"{n:02d}", "npz": regions(n), "json": one} for n, one in enumerate(said)]
    shards = write_shards(samples, str(tmp_path / "%02d.tar"))[0]
    run = shrink(resolved("pretrain/vl_t5"))
    sources = {name: one.model_copy(update={"train": shards}) for name, one in run.data.sources.items()}
    data = run.data.model_copy(update={"train": shards, "workers": 0, "sources": sources})
    optim = run.train.optim.model_copy(update={"warmup": 0})
    train = run.train.model_copy(update={"samples": 24, "log_every": 1, "optim": optim})
    found = pretrain(
        settle(run.model_copy(update={"data": data, "train": train})), tmp_path / "run", torch.device("cpu")
    )
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 2 and all(np.isfinite(record["loss"]) for record in records)
    named = {name.split("/")[0] for record in records for name in record if name.endswith("/loss")}
    assert named == {"span_corruption", "vqa", "match"}
    loaded = vlp.load(found.checkpoint)
    words = loaded.tokenizer.vocabulary
    assert len(words.sentinels) == 16
    layout = RegionLayout(boxes=4, number=9)
    example = Example("0", (), "is it number 3", prefix="vqa:", regions=read_regions("0", {"npz": regions(3)}, layout))
    batch = collate([example], [0], loaded.tokenizer, {}, 20, 0, regions=layout)
    with torch.no_grad():
        memory = memory_of(loaded.model.run([Fuse()], batch)[Fuse()], "both")
    assert memory.states.shape[1] == 8 + batch.texts["clean"].ids.shape[1]
    settings = GenerationConfig(max_length=6)
    written, _ = generate_text(loaded.model.eval(), memory, words, settings, objective="vqa")
    assert written[0][0] == words.bos and 2 <= len(written[0]) <= 6
