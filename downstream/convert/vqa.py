"""VQAv2 (and OK-VQA, whose files are alike), GQA and the questions of Visual Genome -> rows of the task vqa."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from downstream.convert.files import lacking, list_in, list_of, object_in
from downstream.convert.types import Bad, Row


def vqav2(questions: Sequence[Path], annotations: Sequence[Path] = ()) -> Iterator[Row | Bad]:
    """VQAv2, OK-VQA: questions and, where they are public, annotations; images train2014/COCO_train2014_....jpg.

    Args:
        questions: ``v2_OpenEnded_mscoco_*_questions.json``; several become one table.
        annotations: ``v2_mscoco_*_annotations.json`` of these questions, in any order. None: rows without answers.

    Yields:
        image, image_id, question, question_id, question_type, answer_type, answers (ten texts), split.

    Raises:
        ValueError: a file is not of the format.
    """
    about = "the official questions, v2_OpenEnded_mscoco_..._questions.json"
    answered: dict[Any, dict[str, Any]] = {}
    for path in annotations:
        for one in list_in(path, "annotations", "the official annotations, v2_mscoco_..._annotations.json"):
            answered[one.get("question_id")] = one
    for path in questions:
        found = object_in(path, about)
        subset = found.get("data_subtype")
        if not isinstance(subset, str):
            raise ValueError(f"{path}: no field 'data_subtype', which names the images' folder; give {about}")
        for entry in list_of(found, path, "questions", about):
            key = str(entry.get("question_id"))
            reason = lacking(entry, "question_id", "image_id", "question")
            if reason is None and annotations:
                reason = lacking(answered.get(entry["question_id"], {}), "answers")
            yield Bad(key, reason) if reason else _vqav2_row(entry, answered.get(entry["question_id"]), subset)


def _vqav2_row(entry: dict[str, Any], annotation: dict[str, Any] | None, subset: str) -> Row | Bad:
    folder = subset.replace("test-dev", "test")  # its images are among those of test
    row: Row = {
        "image": f"{folder}/COCO_{folder}_{entry['image_id']:0>12}.jpg",
        **{name: entry[name] for name in ("image_id", "question", "question_id")},
    }
    if annotation is not None:
        answers = [one.get("answer") if isinstance(one, dict) else None for one in annotation["answers"]]
        if not all(isinstance(answer, str) for answer in answers):
            return Bad(str(entry["question_id"]), "an answer without text")
        row |= {name: annotation[name] for name in ("question_type", "answer_type") if name in annotation}
        row["answers"] = answers
    return row | {"split": subset.rstrip("0123456789")}


def vg_qa(questions: Path, image_data: Path | None = None) -> Iterator[Row | Bad]:
    """Visual Genome: question_answers.json and, for the images' folders, image_data.json.

    Args:
        questions: ``question_answers.json``.
        image_data: ``image_data.json``, whose addresses say which of the folders VG_100K and VG_100K_2 holds an image.
            None: images are named ``7.jpg``, for one folder with all of them.

    Yields:
        image, image_id, question, question_id, answer (one text, without its closing full stop).

    Raises:
        ValueError: a file is not of the format.
    """
    files: dict[Any, str] = {}
    if image_data is not None:
        for one in list_in(image_data, None, "Visual Genome's image_data.json"):
            parts = PurePosixPath(str(one.get("url", ""))).parts
            files[one.get("image_id", one.get("id"))] = "/".join(parts[-2:])
    for image in list_in(questions, None, "Visual Genome's question_answers.json"):
        pairs = image.get("qas")
        if not isinstance(pairs, list):
            raise ValueError(f"{questions}: no list 'qas' of an image; give Visual Genome's question_answers.json")
        for entry in pairs:
            number = entry.get("image_id", image.get("id"))
            reason = lacking(entry, "question", "answer", "qa_id")
            if reason is None and number is None:
                reason = "no field image_id"
            if reason is None and files and number not in files:
                reason = "image not in image_data"
            if reason is not None:
                yield Bad(str(entry.get("qa_id")), reason)
                continue
            yield {
                "image": files.get(number, f"{number}.jpg"),
                "image_id": number,
                "question": entry["question"],
                "question_id": entry["qa_id"],
                "answer": entry["answer"].strip().removesuffix("."),
            }


def gqa(questions: Sequence[Path], all_questions: bool = False) -> Iterator[Row | Bad]:
    """GQA: val_balanced_questions.json, ..., or folders of parts (train_all_questions); images 2375429.jpg.

    Args:
        questions: files of questions, or folders with them; the word before the first ``_`` names the split.
        all_questions: keep also questions outside the balanced set: consistency asks for the answers to them.

    Yields:
        image, image_id, question, question_id, answer (not in test sets), split, balanced, and what GQA's metrics ask
        for: structural, semantic and detailed type, steps, group, entailed.

    Raises:
        ValueError: a file is not of the format.
    """
    for path in questions:
        for part in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            split = part.name.split("_")[0]
            for key, entry in object_in(part, "GQA's questions, val_balanced_questions.json or alike").items():
                if not isinstance(entry, dict):
                    raise ValueError(f"{part}: entry {key} is not a question; give GQA's questions")
                if reason := lacking(entry, "question", "imageId"):
                    yield Bad(key, reason)
                elif all_questions or entry.get("isBalanced", True):
                    yield _gqa_row(key, entry, split)


def _gqa_row(key: str, entry: Mapping[str, Any], split: str) -> Row:
    number, types, groups = entry["imageId"], entry.get("types") or {}, entry.get("groups") or {}
    row: Row = {
        "image": f"{number}.jpg",
        "image_id": number,
        "question": entry["question"],
        "question_id": key,
        **({"answer": entry["answer"]} if entry.get("answer") else {}),
        "split": split,
        "balanced": bool(entry.get("isBalanced", True)),
        **{name: types[name] for name in ("structural", "semantic", "detailed") if types.get(name)},
        "group": groups.get("global"),
        "entailed": [one for one in entry.get("entailed") or () if one != key],
    }
    if "semantic" in entry:
        row["steps"] = sum(not _is_final(one) for one in entry["semantic"])
    return row


def _is_final(operation: Mapping[str, Any]) -> bool:
    """Whether an operation ends the reasoning without being a step of it, as the official evaluation counts steps."""
    said = f"{operation.get('operation')}: {operation.get('argument')}"
    return any(word in said for word in ("exist", "query: name", "choose name"))
