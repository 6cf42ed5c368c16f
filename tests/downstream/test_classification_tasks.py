"""Zero-shot classification and the linear probe, on emoji in folders and coloured squares in tables."""

import json
from pathlib import Path

import emojis
import numpy as np
import pytest
import torch
import toys
from torch.nn import functional as F

import vlp
from downstream.classification import classes_of, read_classes, read_label
from downstream.evaluate import EvaluateConfig, evaluate, parts_of, predict
from downstream.finetune import finetune_config
from downstream.linear_probe import LinearProbeConfig, fit_logistic, hold_out
from downstream.zero_shot import TEMPLATES, ZeroShotConfig, fill
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Sample, open_reader


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return vlp.load(toys.checkpoint(tmp_path_factory.mktemp("model"), ("itc",), fusion={"kind": "none"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Emoji in three folders, which are their classes."""
    root = tmp_path_factory.mktemp("emoji")
    for number, (_, image) in enumerate(emojis.named().items()):
        emojis.save(root / ("red", "green", "blue")[number % 3] / f"{number:02d}.png", image)
    return root


def sample(key="7", **fields):
    return Sample(key, (), (), fields)


def squares(folder: Path, name: str, number: int, seed: int) -> Path:
    draw, rows = np.random.default_rng(seed), []
    for i in range(number):
        color = list(toys.COLORS)[int(draw.integers(4))]
        rows.append({"image": toys.picture(folder / f"{name}{i}.png", color, seed=seed * 999 + i), "label": color})
    return toys.write_table(folder / f"{name}.csv", rows)


def test_labels_are_read_in_every_form():
    assert read_label(sample(label="dog ")) == "dog" and read_label(sample(label=3)) == "3"
    assert read_label(sample(cls=b"3\n")) == "3" and read_label(sample(label=2.0)) == "2"
    assert read_label(sample(kind="cat", label="dog"), "kind") == "cat"
    assert read_label(sample("a/dog/1.png", image="a/dog/1.png")) == "dog"
    assert read_label(sample("1.png", image="1.png")) is None and read_label(sample()) is None
    with pytest.raises(BadSample, match="neither a text nor a whole number"):
        read_label(sample(label=["a"]))


def test_class_files(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("tabby cat\nfox\n\n", encoding="utf-8")
    found = read_classes(str(path))
    assert found.names == ("tabby cat", "fox") and found.of("k", "fox") == found.of("k", "1") == 1
    path.write_text("n02\ttabby cat\nn01\tüber fox\n", encoding="utf-8")
    found = read_classes(str(path))
    assert found.names == ("tabby cat", "über fox") and found.of("k", "n01") == 1
    with pytest.raises(BadSample, match="label 'n03' is none of the 2 classes"):
        found.of("k", "n03")
    for content, message in (("fox\n", "holds 1 classes"), ("fox\nfox\n", "'fox' stands there twice")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_classes(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        read_classes(str(tmp_path / "none.txt"))
    assert classes_of(["10", "9", "9"]).names == ("9", "10") and classes_of(["b", "a"]).names == ("a", "b")


def test_templates_are_given_or_read(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a bad photo of a {}.\nitap of a {c}.\n", encoding="utf-8")
    assert ZeroShotConfig(templates=str(path)).prompts() == ("a bad photo of a {}.", "itap of a {c}.")
    assert [fill(one, "fox") for one in ZeroShotConfig(templates=str(path)).prompts()] == [
        "a bad photo of a fox.",
        "itap of a fox.",
    ]
    assert ZeroShotConfig(templates="{}").prompts() == ("{}",) and ZeroShotConfig().prompts() == TEMPLATES
    with pytest.raises(ValueError, match="'no place' has no place for the class name"):
        ZeroShotConfig(templates=("{}", "no place")).prompts()
    with pytest.raises(ValueError, match=r"task\.templates .*: cannot be read"):
        ZeroShotConfig(templates="missing.txt").prompts()


def test_zero_shot_is_clips_ensemble(loaded, folder):
    """Scores equal those of the two towers, normalised, averaged over the prompts and normalised again."""
    task = ZeroShotConfig(templates=("a plain {} square", "is it {}?"), batch=7)
    reader = open_reader(str(folder))
    result = task.evaluate(parts_of(loaded, loaded.config.data), reader, task.survey(reader, loaded.config.data))
    names = ("blue", "green", "red")
    images = loaded.embed_images([folder / row["key"] for row in result.predictions])
    prompts = [loaded.embed_texts([one.replace("{}", name) for one in task.templates]) for name in names]
    classes = F.normalize(torch.stack([each.mean(0) for each in prompts]), dim=1)
    scale = loaded.model.space().logit_scale.exp().item()
    scores = (scale * images @ classes.T).softmax(1)
    assert [row["class"] for row in result.predictions] == [names[i] for i in scores.argmax(1).tolist()]
    assert [row["probability"] for row in result.predictions] == pytest.approx(scores.max(1).values.tolist(), abs=1e-5)
    labels = [row["key"].split("/")[0] for row in result.predictions]
    assert [row["label"] for row in result.predictions] == labels and len(labels) == 24
    right = [row["class"] == label for row, label in zip(result.predictions, labels)]
    assert result.metrics["top-1"] == pytest.approx(np.mean(right)) and result.metrics["top-5"] == 1.0
    assert result.floors["chance"]["top-1"] == pytest.approx(1 / 3)
    assert result.floors["majority"]["top-1"] == pytest.approx(1 / 3)


def test_unlabelled_images_are_classified_by_a_file_of_names(loaded, folder, tmp_path):
    (tmp_path / "names.txt").write_text("red\nblue\nwhite\n")
    emojis.save(tmp_path / "mine" / "a.png", next(iter(emojis.named().values())))
    config = EvaluateConfig(
        task=ZeroShotConfig(classes=str(tmp_path / "names.txt")), data=DataConfig(val=str(tmp_path / "mine"))
    )
    assert predict(config, loaded, tmp_path / "out.jsonl") == 1
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["key"] == "a.png" and set(row["best"]) == {"red", "blue", "white"}
    assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5) and "label" not in row


def test_images_of_other_classes_are_left_out_and_named(loaded, folder, tmp_path):
    (tmp_path / "names.txt").write_text("red\nblue\n")
    task = ZeroShotConfig(classes=str(tmp_path / "names.txt"))
    result = task.evaluate(parts_of(loaded, loaded.config.data), open_reader(str(folder)))
    assert len(result.predictions) == 16 and len(result.bad) == 8
    assert result.bad["green/01.png"] == "label 'green' is none of the 2 classes"
    assert "the majority is unknown" in result.notes[-1]


def test_zero_shot_needs_a_common_space_and_trains_nothing(folder, tmp_path):
    fused = vlp.load(toys.checkpoint(tmp_path, ("itm", "mlm")))
    task = ZeroShotConfig()
    assert "objective itc" in task.lacks(fused.model)
    with pytest.raises(ValueError, match="lacks a contrastive embedding"):
        task.evaluate(parts_of(fused, fused.config.data), open_reader(str(folder)))
    run = finetune_config(fused, "x", {"task": {"kind": "zero_shot"}})
    with pytest.raises(ValueError, match="task zero_shot leaves the model as it is"):
        task.adapt(run, {}, None)


def test_logistic_regression_is_at_its_minimum():
    """At the minimum of a convex loss its gradient, written out here, is zero."""
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=draw) * 3 + 1, torch.randint(0, 3, (60,), generator=draw)
    for penalty in (1e-3, 0.1):
        found = fit_logistic(features, labels, 3, penalty)
        inputs = (features - features.mean(0)) / features.std(0, correction=0)
        wrong = found(features).softmax(1) - F.one_hot(labels, 3)
        assert (wrong.T @ inputs / 60 + penalty * found.weight).abs().max() < 1e-5
        assert wrong.mean(0).abs().max() < 1e-5
    constant = torch.cat([features, torch.ones(60, 1)], 1)
    assert torch.allclose(fit_logistic(constant, labels, 3, 0.1)(constant), found(features), atol=1e-4)


def test_whole_images_are_held_out():
    images = [f"{i // 2}" for i in range(40)]
    held = hold_out(images, 0.25)
    assert int(held.sum()) == 10 and all(held[2 * i] == held[2 * i + 1] for i in range(20))
    assert torch.equal(held, hold_out(images, 0.25)) and int(hold_out(["a", "b"], 0.01).sum()) == 1
    with pytest.raises(ValueError, match="held-out images, but there is one"):
        hold_out(["a", "a"], 0.5)


@pytest.mark.parametrize("features", ["pooled", "patches", "embed"])
def test_a_probe_tells_colours_apart(loaded, tmp_path, features):
    data = DataConfig(
        train=str(squares(tmp_path, "a", 60, 1)), val=str(squares(tmp_path, "b", 40, 2)), workers=0, max_length=16
    )
    data = data.model_copy(update={"tokenizer": loaded.config.data.tokenizer})
    task = LinearProbeConfig(features=features, penalties=(1e-4, 1e-2, 1.0, 100.0))
    result = evaluate(EvaluateConfig(task=task, checkpoint="toy", data=data), loaded, tmp_path / "out")
    assert result.metrics["top-1"] >= 0.95 and result.floors["majority"]["top-1"] < 0.5
    assert result.floors["chance"] == {"top-1": 0.25, "top-5": 1.0, "per-class mean": 0.25}
    assert "held-out training images are right" in result.notes[2]
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["metrics"] == result.metrics and written["headline"] == "top-1"
    predict(EvaluateConfig(task=task, data=data), loaded, tmp_path / "mine.jsonl")
    mine = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [row["class"] for row in mine] == [row["class"] for row in result.predictions]


def test_a_probe_needs_training_data_and_its_features(loaded, tmp_path):
    reader = open_reader(str(squares(tmp_path, "b", 4, 2)))
    with pytest.raises(ValueError, match=r"name them with --data\.train"):
        LinearProbeConfig().evaluate(parts_of(loaded, loaded.config.data.model_copy(update={"train": None})), reader)
    fused = vlp.load(toys.checkpoint(tmp_path, ("itm", "mlm")))
    assert "objective itc" in LinearProbeConfig(features="embed").lacks(fused.model)
    assert LinearProbeConfig().lacks(fused.model) is None
    with pytest.raises(ValueError, match=r"take task\.features pooled"):
        LinearProbeConfig(features="embed").predict(parts_of(fused, fused.config.data), reader).__next__()


def test_broken_images_are_left_out(loaded, tmp_path):
    path = squares(tmp_path, "a", 20, 1)
    (tmp_path / "a3.png").write_bytes(b"no image")
    task = LinearProbeConfig(penalties=(0.1,))
    data = replace_train(loaded.config.data, path)
    reader = open_reader(str(path))
    result = task.evaluate(parts_of(loaded, data), reader, task.survey(reader, data))
    assert len(result.predictions) == 19 and list(result.bad) == ["3"]
    assert "fitted on 19 images" in result.notes[1]


def replace_train(data: DataConfig, path: Path) -> DataConfig:
    return data.model_copy(update={"train": str(path)})
