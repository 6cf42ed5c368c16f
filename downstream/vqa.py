"""Visual question answering: an answer from a list (ViLT, METER), written, or ranked by the decoder (ALBEF, BLIP).

Data: image, question and answers as ``downstream.answers`` reads them; `vlp data convert` makes them of the official
files of VQAv2, OK-VQA, GQA and Visual Genome.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from downstream.answering import Answerer, Head, answer_head
from downstream.answers import Truth, VqaPrepare, VqaSurvey, read_answer_list, read_truth, same_question
from downstream.convert.files import object_in
from downstream.metrics.gqa import GqaQuestion, gqa_metrics
from downstream.metrics.vqa import normalize_answer
from downstream.task import (
    EvalSample,
    R,
    Result,
    TaskConfig,
    batches,
    blanked,
    evaluating,
    labelled_rows,
    no_labels,
    read_samples,
    seen_samples,
)
from downstream.writing import fused_writer, writing
from objectives import AnswerConfig, LmConfig, ObjectiveConfig
from vlp.config import build
from vlp.data.asking import ANSWER
from vlp.data.fetch import Prepare
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, Sample
from vlp.data.records import place_of
from vlp.generate import GenerationConfig
from vlp.model import Model

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

logger = logging.getLogger(__name__)

CARRIED = ("question_id", "question_type", "answer_type")
"""Fields that predictions carry on."""


@dataclass(frozen=True)
class Asked:
    """What is known of a question that was answered."""

    truth: Truth
    gqa: GqaQuestion | None
    """Its facts (metric gqa)."""


class VqaConfig(TaskConfig):
    """Answer questions about images."""

    kind: Literal["vqa"] = "vqa"
    head: Head | None = None
    """Choose from a list (closed), let the decoder, which reads the fused question, write the answer (open), or rank a
    list with it (ranked, trained as open). none = closed, or in evaluation what the model has."""
    metric: Literal["vqa", "gqa"] = "vqa"
    """The official VQA accuracy, of normalised answers; or GQA's metrics, of answers as they are."""
    answer_file: str | None = None
    """Answer list to choose from or to rank (a JSON list, or one a line); none = that of the training data."""
    choices: str | None = None
    """GQA's val_choices.json, which validity and plausibility ask for."""
    k: int = Field(128, ge=1)
    """Answers whose first word is likeliest, which are scored as a whole (ranked)."""
    answer: str | None = None
    """Field with the answers; none = `answers`, `answer_scores` or `answer`, the first that there is."""
    max_answers: int = Field(3129, ge=2)
    """Longest answer list (3129: VQAv2 in the literature)."""
    min_count: float = Field(1, ge=0)
    """Answers that are given less often in the training data, weighed by their soft scores, are not in the list."""
    blank_images: bool = False
    """Also answer with the images blanked: what the model itself knows from the question alone. Doubles the time."""
    generation: GenerationConfig = Field(default_factory=lambda: build(GenerationConfig, {"max_length": 10}))
    """How answers are written (open)."""

    headline: ClassVar[str] = "accuracy"
    # Ranking takes the data's own list of answers; which head there is shows in the model.
    of_data: ClassVar[tuple[str, ...]] = ("answer", "choices", "answer_file", "head")

    def settings(self, data: DataConfig) -> DataConfig:
        """Texts are questions: the field of that name unless the user names another."""
        return data if data.text is not None else data.model_copy(update={"text": "question"})

    def survey(self, reader: Reader, data: DataConfig) -> VqaSurvey:
        """Count the answers of the training data, over all and by question text."""
        overall: Counter[str] = Counter()
        by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
        bad: dict[str, str] = {}
        samples = 0
        for one, truth in self._labelled(read_samples(reader, data, bad, images=False, several=False), bad):
            samples += 1
            overall.update(truth.scores)
            by_question[same_question(one.sample.texts[0])].update(truth.scores)
        if not samples:
            raise ValueError(no_labels("train", len(reader), bad))
        ranked = _ranked(overall)
        best = {question: _ranked(counts)[0] for question, counts in by_question.items()}
        return VqaSurvey(tuple(ranked), tuple(overall[answer] for answer in ranked), best, samples)

    def for_scores(self, survey: VqaSurvey) -> VqaSurvey | None:
        """Ranking takes the training answers, where no file has a list of them."""
        return survey if self.head == "ranked" and self.answer_file is None else None

    @property
    def exact(self) -> bool:
        """Whether answers are compared as they are."""
        return self.metric == "gqa"

    def answer_list(self, survey: VqaSurvey) -> tuple[str, ...]:
        """Return the answers that may be given: the file's, or those of the training data, most frequent first.

        Raises:
            ValueError: fewer than two are left.
        """
        if self.answer_file is not None:
            return read_answer_list(self.answer_file)
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
        if self.head in ("open", "ranked"):
            model, objectives = writing(model, objectives, pretrained, ANSWER)
        else:
            stated = objectives.get("answer", AnswerConfig())
            known = pretrained.get("answer", AnswerConfig()).model_copy(update={"masked": False})  # LXMERT hides words
            answer = stated.over(known)
            assert isinstance(answer, AnswerConfig)
            wanted = self.answer_list(survey)
            if not self.exact:
                wanted = tuple(dict.fromkeys(map(normalize_answer, wanted)))
            if not set(wanted) <= set(answer.answers):
                if answer.answers:
                    logger.info(
                        "the checkpoint's %d answers do not hold all of the data's; its head is new",
                        len(answer.answers),
                    )
                if "loss" not in stated.model_fields_set:  # its loss was of another task: verdicts take a softmax
                    answer = answer.model_copy(update={"loss": "bce"})
                answer = answer.model_copy(update={"answers": wanted})
            objectives["answer"] = answer
            if not any(isinstance(one, LmConfig) for one in objectives.values()):
                model = model.model_copy(update={"decoder": None})
        return run.model_copy(update={"model": model, "objectives": objectives})

    def prepare(self, run: RunConfig) -> Prepare:
        """Return question and soft answer scores, or question and an answer drawn by its score (open, ranked)."""
        if self.head in ("open", "ranked"):
            return VqaPrepare(self.answer, None, self.exact)
        answer = next(one for one in run.objectives.values() if isinstance(one, AnswerConfig))
        return VqaPrepare(self.answer, {text: number for number, text in enumerate(answer.answers)}, self.exact)

    def lacks(self, model: Model) -> str | None:
        """Answering takes the answer head, or a decoder that reads the fused question."""
        listed, writes = answer_head(model) is not None, fused_writer(model) is not None
        if {"closed": listed, "open": writes, "ranked": writes, None: listed or writes}[self.head]:
            return None
        head, writer = (
            "an answer head (objective answer)",
            "a decoder over fused questions (objective lm, memory fused)",
        )
        return {"closed": head, "open": writer, "ranked": writer, None: f"{head} or {writer}"}[self.head]

    def evaluate(self, parts: Parts, reader: Reader, survey: VqaSurvey | None = None) -> Result:
        """Return the official VQA accuracy, by question and answer type where given, or GQA's metrics; and the floors.

        Floors: "majority" gives the most frequent training answer to every question; "question only" the most frequent
        training answer to the same question text, and the majority's where the text is new.
        """
        candidates = self._candidates(survey)
        rows, asked, bad = labelled_rows(
            parts, reader, self._asked, lambda samples: self._answers(parts, samples, candidates)
        )
        for row, one in zip(rows, asked, strict=True):
            truth = one.truth
            row |= {"answers": list(truth.answers) or dict(truth.scores), "accuracy": truth.accuracy(row["answer"])}
            if one.gqa is not None and not one.gqa.balanced:  # it only shows consistency
                row["metrics"] = {}  # so that two runs are not compared by it
        floors: dict[str, dict[str, float]] = {}
        if survey is not None:
            floors["majority"] = self._score(rows, asked, [survey.answers[0]] * len(rows))
            floors["question only"] = self._score(rows, asked, [survey.blind(row["question"]) for row in rows])
        if self.blank_images:
            floors["blank images"] = self._score(rows, asked, [row["blank_answer"] for row in rows])
        metrics = self._score(rows, asked, [row["answer"] for row in rows])
        return Result(metrics, floors, rows, bad, self._notes(parts.model, asked, metrics, survey))

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, question, answer and its probability for each question."""
        bad: dict[str, str] = {}
        yield from self._answers(parts, seen_samples(parts, reader, bad, several=False), self._candidates(None))
        for key, reason in bad.items():
            logger.warning("%s%s: no answer, %s", key, place_of(key), reason)

    def _asked(self, samples: Iterable[EvalSample], bad: dict[str, str]) -> Iterator[tuple[EvalSample, Asked]]:
        for one, truth in self._labelled(samples, bad):
            yield one, Asked(truth, gqa_question(one.sample, truth) if self.exact else None)

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the official format: VQAv2's question_id and answer, or GQA's questionId and prediction."""
        lacking = next((row for row in predictions if "question_id" not in row), None)
        if lacking is not None:
            raise ValueError(
                f"task vqa: question {lacking['key']} has no field question_id, by which a submission names it; "
                "convert the official questions with vlp data convert"
            )
        if self.metric == "gqa":
            return [{"questionId": str(row["question_id"]), "prediction": row["answer"]} for row in predictions]
        return [{"question_id": _number(row["question_id"]), "answer": row["answer"]} for row in predictions]

    def _candidates(self, survey: VqaSurvey | None) -> tuple[str, ...]:
        """The answers to rank; none for another head."""
        if self.head != "ranked":
            return ()
        if survey is not None:
            return self.answer_list(survey)
        if self.answer_file is None:
            raise ValueError(
                "task.head ranked ranks a list of answers; name it with --task.answer-file, or the training data with "
                "--data.train"
            )
        return read_answer_list(self.answer_file)

    def _labelled(self, samples: Iterable[EvalSample], bad: dict[str, str]) -> Iterator[tuple[EvalSample, Truth]]:
        for one in samples:
            try:
                truth = read_truth(one.sample, self.answer, self.exact)
            except BadSample as error:
                bad[error.key] = error.reason
                continue
            if truth is None:
                bad[one.sample.key] = f"no answer; its fields are {', '.join(sorted(one.sample.fields)) or 'none'}"
            else:
                yield one, truth

    def _answers(self, parts: Parts, samples: Iterator[EvalSample], answers: Sequence[str]) -> Iterator[dict[str, Any]]:
        """One row a question, in order."""
        if (missing := self.lacks(parts.model)) is not None:
            raise ValueError(f"task vqa: this model lacks {missing}; finetune it with vlp finetune vqa first")
        answerer = Answerer(parts, self.head, self.generation, answers, self.k)
        for group, batch in batches(parts, samples, self.batch):
            with evaluating(parts.model):
                found = answerer(batch)
                blank = answerer(blanked(batch)) if self.blank_images else found
            for one, (answer, probability), (without, _) in zip(group, found, blank, strict=True):
                row: dict[str, Any] = {"key": one.sample.key, "image": one.image}
                row |= {name: one.sample.fields[name] for name in CARRIED if name in one.sample.fields}
                row |= {"question": one.sample.texts[0], "answer": answer, "probability": probability}
                yield row | ({"blank_answer": without} if self.blank_images else {})

    def _score(
        self, rows: Sequence[dict[str, Any]], asked: Sequence[Asked], answers: Sequence[str]
    ) -> dict[str, float]:
        """Metrics of these answers to the rows' questions."""
        if self.metric == "gqa":
            keys = [str(row.get("question_id", row["key"])) for row in rows]
            choices = None if self.choices is None else object_in(Path(self.choices), "GQA's val_choices.json")
            questions = {key: one.gqa for key, one in zip(keys, asked, strict=True) if one.gqa is not None}
            return gqa_metrics(questions, dict(zip(keys, answers, strict=True)), choices)
        truths = [one.truth for one in asked]
        return by_type([{**r, "accuracy": t.accuracy(a)} for r, t, a in zip(rows, truths, answers, strict=True)])

    def _notes(
        self, model: Model, asked: Sequence[Asked], metrics: Mapping[str, float], survey: VqaSurvey | None
    ) -> tuple[str, ...]:
        notes = ["accuracy is the official VQA accuracy; with one answer a question it is plain accuracy"]
        if self.metric == "gqa":
            notes = list(gqa_notes(metrics))
        if survey is None:
            notes.append("no training data were named, so the blind floors are unknown; name them with --data.train")
        else:
            notes.append(
                f"question only: the most frequent of the training answers to the same question text ({survey.samples} "
                f"questions, {len(survey.by_question)} texts), else the most frequent answer {survey.answers[0]!r}"
            )
        listed = answer_head(model)
        if listed is not None and self.head in ("closed", None):
            known = set(listed.config.answers)
            best = [max((s for a, s in one.truth.scores.items() if a in known), default=0.0) for one in asked]
            if (ceiling := sum(best) / len(best)) < 1:
                notes.append(f"no choice from the {len(known)} answers of the list can score more than {ceiling:.3f}")
        return tuple(notes)


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


