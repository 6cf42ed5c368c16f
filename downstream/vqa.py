"""Visual question answering: an answer from a list (ViLT, METER), or written by the decoder (ALBEF, BLIP).

Data: image, question, and the answers of one or several people in a field ``answer`` (one text), ``answers`` (a list of
texts, or of the official ``{"answer": ...}``), or ``answer_scores`` (answer -> soft score). A csv cell holds JSON.
Shapes: B questions, A answers.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from downstream.metrics.vqa import normalize_answer, soft_targets, vqa_accuracy
from downstream.task import (
    EvalSample,
    R,
    Result,
    TaskConfig,
    batches,
    blanked,
    decoder_beside,
    evaluating,
    gather,
    gather_bad,
    my_share,
    no_labels,
    read_samples,
)
from encoders.types import Batch
from objectives import AnswerConfig, LmConfig, ObjectiveConfig
from objectives.answer import Answer
from objectives.base import Fuse
from objectives.lm import Lm
from vlp.config import build
from vlp.data.batch import Example
from vlp.data.fetch import Prepare
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, Sample
from vlp.generate import GenerationConfig, generate_text
from vlp.model import Model
from vlp.passes import memory_of

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

logger = logging.getLogger(__name__)

ANSWER_FIELDS = ("answers", "answer_scores", "answer")
CARRIED = ("question_id", "question_type", "answer_type")
"""Fields that predictions carry on."""
WRITTEN = "lm:answer"
"""Text view of the answer that the decoder learns to write."""


@dataclass(frozen=True)
class Truth:
    """What people answered."""

    scores: Mapping[str, float]
    """Soft target of each normalised answer, in 0..1; others are worth 0."""
    answers: tuple[str, ...] = ()
    """The annotators' answers; empty where only scores are given."""

    def accuracy(self, prediction: str) -> float:
        """Return the official VQA accuracy of a prediction, or its given score."""
        if self.answers:
            return vqa_accuracy(prediction, self.answers)
        return self.scores.get(normalize_answer(prediction), 0.0)


