"""NLVR2 on what a detector saw of both images (UNITER's data), from one's own table."""

from __future__ import annotations

import numpy as np
import torch
import toys
from helpers import SIZES

import vlp
from downstream.evaluate import open_data, parts_of
from downstream.finetune import finetune, finetune_config
from downstream.nlvr2 import Nlvr2Config
from downstream.task import evaluating
from vlp.data.batch import Example, collate
from vlp.data.loader import DataConfig
from vlp.data.regions import RegionLayout, read_regions


def arrays(folder, name: str, seed: int, width: int = 8) -> str:
    draw = np.random.default_rng(seed)
    boxes = draw.random((3, 4)) * 9
    np.savez(folder / name, features=draw.random((3, width)), boxes=boxes, width=9, height=9)
    return name


def test_two_images_are_read_as_two_sets_of_regions(tmp_path):
    """Verdicts are those of both sets in their columns' order; a row that lacks one is named."""
    rows = [
        {"left": arrays(tmp_path, f"l{n}.npz", n), "right": arrays(tmp_path, f"r{n}.npz", 100 + n)}
        | {"sentence": "it is red", "label": str(n % 2 == 0), "identifier": f"dev-{n}-0-0"}
        for n in range(8)
    ]
    train = toys.write_table(tmp_path / "train.jsonl", rows)
    gone = rows[0] | {"right": "gone.npz"}
    other = rows[1] | {"right": arrays(tmp_path, "wide.npz", 9, width=9)}
    dev = toys.write_table(tmp_path / "dev.jsonl", [*rows, gone, other])
    vision = {"kind": "region", "features": 8, "width": 32, "number": 4}
    fusion = {**SIZES, "kind": "single_stream"}
    loaded = vlp.load(toys.checkpoint(tmp_path, {"itm": {}}, ["it is red"], vision=vision, fusion=fusion))
    settings = {
        "task": {"kind": "nlvr2"},
        "data": {"train": str(train), "val": str(dev), "workers": 0, "bad_samples": 0.5},
        "train": {"samples": 16, "global_batch": 8, "optim": {"lr": 1e-3}},
        "tune": {"probe": None},
    }
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", torch.device("cpu"))
    assert done.after is not None and done.after.bad.keys() == {"8", "9"} and len(done.after.predictions) == 8

    model, task = (found := vlp.load(tmp_path / "run")).model, Nlvr2Config()
    data = task.settings(DataConfig(val=str(train)))
    result = task.evaluate(parts_of(found, data), open_data(data, "val"))
    layout = RegionLayout(7, 4)
    for row, stored in zip(result.predictions, rows, strict=True):
        sides = (
            read_regions("", {"npz": (tmp_path / stored[side]).read_bytes()}, layout) for side in ("left", "right")
        )
        one, two = sides
        example = Example("", (), "it is red", regions=one, more_regions=(two,))
        batch = collate([example], [0], found.tokenizer, {}, data.max_length, 0, regions=layout)
        assert batch.image_of_text is not None and batch.image_of_text.tolist() == [[0, 1]] and batch.num_images == 2
        with evaluating(model):
            wanted = task.judge(model, batch)[0]
        assert torch.allclose(torch.tensor(list(row["probabilities"].values())), wanted, atol=1e-5)
        assert row["identifier"] == stored["identifier"]
