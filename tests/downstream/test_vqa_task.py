import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from helpers import SIZES
from PIL import Image

import vlp
from downstream.evaluate import EvaluateConfig, evaluate, inherited, parts_of, predict
from downstream.finetune import finetune, finetune_config, finetune_table
from downstream.finetune_config import FinetuneConfig
from downstream.vqa import VqaConfig, VqaSurvey, read_truth
from objectives import AnswerConfig
from vlp.config import build
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Sample, open_reader

CPU = torch.device("cpu")
TASK = VqaConfig()


def sample(**fields):
    return Sample("7", (), ("what is it?",), fields)


def table(folder: Path, rows: list[dict]) -> Path:
    """A table of questions about one image."""
    Image.new("RGB", (8, 8)).save(folder / "i.png")
    return toys.write_table(folder / "t.jsonl", [{"image": "i.png"} | row for row in rows])


def survey(path: Path, task: VqaConfig = TASK) -> VqaSurvey:
    data = task.settings(DataConfig())
    return task.survey(open_reader(str(path), text=data.text), data)


def test_answers_are_read_in_every_form():
    assert read_truth(sample(answer="A dog.")).scores == {"dog": 1.0}
    ten = ["red"] * 3 + ["blue"] * 7
    for value in (ten, json.dumps(ten), [{"answer": one, "answer_id": i} for i, one in enumerate(ten)]):
        truth = read_truth(sample(answers=value))
        assert truth.scores == pytest.approx({"red": 0.9, "blue": 1.0})
        assert truth.accuracy("Red") == pytest.approx(0.9)
    scored = read_truth(sample(answer_scores={"Two": 0.6}))
    assert scored.scores == {"2": 0.6} and scored.accuracy("two") == 0.6 and scored.accuracy("3") == 0.0
    assert read_truth(sample(reply="yes"), "reply").answers == ("yes",)
    assert read_truth(sample(caption="x")) is None
    with pytest.raises(BadSample, match="not JSON"):
        read_truth(sample(answers='["red"'))


def test_survey_ranks_answers_and_knows_each_question(tmp_path):
    rows = [("Is it  red?", "yes"), ("is it red?", "yes"), ("is it red?", "no"), ("is it big?", "no"), ("which?", "no")]
    found = survey(table(tmp_path, [{"question": q, "answer": a} for q, a in rows]))
    assert found.answers == ("no", "yes") and found.weights == (3.0, 2.0) and found.samples == 5
    assert found.blind("IS IT RED?") == "yes" and found.blind("is it big?") == "no"
    assert found.blind("never asked") == "no"
    assert TASK.answer_list(found) == ("no", "yes")
    with pytest.raises(ValueError, match=r"task\.min_count 3 leaves 1 of 2 answers; lower it"):
        VqaConfig(min_count=3).answer_list(found)


def test_annotators_answers_weigh_their_soft_scores(tmp_path):
    rows = [{"question": "q", "answers": ["cat"] * 2 + ["dog"] * 8}, {"question": "q", "answers": ["cat"] * 10}]
    found = survey(table(tmp_path, rows))
    assert dict(zip(found.answers, found.weights)) == pytest.approx({"cat": 1.6, "dog": 1.0})


