"""Questions and their answers as data: what people answered, what answers are frequent, and training examples.

Answers stand in a field ``answer`` (one text), ``answers`` (a list of texts, or of the official ``{"answer": ...}``) or
``answer_scores`` (answer -> soft score). A csv cell holds JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from downstream.metrics.vqa import normalize_answer, soft_targets, vqa_accuracy
from downstream.task import only_text
from vlp.data.asking import ANSWER, draw_text
from vlp.data.batch import Example
from vlp.data.reader import BadSample, Sample

ANSWER_FIELDS = ("answers", "answer_scores", "answer")


@dataclass(frozen=True)
class Truth:
    """What people answered."""

    scores: Mapping[str, float]
    """Soft target of each answer, in 0..1; others are worth 0."""
    answers: tuple[str, ...] = ()
    """The annotators' answers; empty where only scores are given."""
    exact: bool = False
    """Answers are compared as they are (GQA), instead of normalised."""

    def accuracy(self, prediction: str) -> float:
        """Return the official VQA accuracy of a prediction, or its given score."""
        if self.exact:
            return self.scores.get(prediction, 0.0)
        if self.answers:
            return vqa_accuracy(prediction, self.answers)
        return self.scores.get(normalize_answer(prediction), 0.0)


def read_truth(sample: Sample, name: str | None = None, exact: bool = False) -> Truth | None:
    """Return the answers of a sample, from the field ``name`` or the first of ``ANSWER_FIELDS``; None without any.

    Where answers are compared as they are (``exact``), each one given is worth 1.

    Raises:
        BadSample: the field holds something else.
    """
    names = (name,) if name else ANSWER_FIELDS
    value = next((v for n in names if (v := sample.fields.get(n)) not in (None, "", [], {})), None)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadSample(sample.key, f"answers {value[:40]!r} are not JSON: {error}") from error
    if value is None:
        return None
    if isinstance(value, Mapping):
        try:
            clean = str if exact else normalize_answer
            return Truth({clean(str(answer)): float(score) for answer, score in value.items()}, exact=exact)
        except (TypeError, ValueError) as error:
            raise BadSample(sample.key, f"answer scores must be numbers: {error}") from error
    items = value if isinstance(value, list) else [value]
    answers = tuple(str(item["answer"] if isinstance(item, Mapping) and "answer" in item else item) for item in items)
    return Truth(dict.fromkeys(answers, 1.0), answers, exact) if exact else Truth(soft_targets(answers), answers)


@dataclass(frozen=True)
class VqaSurvey:
    """What answering blindly takes: the training answers, each question's answers weighing their soft scores."""

    answers: tuple[str, ...]
    """All of them, most frequent first."""
    weights: tuple[float, ...]
    """Of each, summed over questions."""
    by_question: Mapping[str, str]
    """Most frequent answer to each question text."""
    samples: int

    def blind(self, question: str) -> str:
        """Return the most frequent answer to this text, or of all where the text is new."""
        return self.by_question.get(same_question(question), self.answers[0])


def same_question(question: str) -> str:
    """Return what of a question decides whether it was asked before: its words, not case or space."""
    return " ".join(question.lower().split())


@dataclass(frozen=True)
class VqaPrepare:
    """A training sample -> its example; picklable, for loader workers."""

    field: str | None
    index: Mapping[str, int] | None
    """Number of each answer; None = answers are written."""
    exact: bool = False
    """Answers are taken as they are."""

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Example:
        """Make the example.

        Raises:
            BadSample: no answers.
        """
        truth = read_truth(sample, self.field, self.exact)
        if truth is None:
            raise BadSample(sample.key, f"no answer; its fields are {', '.join(sorted(sample.fields)) or 'none'}")
        question = only_text(sample)
        if self.index is None:
            if not sum(truth.scores.values()) > 0:
                raise BadSample(sample.key, "all of its answers score 0")
            return Example(sample.key, sample.images, question, {ANSWER: draw_text(truth.scores, generator)})
        target = np.zeros(len(self.index), dtype=np.float32)
        for answer, score in truth.scores.items():
            if answer in self.index:
                target[self.index[answer]] = score
        return Example(sample.key, sample.images, question, targets={"answer_scores": target})


def read_answer_list(path: str) -> tuple[str, ...]:
    """Return the answers in a file, a JSON list of texts or one a line, as they are (ALBEF's ``answer_list.json``).

    Raises:
        ValueError: it cannot be read, or holds something else, or fewer than two.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"task.answer_file {path}: {error.strerror}; check the path") from error
    try:
        found = json.loads(content) if path.endswith(".json") else content.splitlines()
    except ValueError as error:
        raise ValueError(f"task.answer_file {path}: not JSON ({error}); give a list of texts, or .txt") from error
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"task.answer_file {path}: not a list of texts")
    answers = tuple(dict.fromkeys(one for one in found if one.strip()))
    if len(answers) < 2:
        raise ValueError(f"task.answer_file {path}: {len(answers)} answers; give at least two")
    return answers
