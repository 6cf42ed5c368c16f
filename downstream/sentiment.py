"""Multimodal sentiment: how positive somebody is who is seen and quoted, as a number (CMU-MOSI, MOSEI).

Data: columns image (a frame), text (what is said) and label (-3 to 3), as `vlp data convert mosi` writes them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from downstream.metrics.sentiment import sentiment_metrics
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
from objectives import ObjectiveConfig, RegressConfig
from objectives.base import Fuse
from objectives.regress import Regress
from vlp.data.batch import Example
from vlp.data.fetch import Prepare
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, Sample
from vlp.data.records import place_of
from vlp.model import Model

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SentimentSurvey:
    """What the training data say on average."""

    mean: float
    samples: int


class SentimentConfig(TaskConfig):
    """Say how positive a person is."""

    kind: Literal["sentiment"] = "sentiment"
    label: str = "label"
    """Field with the number."""
    blank_images: bool = False
    """Also score with the images blanked: what the model itself knows from the text alone. Doubles the time."""

    headline: ClassVar[str] = "MAE"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    of_data: ClassVar[tuple[str, ...]] = ("label",)

    def settings(self, data: DataConfig) -> DataConfig:
        """Texts are in the field text unless the user names another."""
        return data if data.text is not None else data.model_copy(update={"text": "text"})

    def survey(self, reader: Reader, data: DataConfig) -> SentimentSurvey:
        """Take the mean of the training data."""
        bad: dict[str, str] = {}
        values = [
            value for _, value in self._labelled(read_samples(reader, data, bad, images=False, several=False), bad)
        ]
        if not values:
            raise ValueError(no_labels("train", len(reader), bad, "--task.label"))
        return SentimentSurvey(sum(values) / len(values), len(values))

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: SentimentSurvey) -> R:
        """Replace the pretraining objectives by one number; the checkpoint's own head stays."""
        kept = {name: one for name, one in pretrained.items() if isinstance(one, RegressConfig)}
        objectives = dict(run.objectives)
        if not any(isinstance(one, RegressConfig) for one in objectives.values()):
            objectives |= dict(list(kept.items())[:1]) or {"regress": RegressConfig()}
        model = run.model.model_copy(update={"decoder": None})
        return run.model_copy(update={"model": model, "objectives": objectives})

    def prepare(self, run: RunConfig) -> Prepare:
        """Return the text with its image, and the number."""
        return SentimentPrepare(self)

    def lacks(self, model: Model) -> str | None:
        """Scoring takes a head that says a number."""
        return None if _head(model) is not None else "a head that says a number (objective regress)"

    def evaluate(self, parts: Parts, reader: Reader, survey: SentimentSurvey | None = None) -> Result:
        """Return MAE, Pearson's correlation, Acc-7, and Acc-2 and F1 under both conventions.

        Floors: "mean" says the training data's mean of every sample; "blank images", where asked for, is the model on
        grey images.
        """
        rows, values, bad = labelled_rows(
            parts, reader, self._labelled, lambda samples: self._rows(parts, samples), "--task.label"
        )
        for row, value in zip(rows, values, strict=True):
            row |= {"label": value}
            signs = float((row["prediction"] >= 0) == (value >= 0))
            row |= {"metrics": {"Acc-2 has0": signs, "-MAE": -abs(row["prediction"] - value)}}
        metrics = sentiment_metrics([row["prediction"] for row in rows], values)
        floors: dict[str, dict[str, float]] = {}
        if survey is not None:
            floors["mean"] = sentiment_metrics([survey.mean] * len(values), values)
        if self.blank_images:
            floors["blank images"] = sentiment_metrics([row["blank_prediction"] for row in rows], values)
        return Result(metrics, floors, rows, bad, self._notes(survey))

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, text and the number for each sample."""
        bad: dict[str, str] = {}
        yield from self._rows(parts, seen_samples(parts, reader, bad, several=False))
        for key, reason in bad.items():
            logger.warning("%s%s: no number, %s", key, place_of(key), reason)

    def read_value(self, sample: Sample) -> float:
        """Return the sample's number.

        Raises:
            BadSample: it has none.
        """
        value = sample.fields.get(self.label)
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise BadSample(sample.key, f"{self.label} {value!r} is not a number")
        return number

    def judge(self, model: Model, batch: Batch) -> Tensor:
        """Texts with their images -> the number of each [B]."""
        head = _head(model)
        assert head is not None
        return head.value(model.run([Fuse()], batch)[Fuse()].pooled).float()

    def _labelled(self, samples: Iterable[EvalSample], bad: dict[str, str]) -> Iterator[tuple[EvalSample, float]]:
        for one in samples:
            try:
                yield one, self.read_value(one.sample)
            except BadSample as error:
                bad[error.key] = error.reason

    def _rows(self, parts: Parts, samples: Iterator[EvalSample]) -> Iterator[dict[str, Any]]:
        """One row a sample, in order."""
        model = parts.model
        if (missing := self.lacks(model)) is not None:
            raise ValueError(
                f"task sentiment: this model lacks {missing}; finetune it with vlp finetune sentiment first"
            )
        for group, batch in batches(parts, samples, self.batch):
            with evaluating(model):
                found = self.judge(model, batch).tolist()
                blank = self.judge(model, blanked(batch)).tolist() if self.blank_images else found
            for one, value, without in zip(group, found, blank, strict=True):
                row = {"key": one.sample.key, "image": one.image, "text": one.sample.texts[0], "prediction": value}
                yield row | ({"blank_prediction": without} if self.blank_images else {})

    def _notes(self, survey: SentimentSurvey | None) -> tuple[str, ...]:
        notes = [
            "Acc-2 and F1: has0 is negative against the rest, non0 negative against positive without neutral samples"
        ]
        if survey is None:
            notes.append("no training data were named, so their mean is unknown; name them with --data.train")
        else:
            notes.append(f"mean: {survey.mean:.3f}, of {survey.samples} training samples")
        return tuple(notes)


@dataclass(frozen=True)
class SentimentPrepare:
    """A training sample -> its example; picklable, for loader workers."""

    task: SentimentConfig

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Example:
        """Make the example.

        Raises:
            BadSample: no text, or no number.
        """
        text = only_text(sample)
        value = np.float32(self.task.read_value(sample))
        return Example(sample.key, sample.images, text, targets={"value": value})  # type: ignore[dict-item]


def _head(model: Model) -> Regress | None:
    return next((one for one in model.objectives.values() if isinstance(one, Regress)), None)
