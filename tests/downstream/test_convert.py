"""Converters on files of the official formats, and the command that runs them.

Formats: visualqa.org/vqa_v2 ("Input Questions Format", "Annotation Format"), the GQA readme, Visual Genome's API
readme, COCO's "Data format", nocaps.org, textvqa.org/textcaps, and Karpathy's dataset_*.json.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from downstream.convert import CONVERTERS
from downstream.convert.types import Bad
from downstream.convert.write import parameters, write_rows
from vlp.cli import main
from vlp.data.reader import open_reader


def put(path: Path, content) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def run(name: str, out: Path, **files) -> list[dict]:
    """Rows that the command writes."""
    words = ["data", "convert", name, "--out", str(out)]
    for option, value in files.items():
        words += ["--" + option.replace("_", "-")] + ([] if value is True else [str(one) for one in as_list(value)])
    assert main(words) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def split_bad(entries) -> tuple[list[dict], dict[str, str]]:
    entries = list(entries)
    return [e for e in entries if not isinstance(e, Bad)], {e.key: e.reason for e in entries if isinstance(e, Bad)}


def vqa_files(folder: Path) -> tuple[Path, Path]:
    questions = {
        "info": {"version": "2.0"},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "data_subtype": "val2014",
        "license": {},
        "questions": [
            {"image_id": 262148, "question": "Où est le café?", "question_id": 262148000},
            {"image_id": 42, "question": "", "question_id": 42000},
            {"image_id": 393225, "question": "How many?", "question_id": 393225000},
        ],
    }
    ten = [{"answer": "down" if i < 7 else "naïve", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    annotations = {
        "data_subtype": "val2014",
        "annotations": [
            {
                "question_type": "where is",
                "multiple_choice_answer": "down",
                "answers": ten,
                "image_id": 262148,
                "answer_type": "other",
                "question_id": 262148000,
            }
        ],
    }
    return put(folder / "q.json", questions), put(folder / "a.json", annotations)


def test_vqav2(tmp_path):
    questions, annotations = vqa_files(tmp_path)
    (row,) = run("vqav2", tmp_path / "o.jsonl", questions=questions, annotations=annotations)
    assert row == {
        "image": "val2014/COCO_val2014_000000262148.jpg",
        "image_id": 262148,
        "question": "Où est le café?",
        "question_id": 262148000,
        "question_type": "where is",
        "answer_type": "other",
        "answers": ["down"] * 7 + ["naïve"] * 3,
        "split": "val",
    }
    _, bad = split_bad(CONVERTERS["vqav2"]([questions], [annotations]))
    assert bad == {"42000": "no field question", "393225000": "no field answers"}
    test = json.loads(questions.read_text()) | {"data_subtype": "test-dev2015"}
    rows = run("vqav2", tmp_path / "o.jsonl", questions=put(tmp_path / "t.json", test))
    assert [row["image"] for row in rows] == [
        "test2015/COCO_test2015_000000262148.jpg",
        "test2015/COCO_test2015_000000393225.jpg",
    ]
    assert rows[0]["split"] == "test-dev" and "answers" not in rows[0]


def gqa_entry(**changes) -> dict:
    return {
        "semantic": [
            {"operation": "select", "dependencies": [], "argument": "helmet (o1)"},
            {"operation": "verify color", "dependencies": [0], "argument": "blue"},
            {"operation": "query", "dependencies": [0], "argument": "name"},
            {"operation": "exist", "dependencies": [0], "argument": "?"},
        ],
        "entailed": ["02930152", "05515938"],
        "equivalent": ["02930152"],
        "question": "Is the helmet blue?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-helmet_color"},
        "answer": "yes",
        "semanticStr": "...",
        "annotations": {"answer": {}, "question": {"4": "o1"}, "fullAnswer": {"2": "o1"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the helmet is blue.",
        **changes,
    }


def test_gqa(tmp_path):
    entries = {
        "02930152": gqa_entry(),
        "05515938": gqa_entry(isBalanced=False, groups={"global": "color", "local": None}),
        "07": {"question": "What is it?", "imageId": "1", "isBalanced": True},
        "08": {"question": "Where?"},
    }
    file = put(tmp_path / "val_all_questions.json", entries)
    first, test = run("gqa", tmp_path / "o.jsonl", questions=file)
    assert first == {
        "image": "2354786.jpg",
        "image_id": "2354786",
        "question": "Is the helmet blue?",
        "question_id": "02930152",
        "answer": "yes",
        "split": "val",
        "balanced": True,
        "structural": "verify",
        "semantic": "attr",
        "detailed": "verifyAttr",
        "group": None,
        "entailed": ["05515938"],
        "steps": 2,  # neither the query of the name nor exist
    }
    assert "answer" not in test and test["question_id"] == "07"
    folder = tmp_path / "train_all_questions"
    folder.mkdir()
    put(folder / "train_all_questions_0.json", {"1": gqa_entry()})
    put(folder / "train_all_questions_1.json", {"2": gqa_entry(isBalanced=False, groups={"global": "color"})})
    rows = run("gqa", tmp_path / "o.jsonl", questions=[folder], all_questions=True)
    assert [(row["question_id"], row["split"], row["group"]) for row in rows] == [
        ("1", "train", None),
        ("2", "train", "color"),
    ]
    assert split_bad(CONVERTERS["gqa"]([file]))[1] == {"08": "no field imageId"}


def test_vg_qa(tmp_path):
    qa = {
        "a_objects": [],
        "question": "Où ça?",
        "image_id": 7,
        "qa_id": 986769,
        "answer": "A café.",
        "q_objects": [],
    }
    questions = put(
        tmp_path / "question_answers.json",
        [{"id": 7, "qas": [qa, qa | {"qa_id": 2, "answer": ""}]}, {"id": 8, "qas": [qa | {"image_id": 8, "qa_id": 3}]}],
    )
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/7.jpg"
    images = put(tmp_path / "image_data.json", [{"width": 8, "url": url, "height": 8, "image_id": 7, "coco_id": None}])
    (row,) = run("vg_qa", tmp_path / "o.jsonl", questions=questions, image_data=images)
    assert row == {
        "image": "VG_100K_2/7.jpg",
        "image_id": 7,
        "question": "Où ça?",
        "question_id": 986769,
        "answer": "A café",
    }
    bad = split_bad(CONVERTERS["vg_qa"](questions, images))[1]
    assert bad == {"2": "no field answer", "3": "image not in image_data"}
    assert [row["image"] for row in split_bad(CONVERTERS["vg_qa"](questions))[0]] == ["7.jpg", "8.jpg"]


def coco_file(**changes) -> dict:
    image = {"license": 3, "file_name": "COCO_val2014_000000391895.jpg", "coco_url": "", "height": 360, "id": 391895}
    return {
        "info": {},
        "images": [image, {"id": 5, "file_name": "b.jpg"}, {"id": 6}],
        "licenses": [],
        "annotations": [
            {"image_id": 391895, "id": 770337, "caption": "A man with a red\n helmet. "},
            {"image_id": 391895, "id": 771687, "caption": "Un café très «beau»"},
            {"image_id": 6, "id": 1, "caption": "lost"},
        ],
        **changes,
    }


def test_coco_captions(tmp_path):
    file = put(tmp_path / "captions_val2014.json", coco_file())
    (row,) = run("coco_captions", tmp_path / "o.jsonl", annotations=file, split="val")
    assert row == {
        "image": "COCO_val2014_000000391895.jpg",
        "image_id": 391895,
        "caption": ["A man with a red helmet.", "Un café très «beau»"],
        "split": "val",
    }
    assert split_bad(CONVERTERS["coco_captions"](file))[1] == {"5": "no caption", "6": "no field file_name"}
    info = coco_file()
    del info["annotations"]
    rows, _ = split_bad(CONVERTERS["coco_captions"](put(tmp_path / "image_info_test2014.json", info)))
    assert [row["image_id"] for row in rows] == [391895, 5] and "caption" not in rows[0]


def test_nocaps(tmp_path):
    image = {"id": 0, "open_images_id": "0013ea2087020901", "file_name": "0013ea2087020901.jpg", "domain": "in-domain"}
    captions = [{"image_id": 0, "id": i, "caption": f"Ein Bär {i}"} for i in range(10)]
    file = put(tmp_path / "n.json", {"images": [image], "annotations": captions})
    (row,) = run("nocaps", tmp_path / "o.jsonl", annotations=file)
    assert row == {
        "image": "0013ea2087020901.jpg",
        "image_id": 0,
        "open_images_id": "0013ea2087020901",
        "domain": "in-domain",
        "caption": [f"Ein Bär {i}" for i in range(10)],
    }


def test_textcaps(tmp_path):
    entry = {
        "image_id": "0054c91397f2fe05",
        "image_name": "0054c91397f2fe05",
        "image_path": "train/0054c91397f2fe05.jpg",
        "set_name": "val",
        "caption_id": 1,
        "caption_str": "A jar says “Kürbis”.",
        "reference_strs": ["A jar says “Kürbis”.", "A green jar"],
    }
    second = entry | {"caption_id": 2, "caption_str": "A green jar"}
    test = {"image_id": "t", "image_path": "test/t.jpg", "set_name": "test"}
    silent = {"image_id": "s", "set_name": "train"}
    file = put(
        tmp_path / "TextCaps_0.1_val.json", {"dataset_name": "textcaps", "data": [entry, second, test, silent, {}]}
    )
    rows = run("textcaps", tmp_path / "o.jsonl", annotations=file)
    assert rows == [
        {
            "image": "train_images/0054c91397f2fe05.jpg",
            "image_id": "0054c91397f2fe05",
            "split": "val",
            "caption": ["A jar says “Kürbis”.", "A green jar"],
        },
        {"image": "test_images/t.jpg", "image_id": "t", "split": "test"},
    ]
    assert split_bad(CONVERTERS["textcaps"]([file]))[1] == {"None": "no field image_id, set_name", "s": "no caption"}


def test_karpathy(tmp_path):
    sentences = [
        {"tokens": ["a", "man"], "raw": "A man — naïve.", "imgid": 0, "sentid": 770337},
        {"tokens": ["b"], "raw": "B", "imgid": 0, "sentid": 771687},
    ]
    coco = {
        "filepath": "val2014",
        "sentids": [770337, 771687],
        "filename": "COCO_val2014_000000391895.jpg",
        "imgid": 0,
        "split": "restval",
        "sentences": sentences,
        "cocoid": 391895,
    }
    flickr = {"sentids": [0], "imgid": 3, "sentences": sentences[:1], "split": "test", "filename": "1000092795.jpg"}
    file = put(
        tmp_path / "dataset_coco.json", {"images": [coco, flickr, flickr | {"sentences": []}], "dataset": "coco"}
    )
    first, second = run("karpathy", tmp_path / "o.jsonl", annotations=file)
    assert first == {
        "image": "val2014/COCO_val2014_000000391895.jpg",
        "image_id": 391895,
        "caption": ["A man — naïve.", "B"],
        "sentids": [770337, 771687],
        "split": "restval",
    }
    assert second["image"] == "1000092795.jpg" and second["image_id"] == 3
    reader = open_reader(str(tmp_path / "o.jsonl"), where={"split": ["train", "restval"]}, image=())
    assert len(reader) == 1


def test_images_are_looked_for_and_named_from_the_table(tmp_path, monkeypatch, caplog):
    questions, _ = vqa_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save("coco/val2014/COCO_val2014_000000262148.jpg")
    caplog.set_level("INFO")
    (row,) = run("vqav2", Path("tables/o.jsonl"), questions=questions, images="coco")
    assert row["image"] == "../coco/val2014/COCO_val2014_000000262148.jpg"
    assert len(open_reader("tables/o.jsonl", text="question")[0].files) == 1
    done = write_rows(CONVERTERS["vqav2"]([questions]), Path("o.jsonl"), Path("coco"))
    assert str(done) == (
        "1 rows (val 1), 2 skipped: 1 no field question (as 42000); "
        "1 no image file in coco (as val2014/COCO_val2014_000000393225.jpg)"
    )
    (row,) = run("vqav2", Path("o.jsonl"), questions=questions, images=tmp_path / "coco")
    assert row["image"] == f"{tmp_path}/coco/val2014/COCO_val2014_000000262148.jpg"


MISTAKES = {
    "another format": (["vqav2", "--questions", "a.json"], "a.json: field 'questions' is not a list of objects"),
    "not json": (["karpathy", "--annotations", "t.txt"], "t.txt: not JSON"),
    "no file": (["karpathy", "--annotations", "none.json"], "none.json: No such file"),
    "another type": (["karpathy", "--annotations", "k.json"], "an entry is not of the data set's format"),
    "a list": (["gqa", "--questions", "l.json"], "a JSON object was expected, not list"),
    "nothing usable": (["coco_captions", "--annotations", "e.json"], "no entry can be used, 0 rows, 1 skipped"),
    "unknown": (["vqa2", "--questions", "q.json"], "vqa2: no converter"),
    "missing": (["vqav2"], "--questions missing; vqav2 takes --questions ... [--annotations ...]"),
    "not its option": (["gqa", "--questions", "q.json", "--split", "val"], "--split: not an option of gqa"),
    "two for one": (["karpathy", "--annotations", "q.json", "a.json"], "--annotations: 2 values were given"),
    "no such folder": (["vqav2", "--questions", "q.json", "--images", "nowhere"], "--images nowhere: there is no such"),
}


@pytest.mark.parametrize("words, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, words, message):
    vqa_files(tmp_path)
    (tmp_path / "t.txt").write_text("hello")
    put(tmp_path / "l.json", [])
    put(tmp_path / "k.json", {"images": [{"filename": "a", "split": "val", "sentences": [{"raw": 5}]}]})
    put(
        tmp_path / "e.json",
        {"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": [{"image_id": 2, "caption": "x"}]},
    )
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["data", "convert", *words, "--out", "x.jsonl"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_is_there_survives_a_failure(tmp_path):
    (tmp_path / "o.jsonl").write_text("kept")

    def breaks():
        yield {"image": "a.jpg"}
        raise ValueError("line 2 is wrong")

    with pytest.raises(ValueError, match="line 2"):
        write_rows(breaks(), tmp_path / "o.jsonl")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_help_names_every_data_set_and_its_options(capsys):
    assert main(["data", "convert", "--help"]) == 0
    said = capsys.readouterr().out
    for name, converter in CONVERTERS.items():
        assert f"\n  {name} " in said and converter.__doc__
        for one in parameters(converter):
            assert one.option in said
    assert main(["data", "--help"]) == 0 and "data convert" in capsys.readouterr().out
    assert main(["data"]) == 2 and "vlp data convert" in capsys.readouterr().err
