"""NLVR2, SNLI-VE and VCR -> rows of the tasks of their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from downstream.convert.files import lacking, read_jsonl
from downstream.convert.types import Bad, Row

CHOICES = 4
"""Answers, and rationales, of a VCR question."""

NAMES = (
    "Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry", "Jody", "Kendall", "Peyton", "Skyler",
    "Frankie", "Pat", "Quinn",
)  # fmt: skip
"""Names of people of no sex, as R2C (Zellers et al. 2019) and, after it, VisualBERT and VL-BERT write them."""


def nlvr2(annotations: Path) -> Iterator[Row | Bad]:
    """NLVR2: train.json, dev.json, test1.json or balanced, unbalanced ...; images train/65/train-10171-0-img0.png.

    Args:
        annotations: JSON lines with identifier, sentence, label and, in train, directory.

    Yields:
        left, right, sentence, label (True, False; none where it is not public), identifier, split.

    Raises:
        ValueError: the file is not of the format.
    """
    for number, entry in read_jsonl(annotations):
        identifier = entry.get("identifier")
        if not isinstance(identifier, str) or identifier.count("-") != 3:  # split, set of images, pair, sentence
            yield Bad(str(identifier or f"line {number}"), "no field identifier like dev-850-0-1")
            continue
        if (reason := lacking(entry, "sentence")) is not None:
            yield Bad(identifier, reason)
            continue
        split = identifier.split("-")[0]
        directory = entry.get("directory")
        folder = split if directory is None else f"{split}/{directory}"
        pair = identifier.rpartition("-")[0]
        row: Row = {"left": f"{folder}/{pair}-img0.png", "right": f"{folder}/{pair}-img1.png"}
        row |= {"sentence": entry["sentence"], "identifier": identifier, "split": split}
        label = entry.get("label")
        if label is not None and str(label).casefold() not in ("true", "false"):
            yield Bad(identifier, f"label {label!r} is neither True nor False")
            continue
        yield row if label is None else row | {"label": str(label).capitalize()}


def snli_ve(annotations: Path) -> Iterator[Row | Bad]:
    """SNLI-VE: snli_ve_train.jsonl, snli_ve_dev.jsonl or snli_ve_test.jsonl; images 4705552913.jpg of Flickr30k.

    Args:
        annotations: JSON lines with Flickr30K_ID, gold_label, sentence2 and pairID. Those without a consensus, "-", are
            left out.

    Yields:
        image, sentence (the hypothesis), label, pair_id, and split by the file's name.

    Raises:
        ValueError: the file is not of the format.
    """
    split = annotations.stem.rpartition("_")[2]
    for number, entry in read_jsonl(annotations):
        key = str(entry.get("pairID") or f"line {number}")
        reason = lacking(entry, "Flickr30K_ID", "sentence2")
        if reason is None and entry.get("gold_label") == "-":
            reason = "no consensus on its label (-)"
        if reason is not None:
            yield Bad(key, reason)
            continue
        row: Row = {"image": f"{str(entry['Flickr30K_ID']).removesuffix('.jpg')}.jpg", "sentence": entry["sentence2"]}
        row |= {"label": entry["gold_label"]} if entry.get("gold_label") else {}
        row |= {"pair_id": entry["pairID"]} if entry.get("pairID") else {}
        yield row | ({"split": split} if split in ("train", "dev", "test") else {})


def vcr(annotations: Path, unisex_names: bool = False, conditioned: bool = False) -> Iterator[Row | Bad]:
    """VCR: train.jsonl, val.jsonl or test.jsonl; images lsmdc_.../....jpg, as img_fn names them, in vcr1images.

    Args:
        annotations: JSON lines with objects, question, answer_choices, rationale_choices, img_fn, annot_id and, but for
            test, answer_label and rationale_label. Objects that a text points to are named by class and place, as the
            data set shows them ("person1", "car4").
        unisex_names: people are Casey, Riley, ... instead, and things by their class alone, as in VisualBERT.
        conditioned: also the rationales given every answer, as the leaderboard wants them (always, without labels).

    Yields:
        image, question (for rationales with the answer behind it), choices (four texts), part (`answer`, `rationale`
        given the right answer, `rationale_conditioned_on_a0` to `_a3`), label (number of the right choice), annot_id,
        metadata (the file with the objects' boxes), split. Two rows or more a question.

    Raises:
        ValueError: the file is not of the format.
    """
    name = _unisex if unisex_names else _numbered
    for number, entry in read_jsonl(annotations):
        key = str(entry.get("annot_id") or f"line {number}")
        reason = lacking(entry, "annot_id", "img_fn", "objects", "question", "answer_choices", "rationale_choices")
        if reason is not None:
            yield Bad(key, reason)
            continue
        try:
            yield from _vcr_rows(entry, name(entry["objects"]), conditioned)
        except (IndexError, TypeError, ValueError) as error:
            yield Bad(key, str(error))


def _vcr_rows(entry: dict[str, Any], names: Callable[[int], str], conditioned: bool) -> list[Row]:
    """Rows of one question.

    Raises:
        ValueError: it does not have four choices, or points to an object that is not there.
    """
    question = render(entry["question"], names)
    answers, rationales = (
        [render(one, names) for one in entry[name]] for name in ("answer_choices", "rationale_choices")
    )
    if {len(answers), len(rationales)} != {CHOICES}:
        raise ValueError(f"not {CHOICES} answers and rationales")
    common: Row = {"image": entry["img_fn"], "annot_id": entry["annot_id"]}
    common |= {"metadata": entry["metadata_fn"]} if "metadata_fn" in entry else {}
    common |= {"split": entry["annot_id"].split("-")[0]}
    right, reason = entry.get("answer_label"), entry.get("rationale_label")
    answer: Row = {"question": question, "choices": answers, "part": "answer"}
    rows = [answer if right is None else answer | {"label": right}]
    if right is not None:
        rationale: Row = {"question": f"{question} {answers[right]}", "choices": rationales, "part": "rationale"}
        rows.append(rationale if reason is None else rationale | {"label": reason})
    if right is None or conditioned:
        for number, given in enumerate(answers):
            part = f"rationale_conditioned_on_a{number}"
            rows.append({"question": f"{question} {given}", "choices": rationales, "part": part})
    return [common | row for row in rows]


def render(tokens: Sequence[str | list[int]], names: Callable[[int], str]) -> str:
    """Write a VCR text: its words, with what it points to by name, ``[0, 1]`` as "person1 and person2".

    Raises:
        ValueError: it points to an object that is not there.
    """
    words = [word if isinstance(word, str) else _listed([names(number) for number in word]) for word in tokens]
    # The data set's words are cut as by spaCy; how they are written again does not matter to BERT's tokenizer.
    return re.sub(r" (?=[.,?!;:](?:\s|$)|'(?:s|re|ve|ll|d|m)\b|n't\b)", "", " ".join(words)).strip()


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _numbered(objects: Sequence[str]) -> Callable[[int], str]:
    """Names by class and place among all objects, the first being 1."""
    return lambda number: f"{_object(objects, number)}{number + 1}"


def _unisex(objects: Sequence[str]) -> Callable[[int], str]:
    """People by names in their order, things by class."""
    people = [number for number, name in enumerate(objects) if name == "person"]

    def name(number: int) -> str:
        found = _object(objects, number)
        return NAMES[people.index(number) % len(NAMES)] if found == "person" else found

    return name


def _object(objects: Sequence[str], number: int) -> str:
    if not 0 <= number < len(objects):
        raise ValueError("points to an object that is not there")
    return objects[number]
