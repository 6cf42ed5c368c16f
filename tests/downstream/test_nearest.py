"""The nearest-neighbour floor of captioning: by pixels, by embeddings, over two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import toys

from downstream.captioning import CaptioningConfig
from downstream.evaluate import EvaluateConfig, evaluate, parts_of
from downstream.metrics.captioning import caption_metrics
from downstream.nearest import by_embedding, by_pixels, nearest_captions
from downstream.retrieval import RetrievalConfig
from downstream.task import read_samples
from vlp.checkpoint.load import load
from vlp.config import build
from vlp.data.reader import open_reader

CPU = torch.device("cpu")


def tables(folder):
    """Eight captioned images, and three others of which one cannot be read."""
    train = toys.caption_table(folder)
    seen = [("red", "striped"), ("blue", "plain"), ("green", "plain")]
    rows = [
        {"image": toys.picture(folder / f"test{n}.png", c, f, seed=9), "caption": f"{c} {f}"}
        for n, (c, f) in enumerate(seen)
    ]
    (folder / "torn.png").write_bytes(b"no image")
    return train, toys.write_table(folder / "test.csv", [*rows, {"image": "torn.png", "caption": "torn"}])


def test_the_nearest_image_by_pixels_and_by_embedding(tmp_path):
    train, test = tables(tmp_path)
    loaded = load(toys.checkpoint(tmp_path, ("itc", "itm", "lm")))
    task = build(CaptioningConfig, {"neighbours_by": str(tmp_path / "checkpoint")})
    data, reader = loaded.config.data, open_reader(str(test))
    survey = task.survey(open_reader(str(train)), data)
    assert len(survey.images.captions) == 8 and len(survey.images.some(3).captions) == 3
    result = task.evaluate(parts_of(loaded, data), reader, survey)
    found = survey.nearest["pixels", reader.fingerprint]
    assert list(found.values()) == ["a striped red square", "a plain blue square", "a plain green square"]
    references = {row["image"]: row["references"] for row in result.predictions}
    expected = caption_metrics(found, references) | {"exact match": 0.0}
    assert result.floors["nearest image"] == pytest.approx(expected)
    assert set(result.floors) == {"most frequent caption", "nearest image", "nearest embedding"}
    assert result.metrics["CIDEr-D"] == pytest.approx(
        sum(row["metrics"]["CIDEr-D"] for row in result.predictions) / len(result.predictions)
    )
    # an image is nearest to itself
    describe = by_embedding(str(tmp_path / "checkpoint"), data, CPU)
    itself = nearest_captions(describe, survey.images, survey.images.reader, data, range(8))
    assert list(itself.values()) == list(survey.images.captions.values())
    none = task.model_copy(update={"neighbours": 0}).evaluate(parts_of(loaded, data), reader, survey)
    assert set(none.floors) == {"most frequent caption"}


def test_thumbnails_leave_brightness_and_contrast_out(tmp_path):
    _, test = tables(tmp_path)
    loaded = load(toys.checkpoint(tmp_path))
    with pytest.raises(ValueError, match="has no contrastive embeddings"):
        by_embedding(str(toys.checkpoint(tmp_path, ("itm",))), loaded.config.data, CPU)
    samples = list(read_samples(open_reader(str(test)), loaded.config.data, {}))
    vectors = by_pixels(loaded.config.data)(samples)
    assert vectors.shape == (3, 3 * 16 * 16)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(vectors.mean(dim=1), torch.zeros(3), atol=1e-6, rtol=0)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        scored(folder, "two")
    finally:
        dist.destroy_process_group()


def scored(folder: str, name: str) -> None:
    """Both tasks through ``evaluate``, with floors, an image that cannot be read, and files written by rank 0."""
    loaded = load(f"{folder}/checkpoint")
    data = loaded.config.data.model_dump() | {"train": f"{folder}/captions.csv", "val": f"{folder}/test.csv"}
    for task in (
        CaptioningConfig(batch=2),
        build(RetrievalConfig, {"folds": 3, "weight": 0.5, "pairs": 3, "batch": 2}),
    ):
        run = build(EvaluateConfig, {"task": task.model_dump(), "checkpoint": "toy", "data": data})
        evaluate(run, loaded, Path(folder) / name / task.kind, command="test")


def test_two_ranks_evaluate_as_one(tmp_path):
    tables(tmp_path)
    toys.checkpoint(tmp_path, ("itc", "itm", "lm"))
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    scored(str(tmp_path), "one")
    for kind in ("captioning", "retrieval"):
        one, two = (json.loads((tmp_path / name / kind / "result.json").read_text()) for name in ("one", "two"))
        assert one["metrics"] == pytest.approx(two["metrics"], abs=1e-4)
        assert {k: one[k] for k in ("floors", "counts", "bad", "split", "checkpoint", "data")} == {
            k: two[k] for k in ("floors", "counts", "bad", "split", "checkpoint", "data")
        }
        rows = [(tmp_path / name / kind / "predictions.jsonl").read_text().splitlines() for name in ("one", "two")]
        assert [json.loads(row)["key"] for row in rows[0]] == [json.loads(row)["key"] for row in rows[1]]
    assert one["counts"] == {"samples": 6, "images": 3, "texts": 3, "bad": 1}
    assert "3 folds/ITC/t2i/R@1" in one["metrics"] and one["metrics"]["3 folds/t2i/R@1"] == 1.0  # of one image each
    assert one["split"] == "test.csv" and len(one["data"]["fingerprint"]) > 8 and len(one["checkpoint"]["sha256"]) == 64
    assert {"torch", "timm", "tokenizers", "pillow", "numpy"} <= set(one["versions"])
