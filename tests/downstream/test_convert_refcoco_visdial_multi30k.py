"""Converters of RefCOCO, VisDial v1.0 and Multi30k on entries of exactly the official formats."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import pytest

from downstream.convert.multi30k import multi30k
from downstream.convert.refcoco import read_plain_pickle, refcoco
from downstream.convert.types import Bad
from downstream.convert.visdial import visdial
from vlp.cli import main


def split_bad(entries) -> tuple[list[dict], dict[str, str]]:
    entries = list(entries)
    return [e for e in entries if not isinstance(e, Bad)], {e.key: e.reason for e in entries if isinstance(e, Bad)}


def written(path: Path, content) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def ref(number: int, split: str, *sentences: str, **changes) -> dict:
    listed = [
        {"tokens": one.split(), "raw": one.title(), "sent_id": 10 * number + i, "sent": one}
        for i, one in enumerate(sentences)
    ]
    return {
        "sent_ids": [one["sent_id"] for one in listed],
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "ann_id": 1719310,
        "ref_id": number,
        "image_id": 581857,
        "split": split,
        "sentences": listed,
        "category_id": 1,
    } | changes


@pytest.fixture
def instances(tmp_path) -> Path:
    objects = [
        {
            "segmentation": [[1, 2, 3, 4]],
            "area": 197.3,
            "iscrowd": 0,
            "image_id": 581857,
            "bbox": box,
            "category_id": 1,
            "id": number,
        }
        for number, box in ((1719310, [103.93, 299.99, 134.22, 177.42]), (1719311, [0.0, 5.5, 20.0, 30.0]))
    ]
    image = {
        "license": 1,
        "file_name": "COCO_train2014_000000581857.jpg",
        "coco_url": "",
        "height": 640,
        "width": 427,
        "date_captured": "2013-11-18",
        "id": 581857,
    }
    whole = {
        "info": {},
        "images": [image],
        "licenses": [],
        "annotations": objects,
        "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
    }
    return written(tmp_path / "instances.json", whole)


def test_refcoco(tmp_path, instances):
    refs = [
        ref(0, "train", "navy blue shirt", "woman in blüe"),
        ref(1, "testA", "the man"),
        ref(2, "val", "x", ann_id=7),
        ref(3, "val", "x", image_id=8),
        ref(4, "dev", "x"),
        ref(5, "testB", "", "left guy"),
        ref(6, "val"),
    ]
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps(refs, protocol=0))  # as the official files, which Python 2 wrote
    rows, bad = split_bad(refcoco(path, instances))
    assert rows[0] == {
        "image": "COCO_train2014_000000581857.jpg",
        "text": "navy blue shirt",
        "box": [103.93, 299.99, 134.22, 177.42],
        "width": 427,
        "height": 640,
        "boxes": [[103.93, 299.99, 134.22, 177.42], [0.0, 5.5, 20.0, 30.0]],
        "split": "train",
        "image_id": 581857,
        "ref_id": 0,
        "sent_id": 0,
        "ann_id": 1719310,
        "category": "person",
    }
    assert [(row["text"], row["split"]) for row in rows[1:]] == [
        ("woman in blüe", "train"),
        ("the man", "testA"),
        ("left guy", "testB"),
    ]
    assert bad == {
        "ref 2": "its object has no box in instances.json",
        "ref 3": "its image is not in instances.json",
        "ref 4": "split 'dev' is none of train, val, test, testA, testB",
        "ref 5, sentence 50": "empty expression",
        "ref 6": "no sentences",
    }


def test_refcoco_with_detected_boxes(tmp_path, instances):
    path = tmp_path / "refs(umd).p"
    path.write_bytes(pickle.dumps([ref(0, "test", "it")]))
    boxes = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    forms = (
        {"581857": [{"box": box, "score": 0.5} for box in boxes]},
        {"581857": [[*box, 0.9] for box in boxes]},
        [{"image_id": 581857, "bbox": box, "category_id": 1, "score": 0.5} for box in boxes],
    )
    for content in forms:
        rows, _ = split_bad(refcoco(path, instances, written(tmp_path / "dets.json", content)))
        assert rows[0]["boxes"] == boxes
    with pytest.raises(ValueError, match="neither image id -> list of boxes nor a list of COCO results"):
        list(refcoco(path, instances, written(tmp_path / "dets.json", [{"bbox": [1]}])))


class Hostile:
    """Pickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_is_refused(tmp_path, instances, protocol):
    path, mark = tmp_path / "refs(unc).p", tmp_path / "mark"
    path.write_bytes(pickle.dumps([ref(0, "val", "x"), Hostile(mark)], protocol=protocol))
    with pytest.raises(ValueError, match=r"not a pickle of plain data \(it names \w+\.mkdir") as caught:
        list(refcoco(path, instances))
    assert not mark.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'echo'\ntR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        b"Pname\n.",
        b"\x82\x01.",
        b"(lp0\n",
        b"no pickle",
        b"",
        pickle.dumps(set()),
        pickle.dumps({"refs": []}),
    ],
)
def test_what_is_no_list_of_refs_is_refused_in_one_line(tmp_path, instances, content):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="give the official refs") as caught:
        list(refcoco(path, instances))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="check the path"):
        read_plain_pickle(tmp_path / "none.p")


