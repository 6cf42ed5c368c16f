"""NLVR2 and SNLI-VE: labels, heads and arrangements of images, metrics, finetuning, submission."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from emoji_pictures import SHAPES, VILT, picture, styles
from helpers import SIZES
from PIL import Image

import vlp
from downstream.evaluate import EvaluateConfig, evaluate, parts_of, predict
from downstream.finetune import FinetuneConfig, finetune, finetune_config
from downstream.nlvr2 import Nlvr2Config
from downstream.snli_ve import SnliVeConfig
from downstream.verdict import VerdictSurvey, images_of, show_two
from objectives import AnswerConfig, PairAttentionConfig
from vlp.config import build
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Sample, open_reader
from vlp.data.shards import write_shards
from vlp.fusion.dual import DualStreamConfig
from vlp.fusion.single import SingleStreamConfig

CPU = torch.device("cpu")
SENTENCES = ["the left one is red", "the right one is blue", "it is red", "somebody likes it"]
TRAIN = toys.TRAIN | {"samples": 960, "global_batch": 16, "optim": {"lr": 3e-3, "warmup": 160, "weight_decay": 0.0}}


def ve_table(folder: Path, name: str, number: int) -> Path:
    """It is red, and the picture is, or is blue; or something is said that no picture shows."""
    draw, rows = np.random.default_rng(number), []
    for i in range(number):
        label = ("entailment", "contradiction", "neutral")[i % 3]
        color = {"entailment": "red", "contradiction": "blue"}.get(label, ("red", "blue")[i % 2])
        sentence = "somebody likes it" if label == "neutral" else "it is red"
        shape, style = SHAPES[int(draw.integers(3))], styles(name == "test")[i % len(styles(name == "test"))]
        image = picture(folder, style, shape, color)
        rows.append({"image": image, "sentence": sentence, "label": label, "pair_id": f"{name}-{i}"})
    return toys.write_table(folder / f"{name}.jsonl", rows)


def nlvr2_table(folder: Path, name: str, number: int) -> Path:
    """Each sentence is of two pairs of images, a red and a blue one in either order."""
    draw, rows = np.random.default_rng(number), []
    for i in range(number):
        shape, style = SHAPES[int(draw.integers(3))], styles(name == "dev")[i % len(styles(name == "dev"))]
        red, blue = (picture(folder, style, shape, color) for color in ("red", "blue"))
        for pair, label in enumerate(("True", "False")):
            left, right = (red, blue) if label == "True" else (blue, red)
            sentence = ("the left one is red", "the right one is blue")[i % 2]
            identifier = f"{name}-{i}-{pair}-0"
            rows.append({"left": left, "right": right, "sentence": sentence, "label": label, "identifier": identifier})
    return toys.write_table(folder / f"{name}.jsonl", rows)


def sample(**fields):
    return Sample("7", (), ("it is red",), fields)


def test_labels_are_read_in_either_case_and_others_are_bad():
    task = Nlvr2Config()
    assert [task.read_label(sample(label=one)) for one in ("True", "false", " TRUE ", True)] == [
        "True",
        "False",
        "True",
        "True",
    ]
    with pytest.raises(BadSample, match="label 'maybe' is none of False, True"):
        task.read_label(sample(label="maybe"))
    with pytest.raises(BadSample, match="no field label; its fields are caption"):
        task.read_label(sample(caption="x"))
    assert SnliVeConfig(label="gold").read_label(sample(gold="Neutral")) == "neutral"


def test_tables_have_two_image_columns_and_shards_their_members():
    task = Nlvr2Config()
    assert task.settings(DataConfig(val="a.jsonl")).image == ("left", "right")
    assert task.settings(DataConfig(val="a-{000..009}.tar")).image is None
    assert task.settings(DataConfig(val="a.csv", image=("x", "y"), text="said")).image == ("x", "y")
    assert task.settings(DataConfig(val="a.csv", text="said")).text == "said"
    assert SnliVeConfig().settings(DataConfig()).text == "sentence"


@pytest.mark.parametrize(
    ("fusion", "text", "images"),
    [
        ({"kind": "single_stream"}, {}, "each"),
        ({"kind": "dual_stream", "attention": "co"}, {}, "each"),
        ({"kind": "dual_stream"}, {}, "alternate"),
        ({"kind": "dual_stream"}, {"layers": 0}, "parallel"),
        ({"kind": "multiway"}, {}, "each"),
    ],
)
def test_a_model_of_one_image_is_shown_two_as_its_family_does(tmp_path, fusion, text, images):
    model = {"fusion": {**SIZES, **fusion}, "text": {**SIZES, "max_length": 24, **text}}
    loaded = vlp.load(toys.checkpoint(tmp_path, ("itm",), **model))
    task, survey = Nlvr2Config(), VerdictSurvey({"True": 1, "False": 1})
    run = task.adapt(finetune_config(loaded, "x", {"task": {"kind": "nlvr2"}}), loaded.config.objectives, survey)
    assert run.model.fusion.images == images and images_of(run.model) == 2
    assert run.objectives == {"answer": AnswerConfig(answers=("False", "True"), loss="ce")}
    assert show_two(run.model).fusion.images == images


def test_a_fitting_head_of_the_checkpoint_stays_and_any_other_goes():
    survey = VerdictSurvey({"neutral": 3})
    heads = {"entail": AnswerConfig(answers=("contradiction", "entailment", "neutral"), head="linear")}

    def adapted(task, pretrained, images="one", **settings):
        run = build(FinetuneConfig, {"task": {"kind": task.kind}, "objectives": settings})
        fusion = SingleStreamConfig(**SIZES, images=images)
        run = run.model_copy(update={"model": run.model.model_copy(update={"fusion": fusion})})
        return task.adapt(run, pretrained, survey).objectives

    assert adapted(SnliVeConfig(), heads) == heads
    assert adapted(SnliVeConfig(), {"answer": AnswerConfig(answers=("no", "yes"))})["answer"].answers[0] == (
        "contradiction"
    )
    relate = {"relate": PairAttentionConfig(heads=4)}
    assert adapted(Nlvr2Config(), relate, "each") == relate
    assert adapted(Nlvr2Config(), {"answer": AnswerConfig(answers=("false", "true"))}).keys() == {"answer"}
    for given, loss in (({}, "ce"), ({"loss": "bce"}, "bce"), ({"answers": SnliVeConfig().labels}, "ce")):
        stated = adapted(SnliVeConfig(), heads, answer={"head": "relu", **given})["answer"]
        assert (stated.head, stated.answers, stated.loss) == ("relu", SnliVeConfig().labels, loss)
    example = SnliVeConfig().prepare(build(FinetuneConfig, {"task": {"kind": "snli_ve"}}).model_copy(
        update={"objectives": heads}
    ))(sample(label="neutral"), np.random.default_rng(0))  # fmt: skip
    assert example.targets["answer_scores"].tolist() == [0, 0, 1], "in the order of the head"


def test_entailment_is_learned(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, ("itm", "mlm"), SENTENCES, **VILT))
    train, test = ve_table(tmp_path, "train", 60), ve_table(tmp_path, "test", 30)
    data = {"train": str(train), "val": str(test), "workers": 0}
    settings = {"task": {"kind": "snli_ve", "blank_images": True}, "data": data, "train": TRAIN}
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", CPU)
    assert done.before is None and "contradiction, neutral, entailment" in done.lacked
    assert done.after.floors["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert done.after.floors["blank images"]["accuracy"] < 0.7
    assert done.after.metrics["accuracy"] >= 0.9
    assert done.after.metrics["accuracy/label/neutral"] == 1.0
    rows = done.after.predictions
    assert rows[0]["pair_id"] == "test-0" and sum(rows[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    finetuned = vlp.load(tmp_path / "run")
    image = json.loads(test.read_text().splitlines()[0])["image"]
    assert finetuned.answer([tmp_path / image], [rows[0]["text"]]) == [rows[0]["prediction"]]


def test_two_images_are_learned_scored_by_sentence_and_submitted(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, ("itm", "mlm"), SENTENCES, **VILT))
    train, dev = nlvr2_table(tmp_path, "train", 60), nlvr2_table(tmp_path, "dev", 15)
    data = {"train": str(train), "val": str(dev), "workers": 0}
    settings = {"task": {"kind": "nlvr2"}, "data": data, "train": TRAIN}
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", CPU)
    assert done.after.floors["majority"] == pytest.approx(
        {"accuracy": 0.5, "consistency": 0.0, "accuracy/label/False": 1.0, "accuracy/label/True": 0.0}
    )
    assert done.after.metrics["accuracy"] >= 0.9
    rows = done.after.predictions
    by_sentence = [all(row["correct"] for row in rows[i : i + 2]) for i in range(0, 30, 2)]
    assert done.after.metrics["consistency"] == pytest.approx(sum(by_sentence) / 15)
    lines = Nlvr2Config().submission(rows).splitlines()
    assert lines[0] == f"dev-0-0-0,{rows[0]['prediction']}" and len(lines) == 30
    with pytest.raises(ValueError, match="sample 0 has no field identifier"):
        Nlvr2Config().submission([{"key": "0", "prediction": "True"}])

    finetuned = vlp.load(tmp_path / "run")
    own = toys.write_table(
        tmp_path / "own.csv",
        [
            {name: row[name] for name in ("left", "right", "sentence")}
            for row in map(json.loads, dev.read_text().splitlines())
        ],
    )
    run = EvaluateConfig(task=Nlvr2Config(), data=finetuned.config.data.model_copy(update={"val": str(own)}))
    assert predict(run, finetuned, tmp_path / "own.jsonl") == 30
    found = [json.loads(line)["prediction"] for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert found == [row["prediction"] for row in rows]
    again = run.model_copy(update={"data": run.data.model_copy(update={"val": str(dev)})})
    assert evaluate(again, finetuned, tmp_path / "eval").metrics == done.after.metrics


def test_mistakes_are_one_line(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, {"answer": {"answers": ["False", "True"]}}))
    task = Nlvr2Config()
    assert task.lacks(loaded.model) == "a fusion of two images a text (model.fusion.images)"
    assert "contradiction" in SnliVeConfig().lacks(loaded.model)
    reader = open_reader(str(nlvr2_table(tmp_path, "dev", 2)), image=("left", "right"), text="sentence")
    with pytest.raises(ValueError, match=r"task nlvr2: this model lacks .*; finetune it with vlp finetune nlvr2"):
        task.evaluate(parts_of(loaded, loaded.config.data), reader)
    table = toys.write_table(tmp_path / "t.csv", [{"image": "words.png", "sentence": "x", "label": "-"}] * 2)
    with pytest.raises(ValueError, match=r"data\.train: none of its 2 samples .* label '-' is none of .*--task\.label"):
        SnliVeConfig().survey(open_reader(str(table), text="sentence"), DataConfig(text="sentence"))
    paired = vlp.load(
        toys.checkpoint(
            tmp_path,
            {"answer": {"answers": ["False", "True"]}},
            fusion={**SIZES, "kind": "dual_stream", "images": "pair"},
        )
    )
    one = open_reader(str(tmp_path / "dev.jsonl"), image="left", text="sentence")
    with pytest.raises(ValueError, match=r"the first, '0'.*: 1 images, two images are wanted; .*--data\.image"):
        task.evaluate(parts_of(paired, DataConfig(text="sentence")), one)


def test_images_keep_their_own_shape_where_the_checkpoint_was_trained_so(tmp_path):
    fusion = {**VILT["fusion"], "images": "each"}
    head = {"answer": {"answers": ["False", "True"], "loss": "ce"}}
    vision = {**VILT["vision"], "position_size": 16}
    loaded = vlp.load(toys.checkpoint(tmp_path, head, SENTENCES, **VILT | {"fusion": fusion, "vision": vision}))
    draw, rows = np.random.default_rng(0), []
    for number, size in enumerate([(16, 16), (40, 16), (16, 25), (30, 20)]):
        for side in ("left", "right"):
            pixels = draw.integers(0, 256, (*(size if side == "left" else size[::-1]), 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{side}{number}.png")
        rows.append({"left": f"left{number}.png", "right": f"right{number}.png", "sentence": SENTENCES[0]})
    reader = open_reader(str(toys.write_table(tmp_path / "own.jsonl", rows)), image=("left", "right"), text="sentence")
    transform = {"resize": "shortest", "crop": "none", "multiple": 8}
    parts = parts_of(loaded, build(DataConfig, {"text": "sentence", "max_length": 16, "transform": transform}))
    together, alone = (
        [list(row["probabilities"].values()) for row in Nlvr2Config(batch=size).predict(parts, reader)]
        for size in (4, 1)
    )
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-5)
    assert len({tuple(row) for row in together}) == 4


def test_models_of_regions_are_finetuned_and_scored_on_arrays(tmp_path):
    draw, samples = np.random.default_rng(0), []
    for number in range(24):
        file, label = io.BytesIO(), SnliVeConfig().labels[number % 3]
        features = draw.normal(0, 0.1, (3, 8)).astype(np.float32) + np.eye(8, dtype=np.float32)[number % 3]
        np.savez(file, features=features, boxes=draw.random((3, 4)) * 9, width=9, height=9)
        fields = {"sentence": "it is red", "label": label, "pair_id": str(number)}
        samples.append({"__key__": f"{number:02d}", "npz": file.getvalue(), "json": fields})
    shard = write_shards(samples, str(tmp_path / "%02d.tar"))[0]
    wide = io.BytesIO()
    np.savez(wide, features=np.zeros((3, 9)), boxes=np.zeros((3, 4)), width=9, height=9)
    twice = samples[0]["json"] | {"sentence": ["it is red", "it is blue"]}
    broken = [{"npz": b"torn"}, {"npz": wide.getvalue()}, {}, {"npz": samples[0]["npz"], "json": twice}]
    broken = [{"__key__": f"bad{number}", "json": samples[0]["json"], **one} for number, one in enumerate(broken)]
    test = write_shards([*samples[:8], *broken], str(tmp_path / "test%02d.tar"))[0]
    vision = {"kind": "region", "features": 8, "width": 32, "number": 4}
    model = {"vision": vision, "text": VILT["text"], "fusion": VILT["fusion"]}
    loaded = vlp.load(toys.checkpoint(tmp_path, {"mlm": {}}, SENTENCES, **model))
    settings = {
        "task": {"kind": "snli_ve", "blank_images": True},
        "data": {"train": shard, "val": shard, "workers": 0},
        "train": TRAIN | {"samples": 480},
    }
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", CPU)
    assert done.after.metrics["accuracy"] >= 0.9 and done.after.floors["blank images"]["accuracy"] < 0.5
    assert not done.after.bad and len(done.after.predictions) == 24
    result = SnliVeConfig().evaluate(
        parts_of(vlp.load(tmp_path / "run"), SnliVeConfig().settings(DataConfig())), open_reader(test)
    )
    assert len(result.predictions) == 8 and sorted(result.bad) == ["bad0", "bad1", "bad2", "bad3"]
    said = ("cannot be read", "9 wide, the model reads 8", "no image", "2 texts, of which one is read")
    assert all(words in result.bad[f"bad{number}"] for number, words in enumerate(said))


def test_alternating_fusion_can_be_finetuned(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, sentences=SENTENCES))
    assert isinstance(loaded.config.model.fusion, DualStreamConfig)
    train = nlvr2_table(tmp_path, "train", 8)
    data = {"train": str(train), "val": str(train), "workers": 0}
    settings = {"task": {"kind": "nlvr2"}, "data": data, "train": TRAIN | {"samples": 160}}
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", CPU)
    assert done.after is not None and not any(name.startswith("fusion") for name in done.transfer.missing)
