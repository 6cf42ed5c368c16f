"""Classification of images, what its tasks share: labels, classes, and scoring every image against every class.

A label is a field of the sample (a name, or a class number from 0), webdataset's member ``.cls``, or the folder that an
image lies in.
Shapes: n images, C classes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from downstream.metrics.classification import chance_metrics, class_ranks, classification_metrics, prior_metrics
from downstream.task import (
    EvalSample,
    R,
    Result,
    TaskConfig,
    batches,
    evaluating,
    gather,
    gather_bad,
    my_share,
    no_labels,
    read_samples,
    seen_samples,
)
from encoders.types import Batch
from objectives import ObjectiveConfig
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, Sample
from vlp.data.records import place_of

if TYPE_CHECKING:
    from vlp.run import Parts

logger = logging.getLogger(__name__)

Score: TypeAlias = Callable[[Batch], Tensor]
"""Batch with the clean images -> scores [n, C], float32 on the CPU; their softmax are the probabilities."""

SHOWN = 5
"""Classes that a prediction names."""

LABEL_FIELDS = ("label", "class", "cls", "class_name", "category", "target")


def read_label(sample: Sample, name: str | None = None) -> str | None:
    """Return a sample's label, from the field ``name`` or the first of ``LABEL_FIELDS``, else its folder's name.

    Raises:
        BadSample: the field holds something else than a text or a number.
    """
    names = (name,) if name else LABEL_FIELDS
    value = next((v for n in names if (v := sample.fields.get(n)) not in (None, "")), None)
    if isinstance(value, bytes):  # webdataset's member .cls
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value).strip()
    if value is not None:
        raise BadSample(sample.key, f"label {str(value)[:40]!r} is neither a text nor a whole number")
    if name is None and sample.fields.get("image") == sample.key:  # an image of a folder
        return PurePosixPath(Path(sample.key).as_posix()).parent.name or None
    return None


def need_label(sample: Sample, name: str | None = None) -> str:
    """Return a sample's label.

    Raises:
        BadSample: it has none, or none that can be read.
    """
    if (label := read_label(sample, name)) is None:
        fields = ", ".join(sorted(sample.fields)) or "none"
        raise BadSample(sample.key, f"no label; its fields are {fields}, name one with --task.label")
    return label


@dataclass(frozen=True)
class Classes:
    """The classes of a task, by number."""

    names: tuple[str, ...]
    """As a text calls them."""
    number: Mapping[str, int]
    """Number of each label."""

    def __len__(self) -> int:
        return len(self.names)

    def of(self, key: str, label: str) -> int:
        """Return a label's number.

        Raises:
            BadSample: it is none of the classes.
        """
        if label not in self.number:
            raise BadSample(key, f"label {label!r} is none of the {len(self.names)} classes")
        return self.number[label]


def read_classes(path: str) -> Classes:
    """Read a file of class names, one a line: ``name``, or ``label<tab>name`` where the data's labels are others.

    Labels of the data are then names, or numbers of lines from 0; or those before the tab (ImageNet's folders).

    Raises:
        ValueError: it cannot be read, holds less than two classes, or a label or name twice.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"task.classes {path}: cannot be read ({error}); give a UTF-8 file of names") from error
    if len(lines) < 2:
        raise ValueError(f"task.classes {path}: holds {len(lines)} classes; give at least two, one a line")
    pairs = [[part.strip() for part in line.split("\t", 1)] for line in lines]
    names = tuple(pair[-1] for pair in pairs)
    tabs = any(len(pair) == 2 for pair in pairs)
    labels = [pair[0] for pair in pairs]
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise ValueError(f"task.classes {path}: {twice[0]!r} stands there twice; leave one out, or put label<tab>name")
    number = {label: i for i, label in enumerate(labels)}
    if not tabs:
        number |= {str(i): i for i in range(len(names)) if str(i) not in number}
    return Classes(names, number)


def classes_of(labels: Sequence[str]) -> Classes:
    """Return the classes that labels name: numbers in their order, else in that of the alphabet.

    Raises:
        ValueError: there are less than two.
    """
    found = sorted(set(labels), key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label))
    if len(found) < 2:
        raise ValueError(
            f"the data have {len(found)} class{'es' * (len(found) != 1)}; give data of at least two, or name the label "
            "with --task.label"
        )
    return Classes(tuple(found), {label: i for i, label in enumerate(found)})


@dataclass(frozen=True)
class LabelSurvey:
    """How often the training data have each label."""

    counts: Mapping[str, int]
    samples: int
    reader: Reader
    """The training data."""

    def by_number(self, classes: Classes) -> dict[int, int]:
        """Return the counts of the classes among them."""
        found: Counter[int] = Counter()
        for label, count in self.counts.items():
            if label in classes.number:
                found[classes.number[label]] += count
        return dict(found)


