"""Referring expressions: which part of the image does the text mean? As in RefCOCO, RefCOCO+ and RefCOCOg.

The box is either written by the model itself (objective box; Zeng et al. 2022, X-VLM, section 4.3), or chosen among
given ones by how well each region matches the text: cut out of the image, or, by a model of a detector's regions, alone
as the detector saw it.
Data: image (or a detector's arrays), expression, ``box`` (left, top, width, height in pixels); ``width`` and ``height``
of the image, which training needs; ``boxes``, the regions to choose from; ``split``, which tells the accuracy apart.
Shapes: S expressions, C regions.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from downstream.metrics.referring import Box, found, iou
from downstream.regions import (
    Regions,
    Truth,
    detected_boxes,
    read_detected,
    read_truth,
    score_detected,
    score_regions,
    scorer_of,
)
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
from encoders import RegionConfig
from encoders.types import Batch
from objectives import BoxConfig, LmConfig, ObjectiveConfig
from objectives.base import Rows
from objectives.box import Box as BoxObjective
from vlp.data.batch import Example
from vlp.data.fetch import Prepare
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, Sample
from vlp.data.records import place_of
from vlp.data.transforms import STILL
from vlp.model import Model

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

logger = logging.getLogger(__name__)

CARRIED = ("ref_id", "sent_id", "ann_id", "split")
"""Fields that predictions carry on."""

Asked: TypeAlias = tuple[EvalSample, Truth]


@dataclass(frozen=True)
class BoxSurvey:
    """Where the training data's boxes are: what answering without the image takes."""

    middle: tuple[float, ...]
    """Medians of the relative boxes' four values."""
    by_text: Mapping[str, tuple[float, ...]]
    """The same of every expression."""
    samples: int

    def blind(self, text: str, truth: Truth) -> tuple[float, ...]:
        """Return the box in pixels for a text, of all texts where it is new."""
        return truth.absolute(self.by_text.get(_words(text), self.middle))


