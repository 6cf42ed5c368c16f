"""VCR and other multiple choice: which of four answers to a question about an image is right, and why.

Data: columns image, question, choices (a list of texts) and label (the number of the right one, the first is 0); of VCR
also part and annot_id, as `vlp data convert vcr` writes them. Tables with lists are jsonl or parquet; shards have these
as json fields.
Shapes: Q questions, C choices of each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from downstream.metrics.choice import vcr_metrics
from downstream.task import (
    EvalSample,
    R,
    Result,
    TaskConfig,
    blanked,
    evaluating,
    groups,
    labelled_rows,
    make_batch,
    seen_samples,
)
from encoders.types import Batch
from objectives import ChooseConfig, ObjectiveConfig
from objectives.base import Fuse
from objectives.choose import Choose, choice_probabilities
from vlp.data.batch import Example
from vlp.data.fetch import Prepare
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, Sample
from vlp.data.records import place_of
from vlp.model import Model, ModelConfig

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

logger = logging.getLogger(__name__)

ANSWER, RATIONALE = "answer", "rationale"
CONDITIONED = tuple(f"rationale_conditioned_on_a{number}" for number in range(4))
CARRIED = ("annot_id", "part")


class VcrConfig(TaskConfig):
    """Choose the right one of several texts about an image."""

    kind: Literal["vcr"] = "vcr"
    question: str = "question"
    """Field with the text before each choice."""
    label: str = "label"
    """Field with the number of the right choice, the first is 0."""
    choices: int = Field(default=4, ge=2)
    """Texts to choose from. They are in the field that data.text names, `choices` unless set."""
    blank_images: bool = False
    """Also choose with the images blanked: what the model itself knows from the texts alone. Doubles the time."""

    headline: ClassVar[str] = "accuracy"
    of_data: ClassVar[tuple[str, ...]] = ("question", "label")

    def settings(self, data: DataConfig) -> DataConfig:
        """Texts are the choices, all of which come with their image."""
        return data.model_copy(update={"text": data.text or "choices", "texts_per_image": self.choices})

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: Any) -> R:
        """Replace the pretraining objectives by a score for each choice; the checkpoint's own stays."""
        kept = {name: one for name, one in pretrained.items() if self._fits(one)}
        objectives = dict(run.objectives)
        if not any(isinstance(one, ChooseConfig) for one in objectives.values()):
            objectives |= dict(list(kept.items())[:1]) or {"choose": ChooseConfig(choices=self.choices)}
        model = run.model.model_copy(update={"decoder": None})
        return run.model_copy(update={"model": model, "objectives": objectives})

    def prepare(self, run: RunConfig) -> Prepare:
        """Return a question with one of its choices, and whether that is right."""
        return VcrPrepare(self, run.data.text or "choices", two_segments(run.model))

    def lacks(self, model: Model) -> str | None:
        """Choosing takes a head that scores as many choices."""
        return None if self._head(model) is not None else f"a score for {self.choices} choices (objective choose)"

    def evaluate(self, parts: Parts, reader: Reader, survey: Any = None) -> Result:
        """Return the accuracy of all choices, of answers ("Q->A"), of rationales ("QA->R") and of both ("Q->AR").

        Floor: "chance", and "blank images" where asked for.
        """
        rows, labels, bad = labelled_rows(
            parts, reader, self._labelled, lambda samples: self._rows(parts, samples), "--task.label", several=True
        )
        for row, label in zip(rows, labels, strict=True):
            correct = row["prediction"] == label
            row |= {"label": label, "correct": correct, "metrics": {"accuracy": float(correct)}}
        metrics = _score(rows)
        chance = {name: 1 / self.choices ** (2 if name == "Q->AR" else 1) for name in metrics}
        floors = {"chance": chance}
        if self.blank_images:
            floors["blank images"] = _score(
                [row | {"correct": row["label"] == row["blank_prediction"]} for row in rows]
            )
        return Result(metrics, floors, rows, bad)

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, question, the number of the likeliest choice and the probability of each."""
        bad: dict[str, str] = {}
        yield from self._rows(parts, self._whole(seen_samples(parts, reader, bad), bad))
        for key, reason in bad.items():
            logger.warning("%s%s: no choice, %s", key, place_of(key), reason)

    def _labelled(self, samples: Iterable[EvalSample], bad: dict[str, str]) -> Iterator[tuple[EvalSample, int]]:
        for one in self._whole(samples, bad):
            try:
                yield one, self.read_label(one.sample)
            except BadSample as error:
                bad[error.key] = error.reason

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> str:
        """Return the leaderboard's csv: annot_id, probabilities of the answers, and of the rationales given each.

        Raises:
            ValueError: a part of a question is missing.
        """
        parts = (ANSWER, *CONDITIONED)
        found: dict[str, dict[str, Any]] = {}
        for row in predictions:
            found.setdefault(str(row.get("annot_id", "")), {})[row.get("part", "")] = row["probabilities"]
        lines = [",".join(["annot_id", *(f"{part}_{number}" for part in parts for number in range(self.choices))])]
        for name, probabilities in found.items():
            if not name or not set(parts) <= probabilities.keys():
                raise ValueError(
                    f"question {name!r} lacks rationales given each of its answers, which VCR's leaderboard wants; "
                    "convert the official file with vlp data convert vcr --conditioned"
                )
            lines.append(",".join([name, *(f"{value:.8g}" for part in parts for value in probabilities[part])]))
        return "\n".join(lines) + "\n"

    def read_label(self, sample: Sample) -> int:
        """Return the number of the right choice.

        Raises:
            BadSample: there is none.
        """
        value = sample.fields.get(self.label)
        try:
            number = int(str(value))
        except ValueError:
            number = -1
        if not 0 <= number < self.choices:
            raise BadSample(sample.key, f"{self.label} {value!r} is no number from 0 to {self.choices - 1}")
        return number

    def question_of(self, sample: Sample) -> str:
        """Return what stands before each choice.

        Raises:
            BadSample: there is none.
        """
        value = sample.fields.get(self.question)
        if not isinstance(value, str) or not value.strip():
            raise BadSample(sample.key, f"no field {self.question}")
        return value.strip()

    def judge(self, model: Model, batch: Batch) -> Tensor:
        """Texts of whole questions with their images -> probability of each choice [Q, C]."""
        head = self._head(model)
        assert head is not None
        return choice_probabilities(head.score(model.run([Fuse()], batch)[Fuse()].pooled), self.choices)

    def _fits(self, one: ObjectiveConfig) -> bool:
        return isinstance(one, ChooseConfig) and one.choices == self.choices

    def _head(self, model: Model) -> Choose | None:
        heads = (one for one in model.objectives.values() if isinstance(one, Choose))
        return next((one for one in heads if self._fits(one.config)), None)

    def _whole(self, samples: Iterable[EvalSample], bad: dict[str, str]) -> Iterator[EvalSample]:
        """Samples with a question and all of its choices."""
        for one in samples:
            if len(one.sample.texts) != self.choices:
                bad[one.sample.key] = f"{len(one.sample.texts)} choices, {self.choices} are wanted"
                continue
            try:
                self.question_of(one.sample)
            except BadSample as error:
                bad[error.key] = error.reason
                continue
            yield one

    def _rows(self, parts: Parts, samples: Iterator[EvalSample]) -> Iterator[dict[str, Any]]:
        """One row a question, in order."""
        model = parts.model
        if (missing := self.lacks(model)) is not None:
            raise ValueError(f"task vcr: this model lacks {missing}; finetune it with vlp finetune vcr first")
        apart = two_segments(parts.run.model)
        for group in groups(samples, max(1, self.batch // self.choices)):
            examples = [
                with_choice(one, self.question_of(one.sample), choice, apart)
                for one in group
                for choice in one.sample.texts
            ]
            places = [place for place, one in enumerate(group) for _ in one.sample.texts]
            batch = make_batch(parts, examples, places)
            with evaluating(model):
                found = self.judge(model, batch).tolist()
                blank = self.judge(model, blanked(batch)).tolist() if self.blank_images else found
            for one, probabilities, without in zip(group, found, blank, strict=True):
                row: dict[str, Any] = {"key": one.sample.key, "image": one.image}
                row |= {name: one.sample.fields[name] for name in CARRIED if name in one.sample.fields}
                row |= {"question": self.question_of(one.sample), "choices": list(one.sample.texts)}
                row |= {"prediction": probabilities.index(max(probabilities)), "probabilities": probabilities}
                if self.blank_images:
                    row["blank_prediction"] = without.index(max(without))
                yield row


@dataclass(frozen=True)
class VcrPrepare:
    """A question with one of its choices -> its example; picklable, for loader workers."""

    task: VcrConfig
    field: str
    """Field with all choices."""
    apart: bool
    """Whether question and choice are two segments."""

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Example:
        """Make the example.

        Raises:
            BadSample: the question, some of its choices or its label is missing.
        """
        question, label = self.task.question_of(sample), self.task.read_label(sample)
        choices = [str(one).strip() for one in sample.fields.get(self.field) or ()]
        if len(choices) != self.task.choices or not all(choices):
            raise BadSample(sample.key, f"{len(choices)} choices, {self.task.choices} are wanted")
        choice = sample.texts[0]
        right = np.array(choice == choices[label], dtype=np.float32)
        example = with_choice(EvalSample(sample, 0, ""), question, choice, self.apart)
        return replace(example, targets={"chosen": right})


def with_choice(one: EvalSample, question: str, choice: str, apart: bool) -> Example:
    """Lay a choice behind its question: as second segment, or as one text."""
    return one.shown(question, second=choice) if apart else one.shown(f"{question} {choice}")


def two_segments(model: ModelConfig) -> bool:
    """Return whether the text encoder tells a second segment from the first."""
    return (getattr(model.text, "segments", None) or 0) > 1


def _score(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of rows that have "correct"; of rows without a part the accuracy alone."""
    right = {
        part: {str(row["annot_id"]): row["correct"] for row in rows if row.get("part") == part and "annot_id" in row}
        for part in (ANSWER, RATIONALE)
    }
    overall = {"accuracy": sum(row["correct"] for row in rows) / len(rows)}
    return overall | vcr_metrics(right[ANSWER], right[RATIONALE])
