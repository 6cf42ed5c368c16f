"""Referring expressions on pairs of emoji: boxes written by the model, and regions matched by it."""

import json
from pathlib import Path

import emojis
import numpy as np
import pytest
import torch
import toys
from emoji_pictures import COLORS, PIXELS, SHAPES, styles
from helpers import SIZES
from PIL import Image

import vlp
from downstream.evaluate import EvaluateConfig, parts_of, predict
from downstream.finetune import finetune, finetune_config
from downstream.referring import ReferringConfig
from downstream.regions import cut, read_truth
from encoders.types import Batch, Regions, Texts
from objectives.base import Fuse
from vlp.config import build
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Sample, open_reader
from vlp.data.regions import geometry
from vlp.data.transforms import ImageTransformConfig
from vlp.run import RunConfig

SENTENCES = [f"the {color} {shape} left right" for color in COLORS for shape in SHAPES]
HALVES = [[0, 0, PIXELS, PIXELS], [PIXELS, 0, PIXELS, PIXELS]]


def table(folder: Path, name: str, number: int, **more) -> Path:
    """Two emoji of two colours; the text names one of them."""
    draw, rows = np.random.default_rng(number), []
    for i in range(number):
        first, second = (COLORS[int(k)] for k in draw.permutation(4)[:2])
        style = styles(name == "test")[i % len(styles(name == "test"))]
        shape, asked = SHAPES[int(draw.integers(3))], int(draw.integers(2))
        image = emojis.side_by_side(folder, style, (shape, first), (shape, second))
        row = {"image": image, "text": f"the {(first, second)[asked]} {shape}", "box": HALVES[asked]}
        row |= {"width": 2 * PIXELS, "height": PIXELS, "boxes": HALVES, "split": ("testA", "testB")[i % 2], "ref_id": i}
        rows.append(row | more)
    return toys.write_table(folder / f"{name}.jsonl", rows)


def sample(images=(), **fields) -> Sample:
    return Sample("7", images, ("it",), fields)


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory):
    model = {
        "vision": {
            "model": "vit_tiny_patch16_224",
            "image_size": PIXELS,
            "patch_size": 8,
            "width": 32,
            "heads": 4,
            "depth": 1,
        },
        "text": {**SIZES, "layers": 1, "max_length": 24},
        "fusion": {**SIZES, "layers": 1},
    }
    return emojis.checkpoint(tmp_path_factory.mktemp("model"), SENTENCES, ("itc", "itm"), **model)


def test_truth_is_read_in_every_form():
    size = {"width": 40, "height": 20}
    found = read_truth(sample(box="[10, 5, 20, 10]", boxes="[[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]]", **size))
    assert found.box == (10, 5, 20, 10) and found.boxes == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert found.relative() == (0.5, 0.5, 0.5, 0.5) and found.absolute(found.relative()) == found.box
    assert read_truth(sample(images=(torch.zeros(3, 20, 40),))).width == 40
    assert read_truth(sample(**size)).box is None
    for fields, message in (
        ({"box": [1, 2, 3], **size}, "is not left, top, width and height"),
        ({"box": [1, 2, 0, 4], **size}, "has no area"),
        ({"box": "nothing", **size}, "is not left, top"),
        ({"boxes": "[[1", **size}, "boxes are not JSON"),
        ({"box": [1, 2, 3, 4]}, "no width and height"),
        ({"images": (torch.zeros(3, 20, 30),), **size}, "its image is 30 x 20, but its boxes are of 40 x 20"),
    ):
        with pytest.raises(BadSample, match=message):
            read_truth(sample(**fields))


def test_boxes_move_with_nothing():
    moving = ImageTransformConfig(crop_scale=(0.5, 1.0), rotation=10, zoom=(0.8, 1.2), shift=0.1, randaugment_n=2)
    moving = moving.model_copy(update={"resize": "longest", "color_jitter": 0.1})
    found = ReferringConfig().settings(DataConfig(transform=moving)).transform
    assert found == ImageTransformConfig(flip="never", color_jitter=0.1)


def test_regions_are_cut_within_the_image():
    image = torch.arange(3 * 4 * 5).reshape(3, 4, 5)
    assert torch.equal(cut(image, [1, 0, 2, 3]), image[:, 0:3, 1:3])
    assert torch.equal(cut(image, [0.5, 0.5, 1.2, 1.2]), image[:, 0:2, 0:2])
    assert torch.equal(cut(image, [-5, -5, 100, 100]), image)
    assert cut(image, [9, 9, 3, 3]).shape == (3, 1, 1)