def _number(key: Any) -> Any:
    """A question's id as the official files have it, an integer, also where a csv holds it as text."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def gqa_question(sample: Sample, truth: Truth) -> GqaQuestion:
    """Return a question's facts from the fields that `vlp data convert gqa` writes."""
    fields = sample.fields
    texts = {name: str(fields.get(name) or "") for name in ("structural", "semantic", "detailed")}
    steps, group = fields.get("steps"), fields.get("group")
    return GqaQuestion(
        sample.texts[0],
        next(iter(truth.scores)),
        **texts,
        steps=None if steps is None else int(steps),
        group=None if group is None else str(group),
        balanced=bool(fields.get("balanced", True)),
        entailed=tuple(map(str, fields.get("entailed") or ())),
    )


def gqa_notes(metrics: Mapping[str, float]) -> Iterator[str]:
    """Say what GQA's numbers are, and what those that are not there would take."""
    yield "answers are compared as they are, those to balanced questions count; distribution: 0 is best"
    if "consistency" not in metrics:
        yield (
            "no consistency: it takes the answers to all entailed questions; evaluate on val_all_questions.json, "
            "converted with --all-questions"
        )
    if "validity" not in metrics:
        yield "no validity and plausibility: they take GQA's val_choices.json; name it with --task.choices"
    yield "no grounding: it takes attention maps and scene graphs"