class ReferringConfig(TaskConfig):
    """Find what a text refers to."""

    kind: Literal["referring"] = "referring"
    by: Literal["auto", "box", "regions"] = "auto"
    """How the box is found: written by objective box; or chosen among the data's `boxes` by matching. `auto`: written
    where the model can."""
    score: Literal["auto", "itm", "itc"] = "auto"
    """What matches regions: the matching head, or the embeddings. `auto`: the first where the model has it."""
    box: str = "box"
    """Field with the true box: left, top, width, height in pixels."""
    boxes: str = "boxes"
    """Field with the regions to choose from."""
    pairs: int = Field(512, ge=1)
    """Pairs of region and text that the fusion runs at once."""

    headline: ClassVar[str] = "accuracy"
    of_data: ClassVar[tuple[str, ...]] = ("box", "boxes")

    def settings(self, data: DataConfig) -> DataConfig:
        """Images are squashed to size and never moved: what moves pixels would move boxes."""
        still = data.transform.model_copy(update=STILL)
        if still != data.transform.model_copy(update={"flip": "never"}):
            logger.info("images are squashed to size, without crops, flips or turns: their boxes would not follow")
        return data.model_copy(update={"transform": still})

    def survey(self, reader: Reader, data: DataConfig) -> BoxSurvey:
        """Find the usual box of the training data, and of every expression."""
        bad: dict[str, str] = {}
        by_text: defaultdict[str, list[tuple[float, ...]]] = defaultdict(list)
        for one, truth in self._truths(read_samples(reader, data, bad, images=False), bad):
            for text in one.sample.texts:
                by_text[_words(text)].append(truth.relative())
        every = [box for boxes in by_text.values() for box in boxes]
        if not every:
            raise ValueError(no_labels("train", len(reader), bad))
        return BoxSurvey(_middle(every), {text: _middle(boxes) for text, boxes in by_text.items()}, len(every))

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: BoxSurvey) -> R:
        """Train the box head on the fused text, beside what the user states."""
        objectives = dict(run.objectives)
        if not any(isinstance(one, BoxConfig) for one in objectives.values()):
            known = next((one for one in pretrained.values() if isinstance(one, BoxConfig)), BoxConfig())
            objectives["box"] = known
        model = run.model
        if not any(isinstance(one, LmConfig) for one in objectives.values()):
            model = model.model_copy(update={"decoder": None})
        return run.model_copy(update={"model": model, "objectives": objectives})

    def prepare(self, run: RunConfig) -> Prepare:
        """Return an expression and its box."""
        return ReferringPrepare(self.box)

    def lacks(self, model: Model) -> str | None:
        """It takes a box head, or what matches regions with texts."""
        if self.by != "regions" and box_head(model) is not None:
            return None
        if self.by == "box":
            return "a box head (objective box)"
        if scorer_of(model, self.score) is None:
            what = {"itm": "objective itm", "itc": "objective itc", "auto": "objective itm or itc"}[self.score]
            return f"a box head (objective box) or what matches regions ({what})"
        return None

    def evaluate(self, parts: Parts, reader: Reader, survey: BoxSurvey | None = None) -> Result:
        """Return the share of expressions whose box is found (IoU at least 0.5), by split, and the mean IoU.

        Floors: of a written box "whole image"; of a chosen one "chance" and "largest region"; where there are training
        data "expression only", the usual box of the same expression, and the usual box of all where the text is new.
        """
        bad: dict[str, str] = {}
        mine = range(len(reader))[my_share(len(reader))]
        images = not reads_regions(parts.model)
        samples = self._truths(seen_samples(parts, reader, bad, indices=mine, images=images), bad)
        results = gather(list(self._located(parts, samples, bad)))
        bad = gather_bad(bad)
        if not results:
            raise ValueError(no_labels("val", len(reader), bad))
        rows, truths = [row for row, _ in results], [truth for _, truth in results]
        for row, truth in zip(rows, truths, strict=True):
            assert truth.box is not None
            row |= {"true box": list(truth.box), "iou": iou(row["box"], truth.box)}
            row["metrics"] = {"accuracy": float(found(row["box"], truth.box)), "mean IoU": row["iou"]}
        chosen = not self._writes(parts.model)
        floors = _floors(rows, truths, survey, chosen)
        return Result(_scores(rows, truths, [row["box"] for row in rows]), floors, rows, bad, _notes(truths, chosen))

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, image, text and box for each expression; a chosen box also with the regions' scores."""
        bad: dict[str, str] = {}
        images = not reads_regions(parts.model)
        samples = self._truths(seen_samples(parts, reader, bad, images=images), bad, labelled=False)
        yield from (row for row, _ in self._located(parts, samples, bad))
        for key, reason in bad.items():
            logger.warning("%s%s: no box, %s", key, place_of(key), reason)

    def _writes(self, model: Model) -> bool:
        return self.by != "regions" and box_head(model) is not None

    def _truths(self, samples: Iterable[EvalSample], bad: dict[str, str], labelled: bool = True) -> Iterator[Asked]:
        for one in samples:
            try:
                truth = read_truth(one.sample, self.box, self.boxes)
                if labelled and truth.box is None:
                    raise BadSample(one.sample.key, f"no {self.box}; name its field with --task.box")
            except BadSample as error:
                bad[error.key] = error.reason
            else:
                yield from ((each, truth) for each in _each_text(one))

    def _located(self, parts: Parts, samples: Iterator[Asked], bad: dict[str, str]) -> Iterator[tuple[dict, Truth]]:
        """Row and truth of each expression, in order."""
        if (missing := self.lacks(parts.model)) is not None:
            raise ValueError(
                f"task referring: this model lacks {missing}; finetune it with vlp finetune referring first"
            )
        boxes = self._written(parts, samples) if self._writes(parts.model) else self._chosen(parts, samples, bad)
        for one, truth, more in boxes:
            row = {"key": one.sample.key, "image": one.image, "text": one.sample.texts[0]}
            yield row | {name: one.sample.fields[name] for name in CARRIED if name in one.sample.fields} | more, truth

    def _written(self, parts: Parts, samples: Iterator[Asked]) -> Iterator[tuple[EvalSample, Truth, dict[str, Any]]]:
        """Each box as the model's head writes it."""
        head = box_head(parts.model)
        assert head is not None
        truths: list[Truth] = []

        def remember() -> Iterator[EvalSample]:
            for one, truth in samples:
                truths.append(truth)
                yield one

        for group, batch in batches(parts, remember(), self.batch):
            with evaluating(parts.model):
                written = _run_box(parts.model, head, batch)
            for one, each in zip(group, written.tolist(), strict=True):
                truth = truths.pop(0)
                yield one, truth, {"box": list(truth.absolute(each))}

    def _chosen(
        self, parts: Parts, samples: Iterator[Asked], bad: dict[str, str]
    ) -> Iterator[tuple[EvalSample, Truth, dict[str, Any]]]:
        """Each box as the region that matches best; an image's regions are encoded once for texts that follow."""
        score = scorer_of(parts.model, self.score)
        assert score is not None
        for _, several in groupby(samples, lambda asked: asked[0].image):
            asked = []
            for one, truth in several:
                try:
                    asked.append((one, self._offered(parts.model, one.sample, truth)))
                except BadSample as error:
                    bad[error.key] = error.reason
            if not asked:
                continue
            first, texts = asked[0][0].sample, [one.sample.texts[0] for one, _ in asked]
            every = list(dict.fromkeys(box for _, truth in asked for box in truth.boxes))
            if reads_regions(parts.model):
                arrays = read_detected(first, parts.model)
                every = list(detected_boxes(arrays, asked[0][1]))
                scores = score_detected(parts, arrays, texts, score, self.pairs)  # [S, C]
            else:
                scores = score_regions(parts, Regions(first.images[0], every, texts), score, self.pairs)
            place = {box: number for number, box in enumerate(every)}
            for (one, truth), row in zip(asked, scores.tolist(), strict=True):
                own = [row[place[box]] for box in truth.boxes]
                yield one, truth, {"box": list(truth.boxes[own.index(max(own))]), "scores": own}

    def _offered(self, model: Model, sample: Sample, truth: Truth) -> Truth:
        """The truth with the regions to choose from: of a model of regions, the detector's own.

        Raises:
            BadSample: there are none.
        """
        if reads_regions(model):
            return replace(truth, boxes=detected_boxes(read_detected(sample, model), truth))
        if not truth.boxes:
            raise BadSample(sample.key, f"no {self.boxes} to choose from; name the field with --task.boxes")
        return truth


