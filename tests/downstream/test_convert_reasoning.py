"""Converters of NLVR2, SNLI-VE, VCR and MOSI on entries of exactly the official formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from downstream.convert import CONVERTERS
from downstream.convert.types import Bad
from vlp.cli import main


def lines(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    return path


def split_bad(entries) -> tuple[list[dict], dict[str, str]]:
    entries = list(entries)
    return [e for e in entries if not isinstance(e, Bad)], {e.key: e.reason for e in entries if isinstance(e, Bad)}


NLVR2 = {
    "validation": {"4": "True"},
    "sentence": "An image shows one leather pencil case, displayed “open” — à plat.",
    "left_url": "a",
    "right_url": "b",
    "identifier": "train-10171-0-0",
    "writer": 103,
    "synset": "pencil case",
    "query": "pencil case1",
    "label": "True",
    "directory": 65,
}


def test_nlvr2(tmp_path):
    dev = {key: value for key, value in NLVR2.items() if key != "directory"} | {
        "identifier": "dev-850-3-1",
        "label": "False",
    }
    hidden = {"identifier": "test2-0-0-0", "sentence": "Two dogs."}
    bad = [
        {"sentence": "x", "label": "True"},
        dev | {"sentence": "", "identifier": "dev-1-0-0"},
        dev | {"label": "maybe", "identifier": "dev-2-0-0"},
        dev | {"identifier": "dev-850"},
    ]
    rows, reasons = split_bad(CONVERTERS["nlvr2"](lines(tmp_path / "train.json", [NLVR2, dev, hidden, *bad])))
    assert rows[0] == {
        "left": "train/65/train-10171-0-img0.png",
        "right": "train/65/train-10171-0-img1.png",
        "sentence": NLVR2["sentence"],
        "label": "True",
        "identifier": "train-10171-0-0",
        "split": "train",
    }
    assert rows[1]["left"] == "dev/dev-850-3-img0.png" and rows[1]["label"] == "False" and rows[1]["split"] == "dev"
    assert rows[2]["right"] == "test2/test2-0-0-img1.png" and "label" not in rows[2]
    assert reasons == {
        "line 4": "no field identifier like dev-850-0-1",
        "dev-1-0-0": "no field sentence",
        "dev-2-0-0": "label 'maybe' is neither True nor False",
        "dev-850": "no field identifier like dev-850-0-1",
    }


def test_snli_ve(tmp_path):
    entry = {
        "annotator_labels": ["entailment", "entailment", "neutral"],
        "captionID": "4705552913.jpg#2",
        "gold_label": "entailment",
        "pairID": "4705552913.jpg#2r1e",
        "sentence1": "Two women are embracing while holding to go packages.",
        "sentence2": "Zwei Frauen umarmen sich früh.",
        "Flickr30K_ID": "4705552913",
    }
    others = [
        entry | {"gold_label": "-", "pairID": "a"},
        {key: value for key, value in entry.items() if key != "Flickr30K_ID"} | {"pairID": "b"},
        entry | {"Flickr30K_ID": 36979, "gold_label": "neutral"},
    ]
    rows, reasons = split_bad(CONVERTERS["snli_ve"](lines(tmp_path / "snli_ve_dev.jsonl", [entry, *others])))
    assert rows[0] == {
        "image": "4705552913.jpg",
        "sentence": "Zwei Frauen umarmen sich früh.",
        "label": "entailment",
        "pair_id": "4705552913.jpg#2r1e",
        "split": "dev",
    }
    assert rows[1]["image"] == "36979.jpg" and len(rows) == 2
    assert reasons == {"a": "no consensus on its label (-)", "b": "no field Flickr30K_ID"}


VCR = {
    "movie": "3015_CHARLIE_ST_CLOUD",
    "objects": ["person", "person", "person", "car"],
    "interesting_scores": [0],
    "answer_likelihood": "possible",
    "img_fn": "lsmdc_3015_CHARLIE_ST_CLOUD/3015_CHARLIE_ST_CLOUD_00.23.57.935-00.24.00.783@0.jpg",
    "metadata_fn": "lsmdc_3015_CHARLIE_ST_CLOUD/3015_CHARLIE_ST_CLOUD_00.23.57.935-00.24.00.783@0.json",
    "question": ["Does", [0, 1], "feel", "comfortable", "in", [3], "'s", "café", "?"],
    "answer_choices": [
        [[0], "feels", "comfortable", "."],
        ["No", ",", [0, 1, 2], "do", "n't", "."],
        ["Yes", "."],
        ["No", "."],
    ],
    "answer_label": 1,
    "rationale_choices": [["They", "are", str(number), "."] for number in range(4)],
    "rationale_label": 2,
    "img_id": "val-0",
    "question_number": 0,
    "annot_id": "val-0",
    "match_fold": "val-0",
    "match_index": 0,
}


def test_vcr(tmp_path):
    rows, reasons = split_bad(CONVERTERS["vcr"](lines(tmp_path / "val.jsonl", [VCR])))
    assert not reasons and [row["part"] for row in rows] == ["answer", "rationale"]
    assert rows[0] == {
        "image": VCR["img_fn"],
        "metadata": VCR["metadata_fn"],
        "annot_id": "val-0",
        "split": "val",
        "question": "Does person1 and person2 feel comfortable in car4's café?",
        "choices": [
            "person1 feels comfortable.",
            "No, person1, person2 and person3 don't.",
            "Yes.",
            "No.",
        ],
        "part": "answer",
        "label": 1,
    }
    assert rows[1]["question"].endswith("café? No, person1, person2 and person3 don't.") and rows[1]["label"] == 2
    assert rows[1]["choices"] == [f"They are {number}." for number in range(4)]


def test_vcr_names_leaderboard_rows_and_broken_entries(tmp_path):
    test = {key: value for key, value in VCR.items() if not key.endswith("_label")} | {"annot_id": "test-7"}
    broken = [
        VCR | {"annot_id": "val-1", "question": ["Why", "is", [9], "?"]},
        VCR | {"annot_id": "val-2", "answer_choices": VCR["answer_choices"][:3]},
        {key: value for key, value in VCR.items() if key not in ("annot_id", "objects")},
    ]
    path = lines(tmp_path / "test.jsonl", [test, *broken])
    rows, reasons = split_bad(CONVERTERS["vcr"](path, unisex_names=True))
    assert [row["part"] for row in rows] == ["answer", *(f"rationale_conditioned_on_a{n}" for n in range(4))]
    assert rows[0]["question"] == "Does Casey and Riley feel comfortable in car's café?" and "label" not in rows[0]
    assert rows[2]["question"].endswith("No, Casey, Riley and Jessie don't.")
    assert reasons == {
        "val-1": "points to an object that is not there",
        "val-2": "not 4 answers and rationales",
        "line 4": "no field annot_id, objects",
    }
    both, _ = split_bad(CONVERTERS["vcr"](lines(tmp_path / "val.jsonl", [VCR]), conditioned=True))
    assert len(both) == 6


def test_mosi(tmp_path):
    path = tmp_path / "label.csv"
    path.write_text(
        "video_id,clip_id,text,label,label_T,annotation,mode\n"
        "03bSnISJMiM,11,A LOT OF SAD PARTS,-2.4000000953674316,,Negative,test\n"
        '03bSnISJMiM,13,"THERE IS SAD PART, DÉJÀ VU",0.8,,Positive,train\n'
        "x,1,,1.0,,Positive,train\n"
        "x,2,hm,,,Positive,train\n"
        "x,3,hm,nan,,Positive,valid\n",
        encoding="utf-8",
    )
    rows, reasons = split_bad(CONVERTERS["mosi"](path))
    assert rows[0]["image"] == "03bSnISJMiM/11.jpg" and rows[0]["label"] == pytest.approx(-2.4)
    assert rows[1] == {
        "image": "03bSnISJMiM/13.jpg",
        "text": "THERE IS SAD PART, DÉJÀ VU",
        "label": 0.8,
        "clip": "03bSnISJMiM/13",
        "split": "train",
    }
    assert reasons == {"x/1": "no field text", "x/2": "label is not a number", "x/3": "label is not a number"}
    path.write_text("video_id,text\nx,y\n")
    with pytest.raises(ValueError, match=r"label\.csv: no column clip_id, label; give the label\.csv"):
        list(CONVERTERS["mosi"](path))


def test_the_command_writes_a_table(tmp_path, capsys):
    source, out = lines(tmp_path / "val.jsonl", [VCR]), tmp_path / "rows.jsonl"
    words = ["data", "convert", "vcr", "--annotations", str(source), "--conditioned", "--out", str(out)]
    assert main(words) == 0
    assert len(out.read_text().splitlines()) == 6
    assert main(["data", "convert", "nlvr2", "--annotations", str(tmp_path / "no.json"), "--out", str(out)]) == 2
    assert "check the path" in capsys.readouterr().err