def test_floors_and_accuracy_of_a_hand_made_set(tmp_path):
    """The head's weights are chosen so that the model always answers `no`."""
    loaded = vlp.load(toys.checkpoint(tmp_path, {"answer": {"answers": ["no", "yes", "red"]}}))
    last = loaded.model.objectives["answer"].head[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([5.0, 0.0, -5.0])
    rows = [
        {"question": "a", "answer": "No.", "question_type": "one"},
        {"question": "a", "answer": "yes", "question_type": "one"},
        {"question": "b", "answers": ["no"] * 2 + ["red"] * 8, "question_type": "two"},
        {"question": "new", "answer": "green", "question_type": "two"},
        {"question": "new", "answer": "", "question_type": "two"},
    ]
    reader = open_reader(str(table(tmp_path, rows)), text="question")
    known = VqaSurvey(("yes", "no", "red"), (5.0, 4.0, 2.0), {"a": "no", "b": "red"}, 11)
    parts = parts_of(loaded, TASK.settings(loaded.config.data))
    result = TASK.evaluate(parts, reader, known)
    assert result.metrics == pytest.approx(
        {"accuracy": 1.6 / 4, "accuracy/question_type/one": 0.5, "accuracy/question_type/two": 0.3}
    )
    assert result.floors["majority"]["accuracy"] == pytest.approx(1 / 4)
    assert result.floors["question only"]["accuracy"] == pytest.approx(2 / 4)
    assert list(result.bad) == ["4"] and "no answer" in result.bad["4"]
    assert any("0.750" in note for note in result.notes), "the list cannot give `green`"
    assert [row["answer"] for row in result.predictions] == ["no"] * 4


def test_gqa_is_scored_as_it_defines_and_names_what_its_numbers_lack(tmp_path):
    """The head's weights are chosen so that the model always answers `no`."""
    loaded = vlp.load(toys.checkpoint(tmp_path, {"answer": {"answers": ["no", "yes", "No."]}}))
    last = loaded.model.objectives["answer"].head[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([5.0, 0.0, -5.0])
    kinds = {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr", "steps": 2, "group": "color"}
    rows = [
        {"question_id": "01", "question": "is it red?", "answer": "no", "balanced": True, "entailed": ["03"], **kinds},
        {"question_id": "02", "question": "is it?", "answer": "No.", "balanced": True, "entailed": [], **kinds},
        {"question_id": "03", "question": "why?", "answer": "yes", "balanced": False, "entailed": [], **kinds},
    ]
    path = table(tmp_path, rows)
    (tmp_path / "choices.json").write_text(
        json.dumps({"01": {"valid": ["no"], "plausible": []}} | {"02": {"valid": [], "plausible": ["no"]}})
    )
    task = VqaConfig(metric="gqa", choices=str(tmp_path / "choices.json"))
    parts = parts_of(loaded, task.settings(loaded.config.data))
    known = survey(path, task)
    assert known.answers == ("No.", "no", "yes"), "answers are not normalised"
    result = task.evaluate(parts, open_reader(str(path), text="question"), known)
    assert result.metrics == pytest.approx(
        {
            "accuracy": 0.5,  # "No." is another answer, and the third question is not in the balanced set
            "binary": 0.5,
            "accuracy/structural/verify": 0.5,
            "accuracy/semantic/attr": 0.5,
            "accuracy/steps/2": 0.5,
            "accuracy/words/3": 1.0,
            "accuracy/words/2": 0.0,
            "consistency": 0.0,
            "validity": 0.5,
            "plausibility": 0.5,
            "distribution": 0.02,  # gold no 1, No. 1, given no 2: (1 / 1 + 1 / 1) / 100
        }
    )
    assert result.floors["majority"]["accuracy"] == 0.5 and "grounding" in " ".join(result.notes)
    assert task.submission(result.predictions) == [
        {"questionId": f"0{number}", "prediction": "no"} for number in (1, 2, 3)
    ]
    assert VqaConfig().submission([{"key": "0", "question_id": "7", "answer": "no"}]) == [
        {"question_id": 7, "answer": "no"}
    ]
    with pytest.raises(ValueError, match="question 0 has no field question_id"):
        task.submission([{"key": "0", "answer": "no"}])
    only = open_reader(str(path), text="question", where={"question_id": ["01", "02"]})
    bare = VqaConfig(metric="gqa").evaluate(parts, only, known)
    assert not {"consistency", "validity"} & set(bare.metrics)
    assert "--all-questions" in " ".join(bare.notes) and "--task.choices" in " ".join(bare.notes)


def test_an_answer_list_may_come_from_a_file(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(["Blue", "t-shirt", "blue"]))
    task = VqaConfig(answer_file=str(tmp_path / "list.json"))
    assert task.answer_list(LIST) == ("Blue", "t-shirt", "blue")
    run = finetune_config(vlp.load(toys.checkpoint(tmp_path)), "x", {"task": {"kind": "vqa"}})
    assert task.adapt(run, {}, LIST).objectives["answer"].answers == ("blue", "t shirt")
    (tmp_path / "list.txt").write_text("red\n\ngreen\n")
    assert VqaConfig(answer_file=str(tmp_path / "list.txt")).answer_list(LIST) == ("red", "green")
    for content, message in (("{}", "not a list of texts"), ("[", "not JSON"), ('["a"]', "1 answers; give at least")):
        (tmp_path / "list.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            task.answer_list(LIST)


def test_training_examples_hold_soft_targets(tmp_path):
    run = TASK.adapt(finetune_config(vlp.load(toys.checkpoint(tmp_path)), "x", {"task": {"kind": "vqa"}}), {}, LIST)
    example = TASK.prepare(run)(sample(answers=["red"] * 3 + ["blue"] * 6 + ["pink"]), np.random.default_rng(0))
    assert example.text == "what is it?"
    assert example.targets["answer_scores"].tolist() == pytest.approx([1.0, 0.0, 0.9])
    written = VqaConfig(head="open").prepare(run)
    drawn = [
        written(sample(answer_scores={"red": 0.3, "blue": 0.9, "no": 0.0}), np.random.default_rng(seed)).other_texts
        for seed in range(400)
    ]
    assert {one["lm:answer"] for one in drawn} == {"red", "blue"}
    assert sum(one["lm:answer"] == "red" for one in drawn) == pytest.approx(100, abs=35)


LIST = VqaSurvey(("blue", "green", "red"), (3.0, 2.0, 1.0), {}, 6)


def test_a_row_of_several_questions_is_named_not_cut_to_its_first(tmp_path):
    """Their answers could be anyone's; a row without a question is as bad, in training too."""
    loaded = vlp.load(toys.checkpoint(tmp_path, {"answer": {"answers": ["no", "yes"]}}))
    rows = [{"question": asked, "answer": "no"} for asked in ("a", ["b", "c"], "")]
    reader = open_reader(str(table(tmp_path, rows)), text="question")
    result = TASK.evaluate(parts_of(loaded, DataConfig(text="question")), reader)
    assert len(result.predictions) == 1 and result.bad.keys() == {"1", "2"}
    assert result.bad["1"] == "2 texts, of which one is read; give each a sample of its own"
    run = build(FinetuneConfig, {"task": {"kind": "vqa"}, "objectives": {"answer": {"answers": ("no", "yes")}}})
    for texts, match in ((("b", "c"), "2 texts"), ((), "no text")):
        with pytest.raises(BadSample, match=match):
            TASK.prepare(run)(Sample("7", (), texts, {"answer": "no"}), np.random.default_rng(0))


def test_a_checkpoints_answers_stay_where_they_hold_the_datas(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, {"answer": {"answers": ["red", "green", "blue", "pink"]}}))
    run = finetune_config(loaded, "x", {"task": {"kind": "vqa"}})
    adapted = TASK.adapt(run, loaded.config.objectives, LIST)
    assert adapted.objectives["answer"].answers == ("red", "green", "blue", "pink")
    other = VqaSurvey(("blue", "cyan"), (3.0, 2.0), {}, 6)
    assert TASK.adapt(run, loaded.config.objectives, other).objectives["answer"].answers == ("blue", "cyan")


def test_a_head_of_another_task_leaves_neither_its_loss_nor_its_hidden_words(tmp_path):
    verdicts = {"answer": {"answers": ["no", "yes"], "loss": "ce", "head": "relu"}}
    loaded = vlp.load(toys.checkpoint(tmp_path, verdicts))
    run = finetune_config(loaded, "x", {"task": {"kind": "vqa"}})
    found = TASK.adapt(run, loaded.config.objectives, LIST).objectives["answer"]
    assert (found.answers, found.loss, found.head) == (("blue", "green", "red"), "bce", "relu")
    hidden = {"answer": AnswerConfig(answers=("blue", "green", "red", "pink"), masked=True, loss="ce")}
    found = TASK.adapt(run, hidden, LIST).objectives["answer"]
    assert (len(found.answers), found.loss, found.masked) == (4, "ce", False), "the head itself fits"
    stated = run.model_copy(update={"objectives": {"answer": AnswerConfig(loss="ce")}})
    assert TASK.adapt(stated, hidden, LIST).objectives["answer"].loss == "ce"


def test_ranked_answers_are_those_of_the_training_data_while_it_trains(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path, ("itm",)))
    train, test = (str(toys.vqa_table(tmp_path, name, 8, seed, kinds=1)) for name, seed in (("a", 1), ("b", 2)))
    settings = {
        "task": {"kind": "vqa", "head": "ranked"},
        "data": {"train": train, "val": test, "workers": 0},
        "train": {"samples": 16, "global_batch": 8, "micro_batch": 8},
        "tune": {"every": 8, "probe": None},
    }
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", CPU)
    assert done.outcome.best is not None and 0 <= done.after.metrics["accuracy"] <= 1


def test_finetuning_answers_all_and_leaves_everything_behind(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path))
    train, test = (toys.vqa_table(tmp_path, name, number, seed) for name, number, seed in (("a", 200, 1), ("b", 60, 2)))
    data = {"train": str(train), "val": str(test), "workers": 0}
    settings = {"task": {"kind": "vqa", "blank_images": True}, "data": data, "train": toys.TRAIN}
    run = finetune_config(loaded, "toy", settings)
    done = finetune(run, loaded, tmp_path / "run", CPU, command="vlp finetune vqa")
    assert done.before is None and "answer head" in done.lacked
    assert done.after.metrics["accuracy"] >= 0.95
    floors = {name: floor["accuracy"] for name, floor in done.after.floors.items()}
    assert set(floors) == {"majority", "question only", "blank images"} and max(floors.values()) < 0.7

    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["metrics"] == done.after.metrics and written["floors"] == done.after.floors
    assert written["split"] == "b.csv" and written["data"]["fingerprint"] == open_reader(str(test)).fingerprint
    assert written["counts"] == {"samples": 60, "bad": 0} and written["samples"] == toys.TRAIN["samples"]
    assert len(written["checkpoint"]["sha256"]) == 64 and written["checkpoint"] != written["init"]
    assert written["versions"]["torch"] == torch.__version__.split("+")[0] and written["command"] == "vlp finetune vqa"
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert rows == done.after.predictions and rows[1]["question"] == "What color is it?"

    finetuned = vlp.load(tmp_path / "run")
    asked = [row["question"] for row in rows]
    assert finetuned.answer([tmp_path / f"b{i}.png" for i in range(60)], asked) == [row["answer"] for row in rows]
    again = EvaluateConfig(
        task=TASK, checkpoint="run", data=build(DataConfig, inherited(finetuned.config).tree["data"], data)
    )
    result = evaluate(again, finetuned, tmp_path / "eval")
    assert result.metrics == done.after.metrics
    assert (
        json.loads((tmp_path / "eval" / "result.json").read_text())["checkpoint"]["sha256"]
        == written["checkpoint"]["sha256"]
    )
    unlabelled = toys.write_table(tmp_path / "own.csv", [{"image": "b1.png", "question": "what color is it"}])
    own = again.model_copy(update={"data": again.data.model_copy(update={"val": str(unlabelled)})})
    assert predict(own, finetuned, tmp_path / "own.jsonl") == 1
    assert json.loads((tmp_path / "own.jsonl").read_text())["answer"] == rows[1]["answer"]
    assert [column.header for column in finetune_table(run, done).columns][:3] == ["metric", "model", "majority"]


@pytest.mark.parametrize("decoder", ["new", "pretrained"])
def test_generative_finetuning_writes_answers(tmp_path, decoder):
    names = ("itc", "itm", "lm") if decoder == "pretrained" else ("itc", "itm")
    loaded = vlp.load(toys.checkpoint(tmp_path, names))
    train, test = (
        toys.vqa_table(tmp_path, name, number, seed, kinds=1) for name, number, seed in (("a", 64, 1), ("b", 16, 2))
    )
    settings = {
        "task": {"kind": "vqa", "head": "open"},
        "data": {"train": str(train), "val": str(test), "workers": 0},
        "train": toys.TRAIN | {"samples": 2400},
    }
    run = finetune_config(loaded, "toy", settings)
    done = finetune(run, loaded, tmp_path / "run", CPU)
    assert done.after.metrics["accuracy"] >= 0.95
    assert ("objectives.lm" in {name[:13] for name in done.transfer.missing}) == (decoder == "new")
    assert not any(name.startswith("decoder.blocks") for name in done.transfer.missing), "they begin as the fusion's"
    rows = done.after.predictions
    finetuned = vlp.load(tmp_path / "run")
    images, asked = [tmp_path / f"b{i}.png" for i in range(16)], [row["question"] for row in rows]
    assert finetuned.answer(images, asked) == [row["answer"] for row in rows]


def test_ranked_answers_are_those_of_the_model_api(tmp_path):
    objectives = {"lm": {"memory": "fused", "view": "lm:answer"}}
    sizes = {"kind": "causal", **SIZES, "memory": "text"}
    loaded = vlp.load(toys.checkpoint(tmp_path, objectives, decoder=sizes))
    test = toys.vqa_table(tmp_path, "b", 12, seed=2)
    images = [tmp_path / f"b{i}.png" for i in range(12)]
    (tmp_path / "list.txt").write_text(
        "\n".join(given := ["green", "blue", "yellow", "red", "striped", "a plain square"])
    )
    task = VqaConfig(head="ranked", k=4, answer_file=str(tmp_path / "list.txt"), batch=5)
    parts, reader = parts_of(loaded, task.settings(loaded.config.data)), open_reader(str(test), text="question")
    rows = task.evaluate(parts, reader).predictions
    assert [row["answer"] for row in rows] == loaded.answer(images, [row["question"] for row in rows], given, k=4)
    assert all(0.25 <= row["probability"] <= 1 for row in rows), "among four answers the best has a quarter at least"
    assert [row["answer"] for row in task.predict(parts, reader)] == [row["answer"] for row in rows]
    written = VqaConfig(head="open", generation={"max_length": 24}).evaluate(parts, reader).predictions
    assert [row["answer"] for row in written] == loaded.answer(images, [row["question"] for row in rows])
    with pytest.raises(ValueError, match=r"ranks a list of answers; name it with --task\.answer-file"):
        VqaConfig(head="ranked").evaluate(parts, reader)
    with pytest.raises(ValueError, match=r"lacks an answer head \(objective answer\); finetune"):
        VqaConfig(head="closed").evaluate(parts, reader)


def test_mistakes_are_one_line(tmp_path):
    loaded = vlp.load(toys.checkpoint(tmp_path))
    bare = {"image": "i.png", "question": "what?"}
    unanswered = table(tmp_path, [bare] * 3)
    with pytest.raises(
        ValueError,
        match=r"data\.train: none of its 3 samples .* no answer; its fields are image, question.*--task\.answer",
    ) as error:
        survey(unanswered)
    assert "\n" not in str(error.value)
    captions = toys.write_table(tmp_path / "c.csv", [{"image": "i.png", "caption": "x", "answer": "y"}])
    with pytest.raises(ValueError, match="no column 'question'; columns: image, caption, answer"):
        survey(captions)
    run = finetune_config(loaded, "x", {"task": {"kind": "vqa"}, "data": {"train": str(unanswered)}})
    with pytest.raises(ValueError, match=r"the 3 samples show 1 image that can be read, .* --data\.val"):
        finetune(run, loaded, tmp_path / "run", CPU)
    with pytest.raises(ValueError, match=r"lacks an answer head.*vlp finetune vqa first"):
        TASK.evaluate(
            parts_of(loaded, TASK.settings(DataConfig(max_length=8))),
            open_reader(str(table(tmp_path, [bare | {"answer": "x"}]))),
        )
    towers = vlp.load(toys.checkpoint(tmp_path, ("itc",), fusion={"kind": "none"}))
    answered = table(tmp_path, [bare | {"answer": "x"}, bare | {"answer": "y"}])
    run = finetune_config(
        towers, "x", {"task": {"kind": "vqa"}, "data": {"train": str(answered), "val": str(answered)}}
    )
    with pytest.raises(ValueError, match=r"objective answer needs a fusion, but model\.fusion\.kind is none"):
        finetune(run, towers, tmp_path / "run", CPU)


def test_easy_vqa_is_read_in_its_official_split():
    pytest.importorskip("easy_vqa")
    train, test = open_reader("easy-vqa:train"), open_reader("easy-vqa:test")
    assert (len(train), len(test)) == (38575, 9673) and train.fingerprint != test.fingerprint
    assert test[0].fields.keys() == {"question", "answer", "image_id"} and test[0].texts == (
        test[0].fields["question"],
    )
    only = open_reader("easy-vqa:test", where={"answer": "yes"})
    assert 0 < len(only) < len(test) and only[3].fields["answer"] == "yes"
    with pytest.raises(ValueError, match="'easy-vqa:val' is not a split"):
        open_reader("easy-vqa:val")


def test_what_a_checkpoint_reads_is_read_again(tmp_path):
    """The region that is the whole image; in evaluations also the words before texts, which a finetuning states."""
    config = vlp.load(toys.checkpoint(tmp_path, ("itm",))).config
    config = config.model_copy(update={"data": config.data.model_copy(update={"whole_region": True, "prefix": "vqa:"})})
    evaluated, trained = (inherited(config, training).tree["data"] for training in (False, True))
    assert evaluated["whole_region"] and trained["whole_region"]
    assert evaluated["prefix"] == "vqa:" and "prefix" not in trained
