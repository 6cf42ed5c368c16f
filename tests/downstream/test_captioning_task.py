import io
import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import toys
from helpers import SIZES
from rich.console import Console

import vlp
from downstream.captioning import CaptioningConfig, CaptionSurvey
from downstream.evaluate import parts_of, result_table
from downstream.finetune import finetune, finetune_config, finetune_table
from downstream.metrics.captioning import caption_metrics
from downstream.metrics.java import java_metrics
from downstream.nlvr2 import Nlvr2Config
from downstream.translation import TranslationConfig
from encoders.types import Batch, Texts
from objectives.base import Decode, Fuse
from vlp.data.loader import DataConfig
from vlp.data.reader import open_reader

CPU = torch.device("cpu")
TRAIN = toys.TRAIN | {"samples": 2400, "global_batch": 16}


def settings(table, **task):
    data = {"train": str(table), "val": str(table), "workers": 0}
    return {"task": {"kind": "captioning", **task}, "data": data, "train": TRAIN}


@pytest.mark.parametrize("decoder", ["pretrained", "new"])
def test_finetuning_writes_eight_captions_by_heart(tmp_path, decoder):
    names = ("itc", "itm", "lm") if decoder == "pretrained" else ("itc", "itm")
    loaded = vlp.load(toys.checkpoint(tmp_path, names))
    table = toys.caption_table(tmp_path)
    run = finetune_config(loaded, "toy", settings(table))
    done = finetune(run, loaded, tmp_path / "run", CPU)
    if decoder == "pretrained":
        assert done.lacked is None and done.before.metrics["CIDEr-D"] < 1
        assert not done.transfer.missing
    else:
        assert done.before is None and "decoder over images" in done.lacked
        assert {name.split(".")[0] for name in done.transfer.missing} == {"objectives"}
    assert done.after.metrics["exact match"] == 1.0 and done.after.metrics["BLEU-4"] == pytest.approx(1.0)
    floor = done.after.floors["most frequent caption"]
    assert floor["exact match"] == 1 / 8 and floor["CIDEr-D"] < done.after.metrics["CIDEr-D"]

    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == [row["references"][0] for row in rows] and len(rows) == 8
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["task"] == "captioning" and written["counts"] == {"samples": 8, "bad": 0}
    headers = [column.header for column in finetune_table(run, done).columns]
    floors = ["most frequent caption", "nearest image"]
    assert headers == ["metric", *(["before", "after"] if done.before else ["model"]), *floors]
    assert done.after.floors["nearest image"]["exact match"] == 1.0, "the same images are their own neighbours"
    assert all(row["metrics"]["exact match"] == 1.0 for row in rows)

    finetuned = vlp.load(tmp_path / "run")
    assert finetuned.caption([tmp_path / "blue_striped.png"]) == ["a striped blue square"]
    assert finetuned.model.fusion is None and len(finetuned.model.text.blocks) == 0, "nothing would have trained them"
    reader = open_reader(str(table))
    for method in ("greedy", "nucleus"):
        task = CaptioningConfig(generation={"method": method, "top_p": 0.5})
        assert task.evaluate(parts_of(finetuned, finetuned.config.data), reader).metrics["exact match"] == 1.0


def test_weights_of_the_checkpoint_are_where_finetuning_begins(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, ("itc", "itm", "lm")))
    frozen = settings(toys.caption_table(tmp_path))
    frozen["train"] = {"samples": 8, "global_batch": 8, "optim": {"lr": 1e-9, "weight_decay": 0.0}}
    done = finetune(finetune_config(loaded, "toy", frozen), loaded, tmp_path / "run", CPU)
    before, after = loaded.model.state_dict(), vlp.load(tmp_path / "run").model.state_dict()
    assert {name.split(".")[0] for name in after} == {"vision", "text", "decoder", "objectives"}
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)
    assert done.after.metrics == done.before.metrics
    with pytest.raises(ValueError, match="holds a run already"):
        finetune(finetune_config(loaded, "toy", frozen), loaded, tmp_path / "run", CPU)


