"""Multiple choice: choices stay together, accuracies by part, the leaderboard's file, finetuning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from emoji_pictures import SHAPES, VILT, picture, styles

import vlp
from downstream.evaluate import EvaluateConfig, parts_of, predict
from downstream.finetune import finetune, finetune_config
from downstream.task import EvalSample, make_batch
from downstream.vcr import CONDITIONED, VcrConfig, with_choice
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Sample, open_reader

TASK = VcrConfig()
ANSWERS = ("it is red", "it is blue", "nobody knows", "it is old")
REASONS = ("because person1 is red", "because person1 is blue", "because of the night", "because of the music")
SENTENCES = ["what color is person1?", *ANSWERS, *REASONS]


def table(folder: Path, name: str, number: int) -> Path:
    """A question about each picture, of red and blue ones, and a reason for its answer."""
    draw, rows = np.random.default_rng(number), []
    for i in range(number):
        shape, style = SHAPES[int(draw.integers(3))], styles(name == "val")[i % len(styles(name == "val"))]
        right = i % 2
        common = {"image": picture(folder, style, shape, ("red", "blue")[right]), "annot_id": f"{name}-{i}"}
        for part, texts in (("answer", ANSWERS), ("rationale", REASONS)):
            order = draw.permutation(4).tolist()
            question = "what color is person1?" + (f" {ANSWERS[right]}" if part == "rationale" else "")
            row = {"question": question, "choices": [texts[k] for k in order], "part": part}
            rows.append(common | row | {"label": order.index(right)})
    return toys.write_table(folder / f"{name}.jsonl", rows)


def sample(**fields):
    return Sample("7", (torch.zeros(3, 16, 16, dtype=torch.uint8),), ("a", "b", "c", "d"), fields)


def test_what_a_training_example_holds():
    given = sample(question=" why? ", choices=["a", "b", "c", "d"], label="1")
    prepare = TASK.prepare(finetune_config(_Loaded(), "x", {"task": {"kind": "vcr"}}))
    right = prepare(Sample("7", given.images, ("b",), given.fields), np.random.default_rng(0))
    wrong = prepare(Sample("7", given.images, ("c",), given.fields), np.random.default_rng(0))
    assert (right.text, right.second, right.targets["chosen"], wrong.targets["chosen"]) == ("why?", "b", 1.0, 0.0)
    assert with_choice(EvalSample(given, 0, ""), "why?", "b", apart=False).text == "why? b"
    for fields, match in (
        ({"question": "x", "choices": ["a"] * 4, "label": 4}, "label 4 is no number from 0 to 3"),
        ({"question": "x", "choices": ["a"] * 3, "label": 0}, "3 choices, 4 are wanted"),
        ({"choices": ["a"] * 4, "label": 0}, "no field question"),
    ):
        with pytest.raises(BadSample, match=match):
            prepare(sample(**fields), np.random.default_rng(0))


class _Loaded:
    """What ``finetune_config`` reads of a checkpoint."""

    def __init__(self):
        from vlp.checkpoint.load import LoadedConfig
        from vlp.config import build

        self.config = build(LoadedConfig, {})


def test_choices_share_their_questions_image(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, {"choose": {}}, SENTENCES, **VILT))
    parts = parts_of(loaded, TASK.settings(loaded.config.data))
    samples = [sample(question="what color is person1?"), sample(question="nobody knows")]
    asked = [(EvalSample(one, 0, ""), one.fields["question"], text) for one in samples for text in one.texts]
    examples = [with_choice(*one, True) for one in asked]
    batch = make_batch(parts, examples, [0] * 4 + [1] * 4)
    assert batch.num_images == 2 and batch.num_texts == 8
    assert batch.image_of_text.tolist() == [0] * 4 + [1] * 4
    assert batch.texts["clean"].segments is not None
    found = TASK.judge(loaded.model, batch)
    assert found.shape == (2, 4) and torch.allclose(found.sum(1), torch.ones(2))


def test_choosing_is_learned_and_submitted(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, ("itm", "mlm"), SENTENCES, **VILT))
    train, val = table(tmp_path, "train", 40), table(tmp_path, "val", 10)
    data = {"train": str(train), "val": str(val), "workers": 0, "max_length": 24}
    optim = {"lr": 5e-3, "warmup": 80, "weight_decay": 0.0}
    settings = {
        "task": {"kind": "vcr", "blank_images": True},
        "data": data,
        "train": toys.TRAIN | {"samples": 960, "global_batch": 8, "optim": optim},
    }
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", torch.device("cpu"))
    assert "objective choose" in done.lacked
    metrics, chance = done.after.metrics, done.after.floors["chance"]
    assert chance == {"accuracy": 0.25, "Q->A": 0.25, "QA->R": 0.25, "Q->AR": 0.0625}
    assert metrics["Q->A"] >= 0.8 and metrics["QA->R"] >= 0.8 and metrics["Q->AR"] >= 0.7
    assert done.after.floors["blank images"]["Q->A"] <= 0.6
    rows = done.after.predictions
    assert len(rows) == 20 and rows[0]["prediction"] == int(np.argmax(rows[0]["probabilities"]))
    finetuned = vlp.load(tmp_path / "run")
    run = EvaluateConfig(task=TASK, data=finetuned.config.data.model_copy(update={"val": str(val)}))
    assert predict(run, finetuned, tmp_path / "own.jsonl") == 20
    found = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert [one["prediction"] for one in found] == [row["prediction"] for row in rows]


def test_the_leaderboards_csv_has_all_rationales_of_a_question():
    rows = [
        {"key": str(n), "annot_id": "test-0", "part": part, "probabilities": [0.1, 0.2, 0.3, 0.4]}
        for n, part in enumerate(("answer", *CONDITIONED))
    ]
    head, line = TASK.submission(rows).splitlines()
    assert head.split(",")[:6] == [
        "annot_id", "answer_0", "answer_1", "answer_2", "answer_3", "rationale_conditioned_on_a0_0",
    ]  # fmt: skip
    assert head.split(",")[-1] == "rationale_conditioned_on_a3_3" and len(head.split(",")) == 21
    assert line == "test-0," + ",".join(["0.1,0.2,0.3,0.4"] * 5)
    with pytest.raises(ValueError, match=r"question 'test-0' lacks rationales .* --conditioned"):
        TASK.submission(rows[:3])


def test_broken_questions_are_counted(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, {"choose": {}}, SENTENCES, **VILT))
    good = {"image": "words.png", "question": "x", "choices": list("abcd"), "label": 0}
    rows = [good, good | {"choices": ["a", "b"]}, good | {"question": None}, good | {"label": None}]
    path = toys.write_table(tmp_path / "t.jsonl", rows)
    parts = parts_of(loaded, TASK.settings(DataConfig(max_length=16)))
    result = TASK.evaluate(parts, open_reader(str(path), text="choices"))
    assert len(result.predictions) == 1 and result.metrics.keys() == {"accuracy"}
    assert list(result.bad) == ["1", "2", "3"] and result.bad["1"] == "2 choices, 4 are wanted"
