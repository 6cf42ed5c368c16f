"""What tasks share that judge a text about one or two images: a verdict of a few labels.

Data: image (or two), text, and its label by name. A checkpoint's own head is used where its answers are the task's
labels, whatever the head and the arrangement of its images are.
Shapes: B texts, A labels.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from downstream.metrics.verdict import label_accuracy
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
    only_text,
    read_samples,
    seen_samples,
)
from encoders.types import Batch
from objectives import AnswerConfig, ObjectiveConfig, PairAttentionConfig
from objectives.answer import Answer
from objectives.base import Fuse
from objectives.pair_attention import PairAttention
from vlp.data.batch import Example
from vlp.data.fetch import Prepare
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, Sample
from vlp.data.records import place_of
from vlp.data.regions import region_members
from vlp.fusion import NoFusionConfig
from vlp.fusion.dual import DualStreamConfig
from vlp.model import Model, ModelConfig

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

logger = logging.getLogger(__name__)

WORDS = {1: "one image", 2: "two images"}


@dataclass(frozen=True)
class VerdictSurvey:
    """How often the training data have each label."""

    counts: Mapping[str, int]

    @property
    def majority(self) -> str:
        """The most frequent label; of equals, the first in the alphabet."""
        return min(self.counts, key=lambda label: (-self.counts[label], label))


class VerdictConfig(TaskConfig):
    """Base of the tasks that judge a text about one or two images."""

    kind: str = ""
    labels: tuple[str, ...] = ()
    """The verdicts, in the order of a new head's outputs; data and checkpoints may differ in case."""
    label: str = "label"
    """Field with the label."""
    blank_images: bool = False
    """Also judge with the images blanked: what the model itself knows from the text alone. Doubles the time."""

    headline: ClassVar[str] = "accuracy"
    of_data: ClassVar[tuple[str, ...]] = ("label",)
    images: ClassVar[int] = 1
    """Images of a text."""
    text: ClassVar[str] = "sentence"
    """Field with the text, unless data.text names another."""
    carried: ClassVar[tuple[str, ...]] = ()
    """Fields that predictions carry on."""

    def settings(self, data: DataConfig) -> DataConfig:
        """Texts are in the task's own field unless the user names another."""
        return data if data.text is not None else data.model_copy(update={"text": self.text})

    def score(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the metrics of rows that have "correct" and "label"."""
        return label_accuracy([row["correct"] for row in rows], [row["label"] for row in rows])

    def survey(self, reader: Reader, data: DataConfig) -> VerdictSurvey:
        """Count the labels of the training data."""
        bad: dict[str, str] = {}
        counts = Counter(
            label for _, label in self._labelled(read_samples(reader, data, bad, images=False, several=False), bad)
        )
        if not counts:
            raise ValueError(no_labels("train", len(reader), bad, "--task.label"))
        return VerdictSurvey(dict(counts))

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: VerdictSurvey) -> R:
        """Replace the pretraining objectives by one head; a checkpoint's own with these labels stays as it is.

        A model that read one image a text is given the arrangement of its family for two, see :func:`show_two`.
        """
        objectives = {name: self._stated(one) for name, one in run.objectives.items()}
        model = run.model.model_copy(update={"decoder": None})
        if not any(is_head(one, self.labels) for one in objectives.values()):
            kept = {name: one for name, one in pretrained.items() if is_head(one, self.labels)}
            kept = kept if images_of(model) == self.images else {}
            name, head = next(iter(kept.items()), ("answer", AnswerConfig(answers=self.labels, loss="ce")))
            objectives[name] = head
        if self.images == 2 and images_of(model) == 1:
            model = show_two(model)
        return run.model_copy(update={"model": model, "objectives": objectives})

    def _stated(self, one: ObjectiveConfig) -> ObjectiveConfig:
        """An objective that the user stated: a head without answers has the labels, of which one is right."""
        if not isinstance(one, AnswerConfig) or not (not one.answers or is_head(one, self.labels)):
            return one
        return one.model_copy(update={"answers": one.answers or self.labels, "loss": one.loss or "ce"})

    def prepare(self, run: RunConfig) -> Prepare:
        """Return the text with its images, and the label as a score of one."""
        answers = next(answers_of(one) for one in run.objectives.values() if is_head(one, self.labels))
        return VerdictPrepare(self, {same(answer): number for number, answer in enumerate(answers)})

    def lacks(self, model: Model) -> str | None:
        """Judging takes a head whose answers are the labels, and a fusion that reads as many images."""
        if verdict_head(model, self.labels) is None:
            return f"a head that answers {', '.join(self.labels)} (objective answer)"
        if images_of(model.config) != self.images:
            return f"a fusion of {WORDS[self.images]} a text (model.fusion.images)"
        return None

    def evaluate(self, parts: Parts, reader: Reader, survey: VerdictSurvey | None = None) -> Result:
        """Return the official metrics and, of each sample, the verdict with its probability.

        Floors: "majority" gives the most frequent training label to every sample; "blank images", where asked for, is
        the model on grey images.
        """

        def usable(samples: Iterable[EvalSample], bad: dict[str, str]) -> Iterator[tuple[EvalSample, str]]:
            return self._labelled(self._whole(parts, samples, bad), bad)

        rows, labels, bad = labelled_rows(
            parts, reader, usable, lambda samples: self._rows(parts, samples), "--task.label"
        )
        for row, label in zip(rows, labels, strict=True):
            correct = row["prediction"] == label
            row |= {"label": label, "correct": correct, "metrics": {"accuracy": float(correct)}}
        floors: dict[str, dict[str, float]] = {}
        notes: tuple[str, ...] = ()
        if survey is None:
            notes = ("no training data were named, so the majority is unknown; name them with --data.train",)
        else:
            floors["majority"] = self.score([row | {"correct": row["label"] == survey.majority} for row in rows])
        if self.blank_images:
            floors["blank images"] = self.score(
                [row | {"correct": row["label"] == row["blank_prediction"]} for row in rows]
            )
        return Result(self.score(rows), floors, rows, bad, notes)

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, text, verdict and the probability of every label for each sample."""
        bad: dict[str, str] = {}
        samples = self._whole(parts, seen_samples(parts, reader, bad, several=False), bad)
        yield from self._rows(parts, samples)
        for key, reason in bad.items():
            logger.warning("%s%s: no verdict, %s", key, place_of(key), reason)

    def _labelled(self, samples: Iterable[EvalSample], bad: dict[str, str]) -> Iterator[tuple[EvalSample, str]]:
        for one in samples:
            try:
                yield one, self.read_label(one.sample)
            except BadSample as error:
                bad[error.key] = error.reason

    def read_label(self, sample: Sample) -> str:
        """Return the sample's label, written as in ``labels``.

        Raises:
            BadSample: it has none, or another.
        """
        value = sample.fields.get(self.label)
        if value is None or value == "":
            known = ", ".join(sorted(sample.fields)) or "none"
            raise BadSample(sample.key, f"no field {self.label}; its fields are {known}")
        found = next((label for label in self.labels if same(label) == same(str(value))), None)
        if found is None:
            raise BadSample(sample.key, f"{self.label} {str(value)[:40]!r} is none of {', '.join(self.labels)}")
        return found

    def _rows(self, parts: Parts, samples: Iterator[EvalSample]) -> Iterator[dict[str, Any]]:
        """One row a sample, in order."""
        if (missing := self.lacks(parts.model)) is not None:
            raise ValueError(
                f"task {self.kind}: this model lacks {missing}; finetune it with vlp finetune {self.kind} first"
            )
        for group, batch in batches(parts, samples, self.batch):
            with evaluating(parts.model):
                found = self.judge(parts.model, batch).tolist()
                blank = self.judge(parts.model, blanked(batch)).tolist() if self.blank_images else found
            for one, scores, without in zip(group, found, blank, strict=True):
                probabilities = dict(zip(self.labels, scores, strict=True))
                best = max(probabilities, key=lambda label: probabilities[label])
                row: dict[str, Any] = {"key": one.sample.key, "image": one.image, "text": one.sample.texts[0]}
                row |= {name: one.sample.fields[name] for name in self.carried if name in one.sample.fields}
                row |= {"prediction": best, "probabilities": probabilities}
                if self.blank_images:
                    row["blank_prediction"] = self.labels[without.index(max(without))]
                yield row

    def _whole(self, parts: Parts, samples: Iterable[EvalSample], bad: dict[str, str]) -> Iterator[EvalSample]:
        """The samples that have as many images as a text has here."""
        for one in samples:
            number = len(one.regions) or len(one.sample.images)
            if number == self.images:
                yield one
            else:
                bad[one.sample.key] = (
                    f"{number} images, {WORDS[self.images]} are wanted; name their columns or members with --data.image"
                )

    def judge(self, model: Model, batch: Batch) -> Tensor:
        """Texts with their images -> the probability of each label [B, A], in the order of ``labels``."""
        head = verdict_head(model, self.labels)
        assert head is not None
        numbers = {same(answer): number for number, answer in enumerate(head.config.answers)}
        return head.judge(model.run([Fuse()], batch)[Fuse()])[:, [numbers[same(label)] for label in self.labels]]


@dataclass(frozen=True)
class VerdictPrepare:
    """A training sample -> its example; picklable, for loader workers."""

    task: VerdictConfig
    index: Mapping[str, int]
    """Number of each label among the head's answers."""

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Example:
        """Make the example.

        Raises:
            BadSample: no text, no label, or another number of images.
        """
        label = self.task.read_label(sample)
        text = only_text(sample)
        number = len(sample.images) or len(region_members(sample.fields))
        if number and number != self.task.images:
            raise BadSample(sample.key, f"{number} images, {WORDS[self.task.images]} are wanted")
        target = np.zeros(len(self.index), dtype=np.float32)
        target[self.index[same(label)]] = 1
        return Example(sample.key, sample.images, text, targets={"answer_scores": target})


def same(label: str) -> str:
    """Return what of a label counts: not its case, nor the space around it."""
    return label.strip().casefold()


def answers_of(one: ObjectiveConfig) -> tuple[str, ...]:
    """Return what an objective chooses among; nothing, if it is no head of answers."""
    return one.answers if isinstance(one, AnswerConfig | PairAttentionConfig) else ()


def is_head(one: ObjectiveConfig, labels: Sequence[str]) -> bool:
    """Whether an objective chooses among exactly these labels."""
    return {same(answer) for answer in answers_of(one)} == {same(label) for label in labels}


def verdict_head(model: Model, labels: Sequence[str]) -> Answer | PairAttention | None:
    """Return the model's head that chooses among exactly these labels; None without one."""
    for one in model.objectives.values():
        if isinstance(one, Answer | PairAttention) and is_head(one.config, labels):
            return one
    return None


def images_of(model: ModelConfig) -> int:
    """Return how many images of a text the fusion reads."""
    return 1 if getattr(model.fusion, "images", "one") == "one" else 2


def show_two(model: ModelConfig) -> ModelConfig:
    """Return a model whose fusion read one image a text with the arrangement of its family for two.

    Cross-attention: every block of it twice, reading the images by turns (ALBEF), or, where the fusion is the text
    tower, a cross-attention an image in each (BLIP). Any other: the text is fused with each image by itself (ViLT,
    METER, UNITER, VLMo, BEiT-3).

    Raises:
        ValueError: there is no fusion.
    """
    fusion = model.fusion
    if isinstance(fusion, NoFusionConfig):
        raise ValueError(
            "model.fusion.kind none cannot read two images with a text; pretrain with single_stream or dual_stream"
        )
    changes: dict[str, Any] = {"images": "each"}
    if isinstance(fusion, DualStreamConfig) and fusion.attention == "cross":
        changes = {"images": "alternate", "layers": 2 * fusion.stack.layers}
        if getattr(model.text, "layers", None) == 0:
            changes = {"images": "parallel"}
    return model.model_copy(update={"fusion": fusion.model_copy(update=changes)})