def test_another_objective_keeps_the_parts_that_it_trains(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path))
    run = finetune_config(loaded, "x", settings("t.csv") | {"objectives": {"itm": {"weight": 0.5}}})
    adapted = run.task.adapt(run, loaded.config.objectives, CaptionSurvey("a", 1, 1))
    assert set(adapted.objectives) == {"itm", "lm"} and adapted.objectives["itm"].weight == 0.5
    assert adapted.model.fusion == loaded.config.model.fusion and adapted.model.text.layers == 2


def test_all_references_of_an_image_count_and_each_image_once(tmp_path):
    for color in ("red", "blue"):
        toys.picture(tmp_path / f"{color}.png", color)
    pairs = [("red", "a red square"), ("blue", "a blue square"), ("red", "it is red"), ("blue", "a blue square")]
    rows = [{"image": f"{color}.png", "caption": caption} for color, caption in pairs]
    table = toys.write_table(tmp_path / "t.csv", [*rows, {"image": "gone.png", "caption": "a red square"}])
    loaded = vlp.load(toys.checkpoint(tmp_path, ("itm", "lm")))
    task, reader = CaptioningConfig(batch=1, java=()), open_reader(str(table))
    data = loaded.config.data
    survey = task.survey(open_reader(str(table)), data)
    assert survey == CaptionSurvey("a blue square", 2, 4)
    result = task.evaluate(parts_of(loaded, data), reader, survey)
    assert [len(row["references"]) for row in result.predictions] == [2, 2] and list(result.bad) == ["4"]
    references = {"red": ["a red square", "it is red"], "blue": ["a blue square"] * 2}
    expected = caption_metrics(dict.fromkeys(references, "a blue square"), references) | {"exact match": 0.5}
    assert result.floors["most frequent caption"] == pytest.approx(expected)
    table_shown = result_table(task, replace(result, notes=("install it with: pip install 'vlp[caption]'",)))
    assert table_shown.row_count == len(expected)
    printed = io.StringIO()
    Console(file=printed, width=200).print(table_shown)
    assert "vlp[caption]" in printed.getvalue()  # brackets are no markup
    unlabelled = toys.write_table(tmp_path / "own.csv", [{"image": "red.png"}])
    found = list(task.predict(parts_of(loaded, data), open_reader(str(unlabelled))))
    assert found[0]["caption"] == result.predictions[0]["caption"]


def test_a_fusion_that_writes_itself_captions_and_goes_on_so(tmp_path):
    """GIT: one stack reads the image and writes beside it."""
    stream = {"kind": "single_stream", **SIZES}
    parts = {"text": {**SIZES, "layers": 0, "max_length": 24}, "fusion": stream, "decoder": None}
    loaded = vlp.load(toys.checkpoint(tmp_path, {"lm": {"memory": "beside"}}, **parts))
    table, task = toys.caption_table(tmp_path), CaptioningConfig(java=(), generation={"max_length": 24})
    rows = task.evaluate(parts_of(loaded, loaded.config.data), open_reader(str(table))).predictions
    images = [tmp_path / f"{row['image'].split(':')[-1]}" for row in rows]
    assert [row["caption"] for row in rows] == loaded.caption(images)
    run = finetune_config(loaded, "x", settings(table))
    adapted = run.task.adapt(run, loaded.config.objectives, CaptionSurvey("a", 1, 1))
    assert adapted.model == run.model and adapted.objectives["lm"].memory == "beside"


