"""The nearest-neighbour floor of captioning: by pixels and by embeddings."""

from __future__ import annotations

import pytest
import torch
import toys

from downstream.captioning import CaptioningConfig
from downstream.evaluate import parts_of
from downstream.metrics.captioning import caption_metrics
from downstream.nearest import by_embedding, by_pixels, nearest_captions
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
