"""Retrieval by models of a detector's regions, and by models without embeddings: what cannot be read is left out."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import toys
from helpers import SIZES

import vlp
from downstream.check import check, has_text
from downstream.evaluate import parts_of
from downstream.retrieval import ITM, RetrievalConfig
from downstream.task import batches, evaluating, seen_samples
from objectives.base import Fuse
from vlp.data.loader import DataConfig
from vlp.data.reader import open_reader
from vlp.data.shards import write_shards

TOLD = ["a red square", "a blue square", "it is red", "it is blue"]


def regions(tmp_path) -> str:
    """Four images as regions with a caption each, one whose arrays are torn and one of another detector's width."""
    draw, samples = np.random.default_rng(0), []
    for number, text in enumerate([*TOLD, "a red square", "it is red"]):
        file = io.BytesIO()
        np.savez(file, features=draw.random((3, 9 if number == 5 else 8)), boxes=draw.random((3, 4)), width=9, height=9)
        content = b"torn" if number == 4 else file.getvalue()
        samples.append({"__key__": f"{number}", "npz": content, "txt": text})
    return write_shards(samples, str(tmp_path / "%02d.tar"))[0]


@pytest.fixture
def loaded(tmp_path):
    vision = {"kind": "region", "features": 8, "width": 32, "number": 4}
    fusion = {**SIZES, "kind": "single_stream"}
    return vlp.load(toys.checkpoint(tmp_path, {"itm": {}}, TOLD, vision=vision, fusion=fusion))


def test_regions_are_searched_and_what_is_broken_is_named(tmp_path, loaded):
    """Matching logits equal those of the model on each pair by itself."""
    reader, data = open_reader(regions(tmp_path)), DataConfig()
    parts = parts_of(loaded, data)
    result = RetrievalConfig(pairs=5, batch=2).evaluate(parts, reader)
    assert sorted(result.bad) == ["4", "5"] and "9 wide, the model reads 8" in result.bad["5"]
    assert result.counts == {"images": 4, "texts": 4} and f"{ITM}/t2i/R@1" in result.metrics
    head, known = loaded.model.objectives["itm"], list(seen_samples(parts, reader, {}))
    [first] = [row for row in result.predictions if row["key"] == "i2t/0"]
    for text, score in zip(first["found"], first["scores"], strict=True):
        [(_, batch)] = batches(parts, iter([known[TOLD.index(text)]]), 1)
        [(_, own)] = batches(parts, iter([known[0]]), 1)
        with evaluating(loaded.model):
            pair = type(batch)(images=own.images, texts=batch.texts)
            wanted = head.log_odds(loaded.model.run([Fuse()], pair)[Fuse()].pooled)
        torch.testing.assert_close(torch.tensor([score]), wanted.float().cpu(), atol=1e-4, rtol=1e-4)


def test_regions_are_looked_at(tmp_path):
    found = check("train", open_reader(regions(tmp_path)), DataConfig(), usable=has_text)
    assert [(one.keys, one.kind) for one in found.broken] == [(("4",), "unreadable regions")]


def test_a_torn_image_leaves_a_gallery_that_nothing_embeds(tmp_path):
    """ViLT: all pairs are matched, and no embedding has shown before what can be read."""
    loaded = vlp.load(toys.checkpoint(tmp_path, {"itm": {}}))
    rows = [{"image": toys.picture(tmp_path / f"{name}.png", name), "caption": name} for name in toys.COLORS]
    (tmp_path / "red.png").write_bytes(b"torn")
    reader = open_reader(str(toys.write_table(tmp_path / "t.csv", rows)))
    result = RetrievalConfig().evaluate(parts_of(loaded, DataConfig()), reader)
    assert list(result.bad) == ["red.png"] and result.counts == {"images": 3, "texts": 3}