@dataclass(frozen=True)
class ReferringPrepare:
    """A training sample -> its example; picklable, for loader workers."""

    box: str

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Example:
        """Make the example.

        Raises:
            BadSample: no expression, no box, or no size of the image.
        """
        # The images are resized by now, so the size must stand in the fields.
        plain = Sample(sample.key, (), sample.texts, sample.fields)
        truth = read_truth(plain, self.box)
        if truth.box is None or not sample.texts:
            raise BadSample(sample.key, f"no {self.box}" if sample.texts else "no expression")
        text = sample.texts[int(generator.integers(len(sample.texts)))]
        target = np.array(truth.relative(), dtype=np.float32)
        return Example(sample.key, sample.images, text, targets={"box": target})


def box_head(model: Model) -> BoxObjective | None:
    """Return the objective that writes boxes; None without one."""
    return next((one for one in model.objectives.values() if isinstance(one, BoxObjective)), None)


def reads_regions(model: Model) -> bool:
    """Return whether a model reads a detector's arrays instead of pixels."""
    return isinstance(model.config.vision, RegionConfig)


def _each_text(one: EvalSample) -> Iterator[EvalSample]:
    """A sample for each of its expressions, numbered where there are several."""
    sample = one.sample
    if len(sample.texts) < 2:
        yield one
        return
    for number, text in enumerate(sample.texts):
        yield replace(one, sample=replace(sample, key=f"{sample.key}/{number}", texts=(text,)))


def _run_box(model: Model, head: BoxObjective, batch: Batch) -> Tensor:
    """Boxes [S, 4] as shares: centre x, centre y, width, height."""
    own = torch.arange(batch.num_texts, device=model.device)
    return head.boxes(model.run([head.fused], batch, rows={"box": Rows(own, own)})[head.fused].pooled)


def _words(text: str) -> str:
    return " ".join(text.lower().split())


def _middle(boxes: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(median(values) for values in zip(*boxes, strict=True))


def _scores(rows: Sequence[Mapping[str, Any]], truths: Sequence[Truth], boxes: Sequence[Box]) -> dict[str, float]:
    """Accuracy over all and by split, and mean IoU, of one box a row."""
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    overlaps = []
    for row, truth, box in zip(rows, truths, boxes, strict=True):
        assert truth.box is not None
        for name in ("accuracy", *([f"accuracy/{row['split']}"] if "split" in row else [])):
            groups[name].append(found(box, truth.box))
        overlaps.append(iou(box, truth.box))
    return {name: sum(one) / len(one) for name, one in groups.items()} | {"mean IoU": sum(overlaps) / len(overlaps)}


def _floors(
    rows: Sequence[Mapping[str, Any]], truths: Sequence[Truth], survey: BoxSurvey | None, chosen: bool
) -> dict[str, dict[str, float]]:
    floors: dict[str, dict[str, float]] = {}
    blind = [None if survey is None else survey.blind(row["text"], truth) for row, truth in zip(rows, truths)]
    if chosen:
        shares = [sum(found(box, truth.box) for box in truth.boxes) / len(truth.boxes) for truth in truths if truth.box]
        floors["chance"] = {"accuracy": sum(shares) / len(shares)}
        largest = [max(truth.boxes, key=lambda box: box[2] * box[3]) for truth in truths]
        floors["largest region"] = _scores(rows, truths, largest)
        blind = [
            None if guess is None else max(truth.boxes, key=lambda box, guess=guess: iou(box, guess))  # type: ignore[misc]
            for guess, truth in zip(blind, truths)
        ]
    else:
        floors["whole image"] = _scores(rows, truths, [(0, 0, truth.width, truth.height) for truth in truths])
    guesses = [guess for guess in blind if guess is not None]
    if guesses:
        floors["expression only"] = _scores(rows, truths, guesses)
    return floors


def _notes(truths: Sequence[Truth], chosen: bool) -> tuple[str, ...]:
    if not chosen:
        return ("boxes are written by the model; found: IoU at least 0.5",)
    best = [any(found(box, truth.box) for box in truth.boxes) for truth in truths if truth.box is not None]
    number = sum(len(truth.boxes) for truth in truths) / len(truths)
    return (
        f"boxes are chosen among {number:.1f} given regions on average; found: IoU at least 0.5",
        f"no choice among them can score more than {sum(best) / len(best):.3f}",
    )