def test_what_answers_instructions_is_asked_for_captions(tmp_path):
    """OFA: the encoder reads image and question, the decoder writes the caption."""
    stack = {**SIZES, "norm": "pre", "normformer": True}
    untied = {"length": 24, "buckets": 6, "side": 5}
    parts = {
        "vision": {"model": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "width": 32, "depth": 0}
        | {"heads": 4, "class_token": False},
        "text": {**stack, "layers": 0, "max_length": 24, "absolute_positions": False},
        "fusion": {"kind": "single_stream", **stack, "untied": untied},
        "decoder": {"kind": "causal", **stack, "untied": untied, "memory": "both", "share": "words"},
    }
    lm = {"memory": "fused", "view": "lm:answer", "head": "bare"}
    folder = toys.checkpoint(tmp_path, {"lm": lm}, ["what does the image describe?"], **parts)
    loaded, table = vlp.load(folder), toys.caption_table(tmp_path)
    flags = {"objectives": {"lm": {"label_smoothing": 0.1}}, "tune": {"probe": None}}
    flags["train"] = TRAIN | {"samples": 480, "optim": {"lr": 3e-3, "warmup": 0, "weight_decay": 0.0}}
    run = finetune_config(loaded, "toy", settings(table, java=(), generation={"method": "greedy"}) | flags)
    adapted = run.task.adapt(run, loaded.config.objectives, CaptionSurvey("a", 1, 1))
    trained = adapted.objectives["lm"]
    assert adapted.model == run.model and (trained.head, trained.label_smoothing) == ("bare", 0.1)
    done = finetune(run, loaded, tmp_path / "run", CPU)
    assert done.lacked is None and not done.transfer.missing and not done.transfer.unexpected
    assert done.after.metrics["CIDEr-D"] > done.before.metrics["CIDEr-D"] + 1

    again, reader = vlp.load(tmp_path / "run"), open_reader(str(table))
    parts = parts_of(again, run.data)
    rows = run.task.evaluate(parts, reader).predictions
    assert [row["caption"] for row in rows] == [row["caption"] for row in done.after.predictions]
    words = "what does the image describe?", rows[0]["caption"]
    ids = [torch.tensor(again.tokenizer.encode(one, 24)[0])[None] for one in words]
    asked, said = (Texts(one, torch.ones_like(one, dtype=torch.bool)) for one in ids)
    pixels = again._pixels([tmp_path / rows[0]["image"].split(":")[-1]])
    wanted = Decode(Fuse(), "lm:answer")
    batch = Batch({"clean": pixels}, {"clean": asked, "lm:answer": replace(said, attention="causal")})
    logits = again.model.objectives["lm"].head(again.model.run([wanted], batch)[wanted].states[0, :-1])
    likely = logits.log_softmax(-1).gather(1, said.ids[0, 1:, None])
    assert rows[0]["score"] == pytest.approx(likely.mean().item(), abs=1e-4)
    images = [tmp_path / row["image"].split(":")[-1] for row in rows]
    assert again.caption(images) == [row["caption"] for row in rows]
    other = run.task.model_copy(update={"ask": " is it red?"}).evaluate(parts, reader).predictions
    assert other[0]["score"] != rows[0]["score"], "the question is read"


def test_java_runs_before_and_after_training_alone(tmp_path, monkeypatch):
    asked = []

    def java(captions, references, names):
        asked.append(names)
        return {}, []

    monkeypatch.setattr("downstream.captioning.java_metrics", java)
    loaded = vlp.load(toys.checkpoint(tmp_path, ("lm",), fusion={"kind": "none"}))
    train = {"train": TRAIN | {"samples": 48, "optim": {"lr": 1e-3}}, "tune": {"every": 16, "probe": None}}
    run = finetune_config(loaded, "x", settings(toys.caption_table(tmp_path)) | train)
    finetune(run, loaded, tmp_path / "run", CPU)
    assert asked == [("METEOR", "SPICE"), (), (), (), ("METEOR", "SPICE")]
    off = {"java": (), "blank_images": False, "meteor": False}
    for task in (Nlvr2Config(blank_images=True).often(), TranslationConfig(blank_images=True).often()):
        assert all(getattr(task, name) == value for name, value in off.items() if hasattr(task, name))