def dialogs(split: str) -> dict:
    def turn(question, answer=None, options=None, index=None):
        found = {"question": question, "answer": answer, "answer_options": options, "gt_index": index}
        return {name: value for name, value in found.items() if value is not None}

    listed = [
        {
            "image_id": 378466,
            "caption": "a café",
            "dialog": [turn(0, 1, [0, 1, 2], 1), turn(1, 2, [2, 0, 1], 0), turn(2, 0, [1, 0, 2], 1)],
        },
        {"image_id": 9, "caption": "b", "dialog": [turn(0, 1), turn(1, options=[0, 1, 2])]},
        {"image_id": 10, "caption": "c", "dialog": [turn(7, 0, [0, 1, 2], 0)]},
        {"image_id": 11, "caption": "d", "dialog": [turn(0, 0, [0, 1, 2], 5)]},
        {"caption": "e", "dialog": []},
    ]
    data = {"questions": ["is it open", "¿cuántos?", "any people"], "answers": ["no", "yes, très", "2"]}
    return {"split": split, "version": "1.0", "data": data | {"dialogs": listed}}


def test_visdial(tmp_path):
    dense = [
        {"image_id": 378466, "round_id": 2, "gt_relevance": [1.0, 0.0, 0.25]},
        {"image_id": 9, "round_id": 2, "gt_relevance": [1.0]},
    ]
    rows, bad = split_bad(
        visdial(written(tmp_path / "visdial_1.0_val.json", dialogs("val")), written(tmp_path / "dense.json", dense))
    )
    assert rows[1] == {
        "image": "VisualDialog_val2018/VisualDialog_val2018_000000378466.jpg",
        "image_id": 378466,
        "round_id": 2,
        "split": "val",
        "caption": "a café",
        "history": [["is it open", "yes, très"]],
        "question": "¿cuántos?",
        "options": ["2", "no", "yes, très"],
        "answer_index": 0,
        "relevance": [1.0, 0.0, 0.25],
    }
    assert [(row["image_id"], row["round_id"]) for row in rows] == [(378466, 1), (378466, 2), (378466, 3)]
    assert rows[2]["history"] == [["is it open", "yes, très"], ["¿cuántos?", "2"]] and "relevance" not in rows[0]
    assert set(bad) == {
        "image 9, round 2",
        "image 10, round 1",
        "image 11, round 1",
        str(dialogs("val")["data"]["dialogs"][4]),
    }
    assert bad["image 9, round 2"] == "the dense annotations are not one for each candidate"


def test_visdial_test_and_train(tmp_path):
    path = written(tmp_path / "visdial_1.0_test.json", dialogs("test"))
    rows, _ = split_bad(visdial(path))
    last = rows[-1]
    assert last["image"] == "VisualDialog_test2018/VisualDialog_test2018_000000000009.jpg"
    assert last["round_id"] == 2 and "answer_index" not in last and last["history"] == [["is it open", "yes, très"]]
    path = written(tmp_path / "visdial_1.0_train.json", dialogs("train"))
    with pytest.raises(ValueError, match="name a file with val2014's images"):
        list(visdial(path))
    other = written(tmp_path / "captions_val2014.json", {"images": [{"id": 9}], "annotations": []})
    rows, _ = split_bad(visdial(path, val2014=other))
    assert {row["image"] for row in rows} == {
        "train2014/COCO_train2014_000000378466.jpg",
        "val2014/COCO_val2014_000000000009.jpg",
    }
    assert {row["split"] for row in rows} == {"train"}
    with pytest.raises(ValueError, match="no data with questions, answers and dialogs"):
        list(visdial(written(tmp_path / "x.json", {"split": "val", "data": []})))


def test_multi30k(tmp_path):
    (tmp_path / "list.txt").write_text("1000092795.jpg\nCOCO_val2014_000000132484.jpg#3\n10002456.jpg\n")
    (tmp_path / "train.en.gz").write_bytes(gzip.compress(b"Two men.\n A dog \n\n"))
    (tmp_path / "train.de").write_text("Zwei\u2028Männer.\nEin Hund\nNichts\n", encoding="utf-8")
    rows, bad = split_bad(multi30k(tmp_path / "list.txt", tmp_path / "train.en.gz", tmp_path / "train.de"))
    assert rows == [
        {"image": "1000092795.jpg", "source": "Two men.", "target": "Zwei\u2028Männer.", "split": "train"},
        {"image": "COCO_val2014_000000132484.jpg", "source": "A dog", "target": "Ein Hund", "split": "train"},
    ]
    assert bad == {"line 3": "no source"}
    (tmp_path / "train.de").write_text("Zwei\n")
    with pytest.raises(ValueError, match=r"3 images, but train\.en\.gz has 3 lines and train\.de 1"):
        list(multi30k(tmp_path / "list.txt", tmp_path / "train.en.gz", tmp_path / "train.de"))
    (tmp_path / "train.de").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="give a UTF-8 text file"):
        list(multi30k(tmp_path / "list.txt", tmp_path / "train.en.gz", tmp_path / "train.de"))


def test_by_command(tmp_path):
    for name, content in (("list", "a.jpg\n"), ("en", "One\n"), ("de", "Eins\n")):
        (tmp_path / name).write_text(content)
    files = [
        f"--{option} {tmp_path / name}" for option, name in (("image-list", "list"), ("source", "en"), ("target", "de"))
    ]
    assert main(["data", "convert", "multi30k", *" ".join(files).split(), "--out", str(tmp_path / "o.jsonl")]) == 0
    assert json.loads((tmp_path / "o.jsonl").read_text())["target"] == "Eins"