@pytest.mark.parametrize("score", ["itm", "itc"])
def test_regions_are_scored_as_images_of_their_own(two_towers, tmp_path, score):
    """Scores equal those of the same model on the regions saved as images; the best one's box is the answer."""
    path = table(tmp_path, "test", 6)
    task = ReferringConfig(score=score, pairs=3)
    parts = parts_of(two_towers, task.settings(two_towers.config.data))
    reader = open_reader(str(path))
    result = task.evaluate(parts, reader, task.survey(reader, parts.run.data))
    right = []
    for row, stored in zip(result.predictions, map(json.loads, path.read_text().splitlines())):
        image = Image.open(tmp_path / stored["image"])
        regions = [image.crop((x, y, x + w, y + h)) for x, y, w, h in HALVES]
        if score == "itm":
            wanted = two_towers.match(regions, [stored["text"]] * 2)
            found = torch.tensor(row["scores"]).sigmoid()
        else:
            wanted = (two_towers.embed_images(regions) @ two_towers.embed_texts([stored["text"]]).T)[:, 0]
            found = torch.tensor(row["scores"])
        assert torch.allclose(found, wanted, atol=1e-5)
        assert row["box"] == HALVES[int(wanted.argmax())] and row["ref_id"] == stored["ref_id"]
        right.append(row["box"] == stored["box"])
    assert result.metrics["accuracy"] == pytest.approx(np.mean(right))
    assert result.metrics["accuracy/testA"] == pytest.approx(np.mean(right[::2]))
    assert result.floors["chance"] == {"accuracy": 0.5} and "can score more than 1.000" in result.notes[1]
    assert set(result.floors) == {"chance", "largest region", "expression only"}


