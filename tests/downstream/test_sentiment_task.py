"""Sentiment: numbers are read, learned from image and text, and scored beside the mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from emoji_pictures import VILT, picture, styles

import vlp
from downstream.evaluate import EvaluateConfig, predict
from downstream.finetune import finetune, finetune_config
from downstream.metrics.sentiment import sentiment_metrics
from downstream.sentiment import SentimentConfig, SentimentSurvey
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Sample, open_reader

TASK = SentimentConfig()
SAID = {"wonderful": 1.5, "fine": 0.5, "awful": -1.5}
SHOWN = {"red": 1.0, "blue": -1.0}


def table(folder: Path, name: str, number: int) -> Path:
    """What is said and what is shown add up."""
    draw, rows = np.random.default_rng(number), []
    for i in range(number):
        said, shown = (list(one)[int(draw.integers(len(one)))] for one in (SAID, SHOWN))
        image = picture(folder, styles(name == "test")[i % len(styles(name == "test"))], "circle", shown)
        rows.append({"image": image, "text": f"it was {said}", "label": SAID[said] + SHOWN[shown]})
    return toys.write_table(folder / f"{name}.csv", rows)


def sample(**fields):
    return Sample("7", (), ("so so",), fields)


def test_numbers_are_read_and_anything_else_is_bad():
    assert [TASK.read_value(sample(label=one)) for one in ("-2.4", 1, 0.6)] == [-2.4, 1.0, 0.6]
    for value in (None, "", "good", "nan", "inf"):
        with pytest.raises(BadSample, match="is not a number"):
            TASK.read_value(sample(label=value))
    example = TASK.prepare(None)(sample(label="-0.5"), np.random.default_rng(0))
    assert example.targets["value"] == np.float32(-0.5) and example.text == "so so"
    assert TASK.settings(DataConfig()).text == "text" and TASK.better == "lower"


def test_sentiment_is_learned(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, ("itm", "mlm"), [f"it was {one}" for one in SAID], **VILT))
    train, test = table(tmp_path, "train", 60), table(tmp_path, "test", 24)
    optim = {"lr": 3e-3, "warmup": 160, "weight_decay": 0.0}
    settings = {
        "task": {"kind": "sentiment", "blank_images": True},
        "data": {"train": str(train), "val": str(test), "workers": 0},
        "train": toys.TRAIN | {"samples": 1440, "global_batch": 16, "optim": optim},
    }
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", torch.device("cpu"))
    found, floors = done.after.metrics, done.after.floors
    assert found["MAE"] < 0.6 < floors["mean"]["MAE"] and found["Pearson"] > 0.9 and floors["mean"]["Pearson"] == 0
    assert floors["blank images"]["MAE"] > 0.7 and found["Acc-2 has0"] > floors["mean"]["Acc-2 has0"]
    rows = done.after.predictions
    assert found == sentiment_metrics([row["prediction"] for row in rows], [row["label"] for row in rows])
    finetuned = vlp.load(tmp_path / "run")
    run = EvaluateConfig(task=TASK, data=finetuned.config.data.model_copy(update={"val": str(test)}))
    assert predict(run, finetuned, tmp_path / "own.jsonl") == 24


def test_a_model_without_the_head_is_refused(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path))
    assert TASK.lacks(loaded.model) == "a head that says a number (objective regress)"
    table(tmp_path, "test", 2)
    reader = open_reader(str(tmp_path / "test.csv"), text="text")
    assert isinstance(TASK.survey(reader, DataConfig(text="text")), SentimentSurvey)
