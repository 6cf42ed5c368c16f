"""Visual dialogue on emoji: ranking by matching and by writing, floors, submission."""

import json
from pathlib import Path

import emojis
import numpy as np
import pytest
import torch
import toys
from emoji_pictures import COLORS, SHAPES, picture, styles

from downstream.dialogue import DialogueConfig, score_texts
from downstream.dialogue_data import context, read_round, with_candidate
from downstream.evaluate import EvaluateConfig, parts_of, predict
from downstream.finetune import finetune, finetune_config
from objectives.base import Draw, Fuse
from vlp.data.batch import pad_texts
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Sample, open_reader
from vlp.generate import room_of
from vlp.passes import memory_of
from vlp.rank import rank_answers

CPU = torch.device("cpu")
SENTENCES = ["what color is it? what is it? a picture of a thing.", *COLORS, *SHAPES]


def table(folder: Path, name: str, number: int, labelled: bool = True) -> Path:
    """Two questions about an emoji; its colour, then its shape with the colour in the history."""
    draw, rows = np.random.default_rng(number), []
    for i in range(number // 2):
        color, shape = COLORS[int(draw.integers(4))], SHAPES[int(draw.integers(3))]
        style = styles(name == "test")[i % len(styles(name == "test"))]
        row = {"image": picture(folder, style, shape, color), "image_id": i, "caption": "a picture of a thing"}
        asked = (("what color is it", color, COLORS), ("what is it", shape, SHAPES))
        for turn, (question, answer, options) in enumerate(asked):
            given = [options[int(k)] for k in draw.permutation(len(options))]
            one = {"round_id": turn + 1, "question": question, "options": given, "history": []}
            one["history"] = [[asked[0][0], asked[0][1]]] if turn else []
            if labelled:
                one |= {"answer_index": given.index(answer)}
                one |= {"relevance": [float(option == answer) for option in given]} if turn else {}
            rows.append(row | one)
    return toys.write_table(folder / f"{name}.jsonl", rows)


def sample(**fields) -> Sample:
    return Sample("7", (), ("is it red",), fields)


def test_a_text_has_the_newest_first():
    one = read_round(sample(caption="a cat ", history=[["is it big?", "no"], ["old", "yes!"]], options=["a", "b"]))
    assert context(one, 10) == "is it red? old? yes! is it big? no. a cat."
    assert context(one, 1) == "is it red? old? yes! a cat." and context(one, 0) == "is it red? a cat."
    assert with_candidate(one, "b", 1) == "is it red? b. old? yes! a cat."
    csv = read_round(sample(history='[["a", "b"]]', options='["x", "y"]', relevance="[0.5, 1]", answer_index="1"))
    assert csv.history == (("a", "b"),) and csv.relevance == (0.5, 1.0) and csv.answer == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": ["a"], "answer_index": 1}, "answer_index 1 is none of its 1 options"),
        ({"options": ["a"], "relevance": [1, 0]}, "1 options have 2 relevances"),
        ({"options": "[", "relevance": []}, "options '.*' is not JSON"),
        ({"options": [1]}, "options are not texts"),
        ({"history": ["a"]}, "not a list of pairs"),
        ({"history": {"a": 1}}, "history is not a list"),
        ({"options": ["a"], "answer_index": "x"}, "should be numbers"),
    ],
)
def test_what_is_no_round_is_named(fields, message):
    with pytest.raises(BadSample, match=message):
        read_round(sample(**fields))