def test_boxes_are_those_that_the_head_writes(tmp_path):
    """The head's last layer is set so that it writes one box, whatever it reads."""
    loaded = emojis.checkpoint(tmp_path, SENTENCES, ("box",))
    last = [one for one in loaded.model.objectives["box"].head.modules() if isinstance(one, torch.nn.Linear)][-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([0.25, 0.5, 0.5, 0.9]).logit()
    path, task = table(tmp_path, "test", 8), ReferringConfig()
    parts = parts_of(loaded, task.settings(loaded.config.data))
    reader = open_reader(str(path))
    result = task.evaluate(parts, reader, task.survey(reader, parts.run.data))
    left = [json.loads(line)["box"] == HALVES[0] for line in path.read_text().splitlines()]
    for row, is_left in zip(result.predictions, left):
        assert row["box"] == pytest.approx([0, 0.05 * PIXELS, PIXELS, 0.9 * PIXELS], abs=1e-3)
        assert row["iou"] == pytest.approx(0.9 if is_left else 0.0, abs=1e-3) and row["true box"] == HALVES[not is_left]
    assert result.metrics["accuracy"] == pytest.approx(np.mean(left))
    assert result.metrics["accuracy/testB"] == pytest.approx(np.mean(left[1::2]))
    assert result.metrics["mean IoU"] == pytest.approx(0.9 * np.mean(left), abs=1e-3)
    assert result.floors["whole image"]["accuracy"] == 1.0, "half of an image overlaps with the whole by half"
    assert set(result.floors) == {"whole image", "expression only"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["text"] = [rows[0]["text"], rows[1]["text"]]
    several = task.evaluate(parts, open_reader(str(toys.write_table(tmp_path / "several.jsonl", rows))))
    assert [row["key"] for row in several.predictions] == ["0/0", "0/1", *map(str, range(1, 8))]
    assert [row["text"] for row in several.predictions[:2]] == rows[0]["text"], "each expression is asked"


def test_finetuning_learns_boxes(tmp_path):
    """From a checkpoint without a box head, on texts that say where."""
    loaded = emojis.checkpoint(tmp_path, SENTENCES, ("itm", "mlm"))
    rows = [json.loads(line) for line in table(tmp_path, "train", 8).read_text().splitlines()]
    rows = [row | {"text": "the left" if row["box"] == HALVES[0] else "the right"} for row in rows]
    data = {"train": str(toys.write_table(tmp_path / "said.jsonl", rows)), "workers": 0}
    data["val"] = data["train"]
    settings = {"task": {"kind": "referring"}, "data": data, "train": {**emojis.TRAIN, "samples": 2000}, **emojis.QUIET}
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", torch.device("cpu"))
    assert done.after.metrics["accuracy"] == 1.0 and done.after.metrics["mean IoU"] > 0.6
    mine = EvaluateConfig(task=ReferringConfig(), data=build(DataConfig, {"val": data["val"], "max_length": 24}))
    assert predict(mine, vlp.load(tmp_path / "run"), tmp_path / "out.jsonl") == 8
    found = [json.loads(line)["box"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert np.allclose(found, [row["box"] for row in done.after.predictions], atol=1e-3)


def test_training_examples_hold_relative_boxes():
    prepare = ReferringConfig().prepare(build(RunConfig, {}))
    fields = {"width": 40, "height": 20, "box": [10, 5, 20, 10]}
    example = prepare(sample((torch.zeros(3, 16, 16),), **fields), np.random.default_rng(0))
    assert example.targets["box"].tolist() == [0.5, 0.5, 0.5, 0.5] and example.text == "it"
    with pytest.raises(BadSample, match="no width and height"):
        prepare(sample((torch.zeros(3, 16, 16),), box=[10, 5, 20, 10]), np.random.default_rng(0))


def test_what_lacks_is_named(two_towers, tmp_path):
    assert ReferringConfig().lacks(two_towers.model) is None
    assert ReferringConfig(by="box").lacks(two_towers.model) == "a box head (objective box)"
    task, path = ReferringConfig(), table(tmp_path, "test", 4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0].pop("boxes"), rows[1].pop("box")
    parts = parts_of(two_towers, task.settings(two_towers.config.data))
    result = task.evaluate(parts, open_reader(str(toys.write_table(path, rows))))
    assert result.bad == {
        "0": "no boxes to choose from; name the field with --task.boxes",
        "1": "no box; name its field with --task.box",
    }
    with pytest.raises(ValueError, match="lacks a box head"):
        ReferringConfig(by="box").evaluate(parts, open_reader(str(path)))


def test_a_model_of_regions_chooses_among_the_detectors(tmp_path):
    """Every region's score is that of a pair with this region alone; its box is the detector's."""
    vision = {"kind": "region", "features": 8, "width": 32, "number": 4}
    loaded = emojis.checkpoint(tmp_path, SENTENCES, ("itm", "mlm"), vision=vision)
    draw, rows, stored = np.random.default_rng(0), [], []
    for i in range(2):
        low = draw.uniform(0, 50, (3, 2))
        boxes = np.concatenate([low, low + 40], 1).astype(np.float32)
        stored.append({"features": draw.normal(size=(3, 8)).astype(np.float32), "boxes": boxes})
        np.savez(tmp_path / f"{i}.npz", width=100, height=100, **stored[-1])
        for text in SENTENCES[i : i + 2]:
            box = [*map(float, low[i]), 40.0, 40.0]
            rows.append({"features": f"{i}.npz", "text": text, "box": box, "width": 100, "height": 100})
    (tmp_path / "2.npz").write_bytes(b"broken")
    rows.append(rows[0] | {"features": "2.npz"})
    task, path = ReferringConfig(pairs=3), toys.write_table(tmp_path / "t.jsonl", rows)
    result = task.evaluate(parts_of(loaded, task.settings(loaded.config.data)), open_reader(str(path)))
    assert list(result.bad) == ["4"] and "cannot be read" in result.bad["4"]
    head, words = loaded.model.objectives["itm"], loaded.tokenizer
    for i, row in enumerate(result.predictions):
        arrays = stored[i // 2]
        whole = geometry(arrays["boxes"] / 100, 7)
        ids = words.encode(rows[i]["text"], 24)[0]
        texts = Texts(torch.from_numpy(ids)[None], torch.ones(1, len(ids), dtype=torch.bool))
        for n, score in enumerate(row["scores"]):
            one = Regions(torch.tensor(arrays["features"][None, n : n + 1]), torch.tensor(whole[None, n : n + 1]))
            with torch.no_grad():
                fused = loaded.model.run([Fuse()], Batch({"clean": one}, {"clean": texts}))[Fuse()]
                assert head.score(fused.pooled).item() == pytest.approx(score, abs=1e-5)
        best = int(np.argmax(row["scores"]))
        left, top, right, bottom = arrays["boxes"][best]
        assert row["box"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-3)
        assert row["metrics"]["accuracy"] == float(best == i // 2)