def read_truth(sample: Sample, name: str | None = None) -> Truth | None:
    """Return the answers of a sample, from the field ``name`` or the first of ``ANSWER_FIELDS``; None without any.

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
            return Truth({normalize_answer(str(answer)): float(score) for answer, score in value.items()})
        except (TypeError, ValueError) as error:
            raise BadSample(sample.key, f"answer scores must be numbers: {error}") from error
    items = value if isinstance(value, list) else [value]
    answers = tuple(str(item["answer"] if isinstance(item, Mapping) and "answer" in item else item) for item in items)
    return Truth(soft_targets(answers), answers)


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


class VqaConfig(TaskConfig):
    """Answer questions about images."""

    kind: Literal["vqa"] = "vqa"
    generative: bool = False
    """Write the answer with the decoder, which reads the fused question, instead of choosing it from a list."""
    answer: str | None = None
    """Field with the answers; none = `answers`, `answer_scores` or `answer`, the first that there is."""
    max_answers: int = Field(3129, ge=2)
    """Longest answer list (3129: VQAv2 in the literature)."""
    min_count: float = Field(1, ge=0)
    """Answers that are given less often in the training data, weighed by their soft scores, are not in the list."""
    blank_images: bool = False
    """Also answer with the images blanked: what the model itself knows from the question alone. Doubles the time."""
    generation: GenerationConfig = Field(default_factory=lambda: build(GenerationConfig, {"max_length": 10}))
    """How answers are written (generative)."""

    headline: ClassVar[str] = "accuracy"

    def settings(self, data: DataConfig) -> DataConfig:
        """Texts are questions: the field of that name unless the user names another."""
        return data if data.text is not None else data.model_copy(update={"text": "question"})

    def survey(self, reader: Reader, data: DataConfig) -> VqaSurvey:
        """Count the answers of the training data, over all and by question text."""
        overall: Counter[str] = Counter()
        by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
        bad: dict[str, str] = {}
        samples = 0
        for one, truth in self._labelled(read_samples(reader, data, bad, images=False), bad):
            samples += 1
            overall.update(truth.scores)
            by_question[same_question(one.sample.texts[0])].update(truth.scores)
        if not samples:
            raise ValueError(no_labels("train", len(reader), bad))
        ranked = _ranked(overall)
        best = {question: _ranked(counts)[0] for question, counts in by_question.items()}
        return VqaSurvey(tuple(ranked), tuple(overall[answer] for answer in ranked), best, samples)

    def answer_list(self, survey: VqaSurvey) -> tuple[str, ...]:
        """Return the training answers that the head may give, most frequent first.

        Raises:
            ValueError: fewer than two are left.
        """
        chosen = [a for a, weight in zip(survey.answers, survey.weights, strict=True) if weight >= self.min_count]
        if len(chosen) < 2:
            raise ValueError(
                f"task.min_count {self.min_count:g} leaves {len(chosen)} of {len(survey.answers)} answers; lower it, "
                "or give data with at least two answers"
            )
        return tuple(chosen[: self.max_answers])

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: VqaSurvey) -> R:
        """Replace the pretraining objectives by an answer head or decoder; a fitting head of the checkpoint stays."""
        objectives, model = dict(run.objectives), run.model
        if self.generative:
            lm = objectives.get("lm", LmConfig())
            objectives["lm"] = lm.model_copy(update={"memory": "fused", "view": WRITTEN})
            decoder = model.decoder or decoder_beside(model)
            model = model.model_copy(update={"decoder": decoder.model_copy(update={"memory": "text"})})
        else:
            answer = objectives.get("answer", pretrained.get("answer", AnswerConfig()))
            assert isinstance(answer, AnswerConfig)
            wanted = self.answer_list(survey)
            if not set(wanted) <= set(answer.answers):
                if answer.answers:
                    logger.info(
                        "the checkpoint's %d answers do not hold all of the data's; its head is new",
                        len(answer.answers),
                    )
                answer = answer.model_copy(update={"answers": wanted})
            objectives["answer"] = answer
            if not any(isinstance(one, LmConfig) for one in objectives.values()):
                model = model.model_copy(update={"decoder": None})
        return run.model_copy(update={"model": model, "objectives": objectives})

    def prepare(self, run: RunConfig) -> Prepare:
        """Return question and soft answer scores, or question and an answer drawn by its score (generative)."""
        if self.generative:
            return VqaPrepare(self.answer, None)
        answer = next(one for one in run.objectives.values() if isinstance(one, AnswerConfig))
        return VqaPrepare(self.answer, {text: number for number, text in enumerate(answer.answers)})

    def lacks(self, model: Model) -> str | None:
        """Answering takes the answer head, or a decoder that reads the fused question."""
        if _answer_head(model) is None and _answer_writer(model) is None:
            return "an answer head (objective answer) or a decoder over fused questions (objective lm, memory fused)"
        return None

    def evaluate(self, parts: Parts, reader: Reader, survey: VqaSurvey | None = None) -> Result:
        """Return the official VQA accuracy, by question and answer type where given, and the blind floors.

        Floors: "majority" gives the most frequent training answer to every question; "question only" the most frequent
        training answer to the same question text, and the majority's where the text is new.
        """
        bad: dict[str, str] = {}
        samples = read_samples(reader, parts.run.data, bad, indices=range(len(reader))[my_share(len(reader))])
        truths: list[Truth] = []

        def remember() -> Iterator[EvalSample]:
            for one, truth in self._labelled(samples, bad):
                truths.append(truth)
                yield one

        rows = gather(list(self._answers(parts, remember())))
        truths, bad = gather(truths), gather_bad(bad)
        if not rows:
            raise ValueError(no_labels("val", len(reader), bad))
        for row, truth in zip(rows, truths, strict=True):
            row |= {"answers": list(truth.answers) or dict(truth.scores), "accuracy": truth.accuracy(row["answer"])}
        floors: dict[str, dict[str, float]] = {}
        if survey is not None:
            floors["majority"] = self._score(rows, truths, lambda row: survey.answers[0])
            floors["question only"] = self._score(rows, truths, lambda row: survey.blind(row["question"]))
        if self.blank_images:
            floors["blank images"] = self._score(rows, truths, lambda row: row["blank_answer"])
        return Result(by_type(rows), floors, rows, bad, self._notes(parts.model, truths, survey))

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, question, answer and its probability for each question."""
        bad: dict[str, str] = {}
        yield from self._answers(parts, read_samples(reader, parts.run.data, bad))
        for key, reason in bad.items():
            logger.warning("%s: no answer, %s", key, reason)

    def _labelled(self, samples: Iterable[EvalSample], bad: dict[str, str]) -> Iterator[tuple[EvalSample, Truth]]:
        for one in samples:
            try:
                truth = read_truth(one.sample, self.answer)
            except BadSample as error:
                bad[error.key] = error.reason
                continue
            if truth is None:
                bad[one.sample.key] = f"no answer; its fields are {', '.join(sorted(one.sample.fields)) or 'none'}"
            else:
                yield one, truth

    def _answers(self, parts: Parts, samples: Iterator[EvalSample]) -> Iterator[dict[str, Any]]:
        """One row a question, in order."""
        if (missing := self.lacks(parts.model)) is not None:
            raise ValueError(f"task vqa: this model lacks {missing}; finetune it with vlp finetune vqa first")
        for group, batch in batches(parts, samples, self.batch):
            with evaluating(parts.model):
                found = self._run(parts, batch)
                blank = self._run(parts, blanked(batch)) if self.blank_images else found
            for one, (answer, probability), (without, _) in zip(group, found, blank, strict=True):
                row: dict[str, Any] = {"key": one.sample.key, "image": one.image}
                row |= {name: one.sample.fields[name] for name in CARRIED if name in one.sample.fields}
                row |= {"question": one.sample.texts[0], "answer": answer, "probability": probability}
                yield row | ({"blank_answer": without} if self.blank_images else {})

    def _run(self, parts: Parts, batch: Batch) -> list[tuple[str, float]]:
        """Answer and its probability for each question."""
        model = parts.model
        fused = model.run([Fuse()], batch)[Fuse()]
        head = _answer_head(model)
        if head is not None:
            best = head.scores(fused.pooled).max(1)
            return [
                (head.config.answers[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        writer = _answer_writer(model)
        assert writer is not None and model.decoder is not None
        length = min(self.generation.max_length, model.decoder.embeddings.max_length)
        generation = self.generation.model_copy(update={"max_length": length})
        ids, scores = generate_text(
            model,
            memory_of(fused, model.decoder.config.memory),
            parts.tokenizer.vocabulary,
            generation,
            objective=writer,
        )
        return [(parts.tokenizer.decode(each), s) for each, s in zip(ids, scores.exp().tolist(), strict=True)]

    def _score(
        self, rows: Sequence[dict[str, Any]], truths: Sequence[Truth], answer: Callable[[dict[str, Any]], str]
    ) -> dict[str, float]:
        scored = [row | {"accuracy": truth.accuracy(answer(row))} for row, truth in zip(rows, truths, strict=True)]
        return by_type(scored)

    def _notes(self, model: Model, truths: Sequence[Truth], survey: VqaSurvey | None) -> tuple[str, ...]:
        notes = ["accuracy is the official VQA accuracy; with one answer a question it is plain accuracy"]
        if survey is None:
            notes.append("no training data were named, so the blind floors are unknown; name them with --data.train")
        else:
            notes.append(
                f"question only: the most frequent of the training answers to the same question text ({survey.samples} "
                f"questions, {len(survey.by_question)} texts), else the most frequent answer {survey.answers[0]!r}"
            )
        if (head := _answer_head(model)) is not None:
            known = set(head.config.answers)
            best = [max((s for a, s in truth.scores.items() if a in known), default=0.0) for truth in truths]
            if (ceiling := sum(best) / len(best)) < 1:
                notes.append(f"no choice from the {len(known)} answers of the list can score more than {ceiling:.3f}")
        return tuple(notes)


@dataclass(frozen=True)
class VqaPrepare:
    """A training sample -> its example; picklable, for loader workers."""

    field: str | None
    index: Mapping[str, int] | None
    """Number of each answer; None = answers are written."""

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Example:
        """Make the example.

        Raises:
            BadSample: no answers.
        """
        truth = read_truth(sample, self.field)
        if truth is None:
            raise BadSample(sample.key, f"no answer; its fields are {', '.join(sorted(sample.fields)) or 'none'}")
        question = sample.texts[0]
        if self.index is None:
            answers, scores = list(truth.scores), np.array(list(truth.scores.values()))
            if not scores.sum() > 0:
                raise BadSample(sample.key, "all of its answers score 0")
            drawn = answers[int(generator.choice(len(answers), p=scores / scores.sum()))]
            return Example(sample.key, sample.images, question, {WRITTEN: drawn})
        target = np.zeros(len(self.index), dtype=np.float32)
        for answer, score in truth.scores.items():
            if answer in self.index:
                target[self.index[answer]] = score
        return Example(sample.key, sample.images, question, targets={"answer_scores": target})


def by_type(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of the rows' accuracy, overall and by each question and answer type that they have."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups["accuracy"].append(row["accuracy"])
        for name in ("question_type", "answer_type"):
            if name in row:
                groups[f"accuracy/{name}/{row[name]}"].append(row["accuracy"])
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}


def _ranked(counts: Counter[str]) -> list[str]:
    """Most frequent first, equals in the order of the alphabet."""
    return sorted(counts, key=lambda answer: (-counts[answer], answer))


def _answer_head(model: Model) -> Answer | None:
    return next((one for one in model.objectives.values() if isinstance(one, Answer)), None)


def _answer_writer(model: Model) -> str | None:
    if model.decoder is None:
        return None
    return next(
        (n for n, one in model.objectives.items() if isinstance(one, Lm) and one.config.memory == "fused"), None
    )
