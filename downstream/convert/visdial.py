"""VisDial v1.0: visdial_1.0_{train,val,test}.json and the dense annotations -> one row a question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from downstream.convert.files import list_in, object_in
from downstream.convert.types import Bad, Row

_ABOUT = "the official visdial_1.0_train.json, _val.json or _test.json"


def visdial(dialogs: Path, dense: Path | None = None, val2014: Path | None = None) -> Iterator[Row | Bad]:
    """VisDial v1.0, one row a question with its history and 100 candidate answers.

    Args:
        dialogs: visdial_1.0_train.json, visdial_1.0_val.json or visdial_1.0_test.json.
        dense: visdial_1.0_train_dense_annotations.json or visdial_1.0_val_dense_annotations.json.
        val2014: COCO's annotations of val2014, which say which training images are of it (all others: train2014).
    """
    whole = object_in(dialogs, _ABOUT)
    data, split = whole.get("data"), str(whole.get("split", ""))
    if not isinstance(data, dict) or not all(
        isinstance(data.get(n), list) for n in ("questions", "answers", "dialogs")
    ):
        raise ValueError(f"{dialogs}: no data with questions, answers and dialogs; give {_ABOUT}")
    relevance = {} if dense is None else _relevance(dense)
    if split == "train" and val2014 is None:
        raise ValueError(
            f"{dialogs}: the training images are of COCO's train2014 and val2014; name a file with val2014's images "
            "(captions_val2014.json) with --val2014"
        )
    other = set() if val2014 is None else {one.get("id") for one in list_in(val2014, "images", "captions_val2014.json")}
    for dialog in data["dialogs"]:
        if not isinstance(dialog, dict) or not isinstance(dialog.get("image_id"), int):
            yield Bad(str(dialog)[:60], "no image_id")
            continue
        image = dialog["image_id"]
        begin: Row = {"image": _file(split, image, image in other), "image_id": image, "split": split}
        yield from _rounds(dialog, data["questions"], data["answers"], relevance, begin)


def _relevance(path: Path) -> dict[tuple[Any, Any], list[float]]:
    """Relevance of the candidates by image id and round; the training file calls it relevance."""
    found = {}
    for one in list_in(path, None, "the official dense annotations"):
        values = one.get("gt_relevance", one.get("relevance"))
        if not isinstance(values, list):
            raise ValueError(f"{path}: an entry without gt_relevance; give the official dense annotations")
        found[one.get("image_id"), one.get("round_id")] = values
    return found


def _file(split: str, image: int, of_val2014: bool) -> str:
    """Name of an image, in the folder that its archive makes."""
    if split == "train":
        folder = "val2014" if of_val2014 else "train2014"
        return f"{folder}/COCO_{folder}_{image:012d}.jpg"
    return f"VisualDialog_{split}2018/VisualDialog_{split}2018_{image:012d}.jpg"


def _rounds(
    dialog: Mapping[str, Any],
    questions: Sequence[str],
    answers: Sequence[str],
    relevance: Mapping[tuple[Any, Any], list[float]],
    begin: Row,
) -> Iterator[Row | Bad]:
    """The rows of one dialogue, which all ``begin`` alike: of every question with candidates (of test the last one)."""
    image, history = dialog["image_id"], list[list[str]]()
    for number, turn in enumerate(dialog.get("dialog") or (), 1):
        key = f"image {image}, round {number}"
        try:
            question = questions[turn["question"]]
            options = [answers[option] for option in turn.get("answer_options") or ()]
            answer = answers[turn["answer"]] if turn.get("answer") is not None else None
        except (KeyError, IndexError, TypeError) as error:
            yield Bad(key, f"a question or answer that is not there ({type(error).__name__})")
            return
        if options:
            row = begin | {"round_id": number, "caption": dialog.get("caption") or ""}
            row["history"] = [list(one) for one in history]
            row |= {"question": question, "options": options}
            if turn.get("gt_index") is not None:
                if not 0 <= turn["gt_index"] < len(options):
                    yield Bad(key, "gt_index is none of the candidates")
                    return
                row["answer_index"] = turn["gt_index"]
            dense = relevance.get((image, number))
            if dense is not None and len(dense) != len(options):
                yield Bad(key, "the dense annotations are not one for each candidate")
            else:
                yield row if dense is None else row | {"relevance": dense}
        elif answer is None:
            yield Bad(key, "neither candidates nor an answer")
        if answer is not None:
            history.append([question, answer])