def survey_labels(reader: Reader, data: DataConfig, name: str | None, which: str = "train") -> LabelSurvey:
    """Count the labels of a data set; no image is decoded.

    Raises:
        ValueError: no sample has one.
    """
    bad: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for one in read_samples(reader, data, bad, images=False, texts=False):
        try:
            counts[need_label(one.sample, name)] += 1
        except BadSample as error:
            bad[error.key] = error.reason
    if not counts:
        key, reason = next(iter(bad.items()), ("", "no samples"))
        raise ValueError(
            f"data.{which}: none of its {len(reader)} samples has a label; the first, {key!r}{place_of(key)}: {reason}"
        )
    return LabelSurvey(counts, counts.total(), reader)


class ClassificationConfig(TaskConfig):
    """Base of the tasks that name an image's class; they say how a batch is scored, and train nothing."""

    classes: str | None = None
    """File of class names, one a line, or `label<tab>name` where the data's labels are others; none = the labels."""
    label: str | None = None
    """Field with the label; none = `label`, `class`, ..., the first that there is, else the image's folder."""

    headline: ClassVar[str] = "top-1"

    def scorer(self, parts: Parts, reader: Reader, survey: LabelSurvey | None) -> tuple[Classes, Score, list[str]]:
        """Return the classes, how a batch of images is scored, and what a reader of the numbers must know.

        Args:
            parts: the model; in evaluation mode, without gradient, when images are scored.
            reader: what is classified; its labels are the classes where nothing else names them.
            survey: of the training data.
        """
        raise AssertionError(f"{type(self).__name__} does not define scorer")

    def survey(self, reader: Reader, data: DataConfig) -> LabelSurvey:
        """Count the training labels."""
        return survey_labels(reader, data, self.label)

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: Any) -> R:
        """Nothing is trained.

        Raises:
            ValueError: always; it says what can be done.
        """
        kind = run.task.kind  # type: ignore[attr-defined]
        raise ValueError(
            f"task {kind} leaves the model as it is, there is nothing to finetune; run vlp evaluate {kind} CHECKPOINT"
        )

    def evaluate(self, parts: Parts, reader: Reader, survey: LabelSurvey | None = None) -> Result:
        """Return top-1, top-5 and the per-class mean.

        Floors: "chance", and "majority", which orders the classes by how often the training data have them.
        """
        bad: dict[str, str] = {}
        classes, score, notes = self.scorer(parts, reader, survey)
        mine = range(len(reader))[my_share(len(reader))]
        samples = seen_samples(parts, reader, bad, indices=mine, texts=False)
        found = []
        for one, row, scores in self._scored(parts, classes, score, self._known(samples, classes, bad)):
            number = classes.of(one.sample.key, need_label(one.sample, self.label))
            rank = int(class_ranks(scores[None], torch.tensor([number]))[0])
            hits = {f"top-{k}": float(rank <= k) for k in (1, 5)}
            found.append((row | {"label": classes.names[number], "rank": rank, "metrics": hits}, number))
        found, bad = gather(found), gather_bad(bad)
        if not found:
            raise ValueError(no_labels("val", len(reader), bad))
        rows, labels = [row for row, _ in found], [number for _, number in found]
        floors = {"chance": chance_metrics(len(classes))}
        if survey is not None:
            floors["majority"] = prior_metrics(survey.by_number(classes), labels, len(classes))
        else:
            notes.append("no training data were named, so the majority is unknown; name them with --data.train")
        notes.insert(0, f"{len(classes)} classes, of which {len(set(labels))} have images here")
        metrics = classification_metrics([row["rank"] for row in rows], labels)
        return Result(metrics, floors, rows, bad, tuple(notes))

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, image, the best class and its probability, and the five best, for each image."""
        bad: dict[str, str] = {}
        classes, score, _ = self.scorer(parts, reader, None)
        samples = seen_samples(parts, reader, bad, texts=False)
        yield from (row for _, row, _ in self._scored(parts, classes, score, samples))
        for key, reason in bad.items():
            logger.warning("%s%s: no class, %s", key, place_of(key), reason)

    def _known(self, samples: Iterator[EvalSample], classes: Classes, bad: dict[str, str]) -> Iterator[EvalSample]:
        """The samples whose label is one of the classes."""
        for one in samples:
            try:
                classes.of(one.sample.key, need_label(one.sample, self.label))
            except BadSample as error:
                bad[error.key] = error.reason
            else:
                yield one

    def _scored(
        self, parts: Parts, classes: Classes, score: Score, samples: Iterator[EvalSample]
    ) -> Iterator[tuple[EvalSample, dict[str, Any], Tensor]]:
        """Each image with its row and scores [C], in order."""
        for group, batch in batches(parts, samples, self.batch):
            with evaluating(parts.model):
                scores = score(batch)
            best = scores.softmax(1).topk(min(SHOWN, len(classes)))
            for one, each, which, shares in zip(
                group, scores, best.indices.tolist(), best.values.tolist(), strict=True
            ):
                names = [classes.names[i] for i in which]
                row = {"key": one.sample.key, "image": one.image, "class": names[0], "probability": shares[0]}
                yield one, row | {"best": names, "probabilities": shares}, each