def test_domains_are_corpora_of_their_own_and_submissions_name_the_images(tmp_path):
    domains = {"red": "in-domain", "blue": "near-domain", "green": "near-domain", "yellow": "out-domain"}
    rows = [
        {"image": toys.picture(tmp_path / f"{color}.png", color), "image_id": str(i), "domain": domain}
        | {"caption": f"a {color} square"}
        for i, (color, domain) in enumerate(domains.items())
    ]
    table = toys.write_table(tmp_path / "nocaps.csv", rows)
    loaded = vlp.load(toys.checkpoint(tmp_path, ("itm", "lm")))
    task, parts = CaptioningConfig(java=()), parts_of(loaded, loaded.config.data)
    result = task.evaluate(parts, open_reader(str(table)))
    captions = {row["image_id"]: row["caption"] for row in result.predictions}
    assert [row["domain"] for row in result.predictions] == list(domains.values())
    for domain in set(domains.values()):
        keys = [str(i) for i, one in enumerate(domains.values()) if one == domain]
        truth = {key: [rows[int(key)]["caption"]] for key in keys}
        for name, value in caption_metrics({key: captions[key] for key in keys}, truth).items():
            assert result.metrics[f"{name}/{domain}"] == pytest.approx(value), "document frequencies are the domain's"
    assert task.submission(result.predictions) == [
        {"image_id": number, "caption": captions[str(number)]} for number in range(4)
    ]
    named = [{"image_id": "0054c91397f2fe05", "caption": "x"}, {"image_id": "12", "caption": "y"}]
    assert task.submission(named) == named, "TextCaps has texts as ids, some all digits"
    with pytest.raises(ValueError, match="image 7 has no field image_id"):
        task.submission([{"key": "7", "caption": "x"}])


def test_java_metrics_are_pycocoevalcaps_or_the_line_says_why_not(monkeypatch):
    told, truth = {"a": "A dog!", "b": "two cats"}, {"a": ["a dog", "The dog"], "b": ["2 cats"]}

    class Meteor:
        def compute_score(self, gts, res):
            assert (gts, res) == ({0: ["a dog", "the dog"], 1: ["2 cats"]}, {0: ["a dog"], 1: ["two cats"]})
            return 0.25, [0.25, 0.25]

    class Spice:
        def __init__(self):
            raise OSError("no models\nhere")

    monkeypatch.setattr("shutil.which", lambda name: None)
    scores, reasons = java_metrics(told, truth, ("METEOR", "SPICE"))
    assert not scores and [one.split(":")[0] for one in reasons] == ["no METEOR", "no SPICE"]
    assert "install a Java runtime" in reasons[0]
    monkeypatch.setattr("shutil.which", lambda name: "/bin/java")
    for name, scorer in (("meteor", Meteor), ("spice", Spice)):
        module = ModuleType(f"pycocoevalcap.{name}.{name}")
        setattr(module, scorer.__name__, scorer)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    scores, reasons = java_metrics(told, truth, ("METEOR", "SPICE"))
    assert scores == {"METEOR": 0.25}
    assert reasons == ["no SPICE: pycocoevalcap failed with OSError: no models here"]
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    assert "pip install 'vlp[caption]'" in java_metrics(told, truth, ("METEOR",))[1][0]


def test_mistakes_are_one_line(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path))
    task = CaptioningConfig()
    toys.picture(tmp_path / "red.png", "red")
    reader = open_reader(str(toys.write_table(tmp_path / "t.csv", [{"image": "red.png", "label": "x"}])))
    with pytest.raises(ValueError, match=r"data\.train: none of its 1 samples can be used; the first, '0'.*: no text"):
        task.survey(reader, DataConfig())
    captioned = open_reader(str(toys.caption_table(tmp_path)))
    with pytest.raises(
        ValueError, match=r"lacks a decoder over images .*; finetune it with vlp finetune captioning first"
    ):
        task.evaluate(parts_of(loaded, loaded.config.data), captioned)