def test_matching_ranks_as_the_model_matches(tmp_path):
    """Every candidate's rank is that of the pair of image and text by the loaded model's own ``match``."""
    loaded = emojis.checkpoint(tmp_path, SENTENCES, ("itm", "mlm"))
    path, task = table(tmp_path, "test", 8), DialogueConfig(pairs=200)
    parts = parts_of(loaded, task.settings(loaded.config.data))
    reader = open_reader(str(path), text="question")
    result = task.evaluate(parts, reader, task.survey(reader, parts.run.data))
    own = []
    for row, stored in zip(result.predictions, map(json.loads, path.read_text().splitlines())):
        asked = read_round(Sample("", (), (stored["question"],), stored))
        texts = [with_candidate(asked, option, 10) for option in asked.options]
        scores = loaded.match([tmp_path / stored["image"]] * len(texts), texts)
        best = scores.argsort(descending=True).tolist()
        assert [best.index(i) + 1 for i in range(len(best))] == row["ranks"]
        assert row["best"] == asked.options[best[0]] and row["answer"] == asked.options[asked.answer]
        own.append(row["ranks"][asked.answer])
    assert result.metrics["MRR"] == pytest.approx(np.mean([1 / rank for rank in own]))
    assert result.metrics["NDCG"] == pytest.approx(np.mean([float(rank == 1) for rank in own[1::2]])), "one is relevant"
    assert result.floors["chance"]["R@1"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert set(result.floors) == {"chance", "majority", "question only"}
    assert "ranked by matching" in result.notes[0] and "NDCG is of 4 questions" in result.notes[1]


def test_submission_is_evalais():
    rows = [{"key": "0", "image_id": 3, "round_id": 2, "ranks": [2, 1], "best": "no"}]
    assert DialogueConfig().submission(rows) == [{"image_id": 3, "round_id": 2, "ranks": [2, 1]}]
    with pytest.raises(ValueError, match="row '0' lacks round_id"):
        DialogueConfig().submission([{"key": "0", "image_id": 3, "ranks": [1]}])


def test_blind_floors(tmp_path):
    task, image = DialogueConfig(), toys.picture(tmp_path / "i.png", "red")
    path = toys.write_table(
        tmp_path / "t.jsonl",
        [
            {"image": image, "question": q, "options": ["yes", "no", "2"], "answer_index": a}
            for q, a in (("is it?", 0), ("is it?", 0), ("IS IT", 1), ("how many", 2), ("who", 0))
        ],
    )
    survey = task.survey(open_reader(str(path), text="question"), DataConfig(text="question"))
    asked = read_round(Sample("", (), ("how many?",), {"options": ["no", "2", "Yes", "maybe"]}))
    assert survey.majority(asked) == [2, 3, 1, 4] and survey.blind(asked) == [3, 1, 2, 4]


def test_finetuning_learns_which_answer_fits(tmp_path):
    """From a checkpoint that can match already: the first candidates are true, in a dialogue of two rounds."""
    loaded = emojis.checkpoint(tmp_path, SENTENCES, ("itm", "mlm"))
    rows = [json.loads(line) for line in table(tmp_path, "train", 16).read_text().splitlines()]
    for row in rows:
        row["answer_index"] = row["options"].index(COLORS[0] if COLORS[0] in row["options"] else SHAPES[0])
    data = {"train": str(toys.write_table(tmp_path / "said.jsonl", rows)), "workers": 0}
    data["val"] = data["train"]
    settings = {"task": {"kind": "dialogue"}, "data": data, "train": {**emojis.TRAIN, "samples": 960}, **emojis.QUIET}
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", CPU)
    assert done.before is not None and done.before.metrics["R@1"] < 1.0
    assert done.after.metrics["R@1"] == 1.0 and done.after.metrics["mean rank"] == 1.0


def test_false_answers_are_drawn_half_of_the_time():
    prepare = DialogueConfig().prepare(None)
    one = sample(options=["yes", "no", "yes"], answer_index=0)
    drawn = [prepare(one, np.random.default_rng(seed)) for seed in range(200)]
    assert {(e.text, int(e.targets["match"])) for e in drawn} == {("is it red? yes.", 1), ("is it red? no.", 0)}
    assert sum(int(e.targets["match"]) for e in drawn) == pytest.approx(100, abs=25)
    with pytest.raises(BadSample, match="so none is false"):
        [prepare(sample(options=["yes"], answer_index=0), np.random.default_rng(seed)) for seed in range(20)]
    written = DialogueConfig(generative=True).prepare(None)(one, np.random.default_rng(0))
    assert written.text == "is it red?" and written.other_texts == {"lm:answer": "yes"}
    with pytest.raises(BadSample, match="no answer_index"):
        prepare(sample(options=["yes", "no"]), np.random.default_rng(0))


def test_writing_ranks_by_log_likelihood(tmp_path):
    """The scores are those of ``rank_answers``, and a written answer needs no candidates."""
    objectives = {"lm": {"memory": "fused", "view": "lm:answer"}}
    decoder = {"kind": "causal", "width": 32, "heads": 4, "layers": 1, "memory": "text"}
    loaded = emojis.checkpoint(tmp_path, SENTENCES, objectives, decoder=decoder)
    model, task = loaded.model, DialogueConfig(generative=True)
    path = table(tmp_path, "test", 6)
    parts = parts_of(loaded, task.settings(loaded.config.data))
    result = task.evaluate(parts, open_reader(str(path), text="question"))
    assert "ranked by writing" in result.notes[0]
    asked = [
        read_round(Sample("", (), (one["question"],), one)) for one in map(json.loads, path.read_text().splitlines())
    ]
    images = [tmp_path / json.loads(line)["image"] for line in path.read_text().splitlines()]
    view, words = model.objectives["lm"].views["lm:answer"], loaded.tokenizer
    for row, one, image in zip(result.predictions, asked, images):
        with torch.no_grad():
            memory = memory_of(loaded._run([Fuse()], [image], [context(one, 10)])[Fuse()], "text")
        made = [view.make(*words.encode(each, 24), words.vocabulary, Draw().sample("", 0)) for each in one.options]
        best, scores = rank_answers(model, memory, pad_texts(made, "causal", words.vocabulary.pad), len(made))
        assert row["ranks"] == [best[0].tolist().index(i) + 1 for i in range(len(made))]
        found, number = score_texts(parts, memory, 0, one.options, "lm", 2)
        assert torch.allclose(found[best[0]], scores[0], atol=1e-5)
        assert number.tolist() == [len(words.encode(each, 24)[0]) - 1 for each in one.options]
    wide = parts_of(loaded, parts.run.data.model_copy(update={"max_length": 400}))
    number = score_texts(wide, memory, 0, ["it is red " * 50], "lm", 2)[1]
    assert number.tolist() == [room_of(model) - 1], "cut at what the decoder has room for, and counted so"
    per_word = DialogueConfig(generative=True, per_word=True).evaluate(parts, open_reader(str(path), text="question"))
    assert len(per_word.predictions) == 6
    rows = [{"image": images[0].name, "question": "what is it?"}]
    mine = EvaluateConfig(task=task, data=DataConfig(val=str(toys.write_table(tmp_path / "own.jsonl", rows))))
    assert predict(mine, loaded, tmp_path / "out.jsonl") == 1
    assert isinstance(json.loads((tmp_path / "out.jsonl").read_text())["best"], str)


def test_unlabelled_rounds_are_ranked_and_not_scored(tmp_path):
    loaded = emojis.checkpoint(tmp_path, SENTENCES, ("itm", "mlm"))
    path = table(tmp_path, "test", 4, labelled=False)
    mine = EvaluateConfig(task=DialogueConfig(), data=DataConfig(val=str(path), max_length=24))
    assert predict(mine, loaded, tmp_path / "out.jsonl") == 4
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert DialogueConfig().submission(rows)[1]["round_id"] == 2 and sorted(rows[0]["ranks"]) == [1, 2, 3, 4]
    parts = parts_of(loaded, DialogueConfig().settings(loaded.config.data))
    with pytest.raises(ValueError, match="no question has its answer"):
        DialogueConfig().evaluate(parts, open_reader(str(path), text="question"))
    with pytest.raises(ValueError, match="lacks a decoder over fused texts"):
        DialogueConfig(by="writing").evaluate(parts, open_reader(str(path), text="question"))
