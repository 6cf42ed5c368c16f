"""From a csv of one's own to a finetuned model: what is found, chosen and refused on the way."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import toys
from standins import GOLDENS

import vlp
from downstream.captioning import CaptioningConfig
from downstream.choose import ALL, Measured, choose, free_memory, given, measure
from downstream.columns import guess_columns, named_split
from downstream.evaluate import EvaluateConfig
from downstream.finetune_config import FinetuneConfig
from downstream.forgetting import transplanted
from downstream.own_data import look_at
from downstream.selection import Selection
from downstream.task import Result
from downstream.vqa import VqaConfig
from vlp.checkpoint.native import find_checkpoint
from vlp.cli import main
from vlp.cli.using import name_of
from vlp.config import build
from vlp.data.fetch import pair_example
from vlp.data.loader import DataConfig
from vlp.data.reader import open_reader
from vlp.data.tokenizer import TokenizerConfig, build_tokenizer
from vlp.run import Parts, RunConfig, assemble
from vlp.train.config import TrainConfig
from vlp.train.log import read_metrics

GIB = 2**30
CPU = ("--data.workers", "0", "--device", "cpu")
SMALL = (*CPU, "--task.generation.method", "greedy")
FAST = (*SMALL, "--tune.probe", "none")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and forty pictures with a caption each in my.csv, whose columns have names of their own."""
    folder = tmp_path_factory.mktemp("own")
    toys.checkpoint(folder)
    toys.write_table(folder / "my.csv", rows(folder))
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    found = []
    for number in range(40):
        color, filling = list(toys.COLORS)[number % 4], list(toys.FILLINGS)[number // 4 % 2]
        image = toys.picture(folder / f"p{number}.png", color, filling, seed=number)
        found.append({"Photo": image, "Comment": f"a {filling} {color} square"})
    return found


def broken(folder: Path, more: int = 0) -> Path:
    """The same forty rows, five of them broken in five ways; and ``more`` of no image."""
    table = rows(folder)
    table[3]["Photo"] = "gone.png"
    (folder / "torn.png").write_bytes((folder / "p7.png").read_bytes()[:60])
    table[7]["Photo"] = "torn.png"
    (folder / "text.png").write_bytes(b"not an image")
    table[11]["Photo"] = "text.png"
    table[19]["Comment"] = "  "
    table[23]["Photo"] = ""
    for number in range(24, 24 + more):
        table[number]["Photo"] = "gone.png"
    return toys.write_table(folder / f"broken{more}.csv", table)


@pytest.fixture(autouse=True)
def own_logging():
    """The command line's log goes to a stream that is closed after its test."""
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


def words(*each: object) -> list[str]:
    return [str(word) for word in each]


def test_one_command_takes_a_table_to_a_finetuned_model(place, tmp_path, capsys, monkeypatch):
    """Columns, split, batch, rate and duration are found and said; the best checkpoint is what the run loads as."""
    monkeypatch.chdir(tmp_path)
    command = ("finetune", "captioning", "--init", place / "checkpoint", "--data", place / "my.csv")
    assert main(words(*command, *SMALL, "--train.samples", "96")) == 0
    printed = capsys.readouterr()
    for said in (
        "image from 'Photo', caption from 'Comment'",
        "36 samples of 36 images train, 4 of 4 are held out, by a hash of each image",
        "global_batch 8: an epoch of 36 samples then has 5 steps",
        "lr 0.001: for 0.0",
        "micro_batch 8: a sample keeps ",
        "before: n/a, the checkpoint lacks a decoder over images",
        "evaluated every 36 samples, the best checkpoint is kept",
    ):
        assert said in printed.err, said
    assert "CIDEr-D" in printed.out and "zero-shot t2i/R@1" in printed.out
    folder = tmp_path / "runs" / "captioning"
    split = json.loads((folder / "split.json").read_text())
    assert split["hash"] in printed.err and len(split["held_out"]) == split["val"]["samples"] == 4
    result = json.loads((folder / "result.json").read_text())
    assert set(result["zero_shot_retrieval"]) == {"before", "after"} and result["samples"] == 96
    evaluated = [one for one in read_metrics(folder / "metrics.jsonl") if "val/CIDEr-D" in one]
    assert [one["seen"] for one in evaluated] == [40, 72, 96]
    best = max(evaluated, key=lambda one: (one["val/CIDEr-D"], one["seen"]))
    assert find_checkpoint(folder).name == f"{best['seen']:012d}"
    assert result["checkpoint"]["source"].endswith(find_checkpoint(folder).name)
    assert result["metrics"]["CIDEr-D"] == pytest.approx(best["val/CIDEr-D"])
    stored = vlp.load(folder).config
    assert stored.data.split == 0.1 and stored.data.val is None


def test_broken_samples_are_named_counted_and_left_out(place, tmp_path, capsys):
    table = broken(place)
    assert main(words("data", "check", table)) == 0
    lines = capsys.readouterr().out.splitlines()
    for number, what in {3: "gone.png", 7: "truncated", 11: "not an image", 19: "no text", 23: "no image path"}.items():
        assert sum(line.startswith(f"train {number} ({table} line ") and what in line for line in lines) == 1, what
    assert lines[-1] == "train: 40 samples, 5 of them broken"
    command = words("finetune", "captioning", "--init", place / "checkpoint", "--data", table, *FAST)
    assert main([*command, "--out", str(tmp_path / "run"), "--train.samples", "72", "--tune.patience", "1"]) == 0
    said = capsys.readouterr().err
    assert "of data.train are broken and left out" in said and f"train 19 ({table} line 21): empty text" in said


def test_too_many_broken_samples_are_refused_before_anything_is_trained(place, tmp_path, capsys):
    table = broken(place, more=8)
    command = words("finetune", "captioning", "--init", place / "checkpoint", "--data", table, *FAST)
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "samples are broken, more than data.bad_samples 0.01 allows" in line and "gone.png" in line
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert main(words("data", "check", table)) == 2
    assert "error: data.train: 13 of 40 samples are broken" in capsys.readouterr().err
    assert main(words("data", "check", table, "--bad-samples", "0.5")) == 0


def test_a_table_with_a_split_and_names_of_its_own_is_enough_for_questions(place, tmp_path, capsys):
    images = {color: toys.picture(tmp_path / f"{color}.png", color) for color in toys.COLORS}
    asked = [(color, other) for color in toys.COLORS for other in toys.COLORS]
    table = [
        {"File Name": images[color], "Query": f"Is it {other}?", "label": "yes" if color == other else "no",
         "subset": ["Train", "Train", "Dev", "Test"][number % 4]}
        for number, (color, other) in enumerate(asked)
    ]  # fmt: skip
    data = toys.write_table(tmp_path / "q.csv", table)
    command = words("finetune", "vqa", "--init", place / "checkpoint", "--data", data, "--out", tmp_path / "run", *CPU)
    assert main([*command, "--train.samples", "32", "--tune.probe", "none"]) == 0
    said = capsys.readouterr().err
    assert "image from 'File Name', question from 'Query', answer from 'label'" in said
    assert "train {'subset': ['Train']}, val {'subset': ['Dev']}, test {'subset': ['Test']}" in said
    assert "4 images of data.val are in data.train too" in said, "each picture is asked about in every part"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["counts"]["samples"] == 4 and result["data"]["where"] == {"subset": ["Test"]}
    assert len([one for one in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val/accuracy" in one]) == 4
    assert not any("flatters" in note for note in result["notes"]), "the test data chose no checkpoint"


def test_another_projects_checkpoint_is_a_beginning(place, tmp_path, capsys):
    source, captions = GOLDENS / "albef_pretrain", [row["Comment"] for row in rows(tmp_path)]
    build_tokenizer(TokenizerConfig(size=64, min_frequency=1), captions).save(tmp_path / "words")
    settings = ("--tokenizer", tmp_path / "words", "--config", source / "config_values.json")
    command = words("finetune", "captioning", "--init", source / "model.pth", *settings, "--data", place / "my.csv")
    short = ("--train.samples", "8", "--task.generation.max-length", "4")
    assert main([*command, *FAST, *short, "--out", str(tmp_path / "run")]) == 0
    assert "104 weights from the checkpoint" in capsys.readouterr().err
    run = vlp.load(tmp_path / "run")
    assert run.tokenizer.vocabulary.size < 64 and isinstance(run.caption([place / "p0.png"])[0], str)


def test_forgetting_is_scored_with_the_finetuned_weights_in_the_checkpoint(place):
    loaded, other = (vlp.load(place / "checkpoint") for _ in range(2))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    for name, tensor in other.model.state_dict().items():
        if name.startswith("vision."):
            tensor.zero_()
    del other.model.text, other.model.embed  # as a captioner has none
    with transplanted(loaded.model, other.model):
        now = loaded.model.state_dict()
        assert not now["vision.vit.pos_embed"].any()
        assert all(torch.equal(now[name], before[name]) for name in now if name.startswith("text."))
    torch.testing.assert_close(loaded.model.state_dict(), before, rtol=0, atol=0)


def test_check_finds_what_is_twice_there_leaks_or_is_cut(place, tmp_path, capsys):
    images = {name: toys.picture(tmp_path / f"{name}.png", name) for name in toys.COLORS}
    shutil.copy(tmp_path / "red.png", tmp_path / "again.png")
    ask = "What color is it?"
    train = [{"image": images[name], "question": ask, "answer": name} for name in ("red", "green", "green")]
    val = [{"image": "again.png", "question": ask, "answer": "red"}, {"image": images["blue"], "question": ask * 30,
            "answer": "violet"}]  # fmt: skip
    tables = [toys.write_table(tmp_path / f"{n}.csv", rows) for n, rows in (("train", train), ("val", val))]
    assert main(words("data", "check", *tables, "--checkpoint", place / "checkpoint", "--device", "cpu")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"train 1, 2 (2 samples): same image and text: '{ask}'" in lines
    assert "val 0: leak: the image of 0 in train" in lines
    assert "val 1: answer outside the list: 'violet' is not among the 2 of data.train" in lines
    assert any(line.startswith("val 1: long text: ") and line.endswith("data.max_length keeps 16") for line in lines)
    assert any("tokens" in line for line in lines) and "train: 2 different answers" in lines


def test_columns_have_many_names(tmp_path):
    toys.picture(tmp_path / "a.png", "red")
    table = toys.write_table(tmp_path / "t.csv", [{"File Name": "a.png", "Query": "is it red?", "label": "yes"}])
    task, data = guess_columns(VqaConfig(), DataConfig(train=str(table)), str(table))
    assert (data.text, task.answer) == ("Query", "label")
    survey = task.survey(open_reader(str(table), text=data.text), task.settings(data))
    assert survey.answers == ("yes",)
    known = toys.write_table(tmp_path / "k.csv", [{"image": "a.png", "question": "is it?", "answer": "no"}])
    assert guess_columns(VqaConfig(), DataConfig(), str(known)) == (VqaConfig(), DataConfig())
    assert guess_columns(CaptioningConfig(), DataConfig(), "emoji:noto") == (CaptioningConfig(), DataConfig())


def test_a_split_that_the_table_names_is_taken(tmp_path, caplog):
    parts = ["train", "restval", "val", "test"]
    table = toys.write_table(
        tmp_path / "k.csv",
        [{"image": toys.picture(tmp_path / f"{n}.png", "red", seed=n), "caption": "x", "split": part} for n, part in
         enumerate(parts)],
    )  # fmt: skip
    found = named_split(DataConfig(train=str(table)))
    assert found is not None and found.train == {"split": ["restval", "train"]}
    assert (found.val, found.test) == ({"split": ["val"]}, {"split": ["test"]})
    assert named_split(DataConfig(train=str(table), where={"split": "train"})) is None
    other = toys.write_table(tmp_path / "o.csv", [{"image": "0.png", "caption": "x", "split": "a"}])
    assert named_split(DataConfig(train=str(other))) is None
    row = {"image": "0.png", "caption": "y"}
    one, two = (
        str(toys.write_table(tmp_path / f"{part}.csv", [row | {"split": part}])) for part in ("training", "valid")
    )
    found = named_split(DataConfig(train=(one, two)))
    assert found is not None and (found.train, found.val) == ({"split": ["training"]}, {"split": ["valid"]})
    assert named_split(DataConfig(train=one)) is None, "of one part alone there is no split"
    for filters, number in ((found.train, 1), (found.val, 1), (None, 2)):
        assert len(open_reader((one, two), where=filters)) == number, "a table may have nothing of a part"
    with pytest.raises(ValueError, match="matches no sample"):
        open_reader((one, two), where={"split": "test"})
    plain = str(toys.write_table(tmp_path / "plain.csv", [row]))
    assert named_split(DataConfig(train=(str(table), plain))) is None
    assert "named by column 'split' of some tables only" in caplog.text


def test_what_leaks_is_said_by_a_sample(place, tmp_path, caplog):
    row = {"image": toys.picture(tmp_path / "red.png", "red"), "caption": "a plain red square"}
    one, two = (toys.write_table(tmp_path / f"{name}.csv", [row]) for name in ("one", "two"))
    run = FinetuneConfig(task=CaptioningConfig(), data=DataConfig(train=str(one), val=str(two)))
    look_at(run, open_reader(str(one)), open_reader(str(two)))
    said = "1 images of data.val are in data.train too: sample 0 of data.val shows the image of 0 in train; "
    assert said in caplog.text


def test_evaluations_of_other_settings_go_elsewhere():
    def name(average=None, **task):
        tree = {"task": {"kind": "captioning", **task}, "checkpoint": "runs/a", "data": {"val": "my/test.csv"}}
        return name_of(build(EvaluateConfig, tree), average)

    assert name() == name(batch=3) == "captioning-a-test"
    assert name(generation={"method": "greedy"}) == "captioning-a-test-generation.method=greedy"
    assert name(average=False) == "captioning-a-test-last"
    long = {"generation": {"method": "nucleus", "top_p": 0.5, "max_length": 9}, "neighbours": 5, "java": ()}
    names = {name(), name(**long), name(**long | {"neighbours": 6})}
    assert len(names) == 3 and max(map(len, names)) <= 100


@pytest.mark.parametrize(
    ("samples", "trainable", "expected"),
    [
        (36, 66_000, {"global_batch": 8, "samples": 1_800, "lr": 1e-3, "warmup": 90}),
        (5_000, 8_000_000, {"global_batch": 256, "samples": 128_000, "lr": 1e-3, "warmup": 6_400}),
        (566_747, 220_000_000, {"global_batch": 256, "samples": 5_667_470, "lr": 4e-5, "warmup": 283_373}),
    ],
)
def test_batch_duration_and_rate_follow_from_data_and_model(samples, trainable, expected):
    values, reasons = choose(TrainConfig(), ALL[:4], Measured(samples, trainable, 0, GIB))
    assert values == expected and set(reasons) == set(expected)


def test_what_flags_state_is_left_and_counts():
    assert given(["--train.samples=5", "--train.global-batch", "32", "--data.text", "x"]) == {"samples", "global_batch"}
    config = TrainConfig(samples=640, global_batch=32)
    values, _ = choose(config, ("lr", "warmup", "micro_batch"), Measured(10, 4_000_000, 64 * 2**20, GIB))
    assert values == {"lr": 7e-4, "warmup": 32, "micro_batch": 8}, "8 samples of 64 MiB fit into 0.6 GiB less 46 MiB"
    values, _ = choose(config, ("micro_batch",), Measured(10, 4_000_000, 2**20, 10 * GIB))
    assert values == {"micro_batch": 32}
    values, _ = choose(config, ("micro_batch",), Measured(10, 4_000_000, GIB, GIB))
    assert values == {"micro_batch": 1}


def test_activations_are_measured_and_nothing_changes(place):
    data = {"train": str(place / "my.csv"), "workers": 0, "max_length": 16}
    loaded = vlp.load(place / "checkpoint")
    run = RunConfig(model=loaded.model.config, objectives=dict(loaded.config.objectives), data=DataConfig(**data))
    parts = assemble(run, tokenizer=loaded.tokenizer, pretrained=False)
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    state = torch.get_rng_state()
    found = measure(parts, pair_example)
    assert found.samples == 40 and found.trainable == sum(one.numel() for one in parts.model.parameters())
    tokens = 17 * 32 * 4  # one state of a picture's tokens
    assert 10 * tokens < found.activations < 1000 * tokens and found.free > 2**20
    assert torch.equal(state, torch.get_rng_state()) and parts.model.training
    torch.testing.assert_close(parts.model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("mix", ["drawn", "joint"])
def test_a_source_of_small_share_is_measured_too(place, tmp_path, mix):
    """Images alone keep the pairs' pictures; texts alone, a thousandth of a step, keep less and change nothing."""
    (tmp_path / "lines.txt").write_text("a plain red square\n" * 8)
    loaded = vlp.load(place / "checkpoint")
    data = {"train": str(place / "my.csv"), "workers": 0, "max_length": 16, "mix": mix}
    objectives: dict = dict(loaded.config.objectives)
    found = []
    for sources in ({}, {"text": {"train": str(tmp_path / "lines.txt"), "only": "text", "ratio": 0.001}}):
        config = build(DataConfig, {**data, "sources": sources})
        more = {"words": build(RunConfig, {"objectives": {"mlm": {"alone": True, "source": "text"}}}).objectives["mlm"]}
        run = RunConfig(model=loaded.model.config, objectives=objectives | (more if sources else {}), data=config)
        found.append(measure(assemble(run, tokenizer=loaded.tokenizer, pretrained=False), pair_example))
    assert found[1].samples == found[0].samples == 40
    assert found[1].activations == found[0].activations > 0


def test_the_best_is_kept_and_patience_ends_the_run(monkeypatch):
    scores = iter([0.1, 0.5, 0.4, 0.5, 0.3])
    task = CaptioningConfig()
    monkeypatch.setattr(CaptioningConfig, "evaluate", lambda *_: Result({"CIDEr-D": next(scores)}, {}, []))
    parts = Parts(RunConfig(), None, None, None)
    select = Selection(task, parts, None, every=1, patience=3)
    verdicts = [select(None, seen) for seen in range(5)]
    assert [one.best for one in verdicts] == [True, True, False, True, False], "of equals the later"
    assert [one.stop for one in verdicts] == [False, False, False, False, True]
    again = Selection(task, parts, None, every=1, patience=3)
    again.load_state_dict(select.state_dict())
    assert again.exhausted and again.first_best == 1


def test_memory_that_torch_holds_in_reserve_is_free(monkeypatch):
    for name, value in {"mem_get_info": (5_000, 80_000), "memory_reserved": 30_000, "memory_allocated": 10_000}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    assert free_memory(torch.device("cuda", 0)) == 25_000
