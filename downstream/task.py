"""What a task is: what it finetunes, how it is scored, and what it leaves per sample.

A task is one file with one config class, a :class:`TaskConfig`; the union of kinds stands in ``downstream``'s
``__init__.py``. Its methods take ``Parts`` (model, tokenizer, resolved run): what training ends with and what a
checkpoint loads to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field

from downstream.seeing import seeing
from encoders.types import Batch, Images, Regions
from objectives import ObjectiveConfig
from objectives.collectives import rank, world_size
from vlp.config import Config
from vlp.data.batch import Example, collate
from vlp.data.boxes import boxes_of
from vlp.data.fetch import Prepare
from vlp.data.group import without_images
from vlp.data.loader import DataConfig
from vlp.data.order import rank_slice
from vlp.data.reader import BadSample, Reader, Sample, decode_sample
from vlp.data.records import ARRAY_EXTENSIONS, place_of
from vlp.data.regions import RegionArrays
from vlp.data.table import IMAGE_COLUMNS
from vlp.data.transforms import EvalTransform, pad_images
from vlp.model import Model

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig
    from vlp.train.step import Rewrite

R = TypeVar("R", bound="RunConfig")
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What an evaluation gives."""

    metrics: dict[str, float]
    """By their usual names; accuracies and recalls in 0..1, CIDEr-D in 0..10."""
    floors: dict[str, dict[str, float]]
    """What blindness reaches, under the metrics' names: {"majority": {"accuracy": 0.3}, "chance": {...}}."""
    predictions: list[dict[str, Any]]
    """One plain mapping a sample, in the data's order; each has "key". Its "metrics" map the names of metrics to what
    the sample adds to them (larger is better): by these two runs are compared; without them, by fields like
    "accuracy"."""
    bad: dict[str, str] = field(default_factory=dict)
    """Samples left out because they could not be used: key -> reason."""
    notes: tuple[str, ...] = ()
    """Sentences a reader of the numbers must know (which definition, what could not be computed and why)."""
    counts: dict[str, int] = field(default_factory=dict)
    """What was scored, beside the number of predictions: {"images": 1000, "texts": 5000}."""


class TaskConfig(Config):
    """Base of the tasks: settings, and what is done with them. Stateless; all ranks call the same methods."""

    batch: int = Field(128, ge=1)
    """Samples that evaluation runs at once."""

    headline: ClassVar[str]
    """The metric that tables and floors are about."""
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    """Which headline is the better one: by it the best checkpoint of a finetuning is kept."""
    of_data: ClassVar[tuple[str, ...]] = ()
    """Settings that name columns, files or data: an evaluation does not take them from the finetuning that made its
    checkpoint, as its own data may be others."""

    def survey(self, reader: Reader, data: DataConfig) -> Any:
        """Return what the task wants to know of the training data (answer list, most frequent caption); one pass.

        Raises:
            ValueError: the data are not this task's.
        """
        return None

    def for_scores(self, survey: Any) -> Any:
        """Return what the scores themselves, not only their floors, take of the survey: None = nothing.

        Evaluations during training are given no more, since floors do not change.
        """
        return None

    def often(self) -> Self:
        """Return the task as evaluations during training run it: without what costs most and chooses no checkpoint.

        Left out are metrics that are Java programs, and the floors of blanked images.
        """
        off = {"java": (), "meteor": False, "blank_images": False}
        return self.model_copy(update={name: value for name, value in off.items() if name in type(self).model_fields})

    def settings(self, data: DataConfig) -> DataConfig:
        """Return the data's settings with this task's defaults for what the user left open (the text column)."""
        return data

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: Any) -> R:
        """Turn the run into this task's: its objectives, and a model that has exactly the parts these train.

        Args:
            run: finetuning config; ``run.model`` is the checkpoint's, ``run.objectives`` what the user stated.
            pretrained: the checkpoint's objectives, for the task to keep or drop.
            survey: of the training data.
        """
        raise AssertionError(f"{type(self).__name__} does not define adapt")

    def prepare(self, run: RunConfig) -> Prepare:
        """Return how a training sample becomes an example; picklable."""
        raise AssertionError(f"{type(self).__name__} does not define prepare")

    def rewrite(self, parts: Parts, survey: Any) -> Rewrite | None:
        """Return what gives the texts to train on where the model writes them itself; None = the data's are used.

        Args:
            parts: of the run.
            survey: of the training data.
        """
        return None

    def lacks(self, model: Model) -> str | None:
        """Return what the model lacks for this task, in words; None = it can be evaluated as it is."""
        raise AssertionError(f"{type(self).__name__} does not define lacks")

    def evaluate(self, parts: Parts, reader: Reader, survey: Any = None) -> Result:
        """Score the model on labelled data; ``survey`` (of the training data) is what floors are computed from.

        Raises:
            ValueError: the data have no labels, or the model lacks what it needs.
        """
        raise AssertionError(f"{type(self).__name__} does not define evaluate")

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield one prediction a sample of unlabelled data."""
        raise AssertionError(f"{type(self).__name__} does not define predict")

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> Any | None:
        """Return rows of ``Result.predictions`` or ``predict`` in the official format as json data; None = it has none.

        Raises:
            ValueError: the rows lack what the format asks for (question ids).
        """
        return None


@dataclass(frozen=True)
class EvalSample:
    """A decoded sample and whose image it holds."""

    sample: Sample
    index: int
    """Its number in the reader."""
    image: str
    """Equal for samples of one source that show the same image."""
    regions: tuple[RegionArrays, ...] = ()
    """What a detector saw of each image, where the model reads that in its place."""
    boxes: str | None = None
    """Field with the boxes that its words name; None: they are not read."""

    def shown(self, text: str, *, second: str | None = None, image_id: int | None = None) -> Example:
        """Return the sample's image, or what a detector saw of it, with a text."""
        one = Example(self.sample.key, self.sample.images, text, second=second, image_id=image_id)
        if self.boxes is not None:
            one = replace(one, named=boxes_of(self.sample, self.boxes, text))
        if not self.regions:
            return one
        return replace(one, images=(), regions=self.regions[0], more_regions=self.regions[1:])


def read_samples(
    reader: Reader,
    data: DataConfig,
    bad: dict[str, str],
    *,
    images: bool = True,
    texts: bool = True,
    several: bool = True,
    indices: Sequence[int] | None = None,
    see: Callable[[Sample], tuple[RegionArrays, ...]] | None = None,
) -> Iterator[EvalSample]:
    """Yield the reader's samples in order; those that cannot be used are noted in ``bad``.

    Args:
        reader: the data.
        data: names the members or columns.
        bad: key -> reason, filled.
        images: decode images (else they are neither needed nor touched).
        texts: a sample without text is bad.
        several: a sample may have several texts; else such a one is bad.
        indices: only these.
        see: gives what a detector saw of a sample's image; raises BadSample.
    """
    for index in range(len(reader)) if indices is None else indices:
        try:
            raw = reader[index]
            read = raw if images else without_images(raw)
            regions = any(
                name.rsplit(".", 1)[-1] in ARRAY_EXTENSIONS for name in raw.files
            )  # which stand for the image
            sample = decode_sample(
                read,
                image=data.image if images else None,
                text=data.text,
                need_image=images and not regions,
                need_text=texts,
            )
            if not several:
                only_text(sample)
            seen = () if see is None else see(sample)
            boxes = data.boxes if images else None
            if boxes is not None:
                boxes_of(sample, boxes, next(iter(sample.texts), None))
        except BadSample as error:
            bad[error.key] = error.reason
            continue
        yield EvalSample(sample, index, f"{raw.source}:{image_key(sample, data)}", seen, boxes)


def seen_samples(parts: Parts, reader: Reader, bad: dict[str, str], **how: Any) -> Iterator[EvalSample]:
    """Yield the samples of ``read_samples`` as the model sees them: with a detector's regions where it reads these.

    Arrays that are missing, broken or of another width are noted in ``bad`` as images that cannot be read are.
    """
    return read_samples(reader, parts.run.data, bad, see=seeing(parts.model.config, parts.run.data), **how)


def only_text(sample: Sample) -> str:
    """Return a sample's text, where a task reads one of each.

    Raises:
        BadSample: it has none, or several, of which the others would go unread.
    """
    if not sample.texts:
        raise BadSample(sample.key, "no text, or an empty one")
    if len(sample.texts) > 1:
        raise BadSample(sample.key, f"{len(sample.texts)} texts, of which one is read; give each a sample of its own")
    return sample.texts[0]


def image_key(sample: Sample, data: DataConfig) -> str:
    """Return what names the sample's image within its source: field image_id, its path, else the sample's own key."""
    columns = [data.image] if isinstance(data.image, str) else list(data.image or ())
    for name in ("image_id", *columns, *IMAGE_COLUMNS):
        if isinstance(value := sample.fields.get(name), str | int):
            return str(value)
    return sample.key


def batches(parts: Parts, samples: Iterator[EvalSample], size: int) -> Iterator[tuple[list[EvalSample], Batch]]:
    """Yield samples in batches with their clean view on the model's device: image and first text of each.

    A sample without text gets an empty one.
    """
    for group in groups(samples, size):
        examples = [one.shown((one.sample.texts or ("",))[0], image_id=number) for number, one in enumerate(group)]
        yield group, make_batch(parts, examples)


def make_batch(parts: Parts, examples: Sequence[Example], places: Sequence[int] | None = None) -> Batch:
    """Resize and tokenise examples for evaluation -> batch on the model's device, view "clean" only.

    Examples that follow each other with an equal number in ``places`` share the first one's images.
    """
    data, vision = parts.run.data, parts.model.config.vision
    examples = [replace(one, prefix=data.prefix) for one in examples]
    numbers = range(len(examples)) if places is None else places
    if (see := seeing(parts.model.config, data)) is not None:
        batch = collate(examples, numbers, parts.tokenizer, {}, data.max_length, 0, regions=see.layout)
        return batch.to(parts.model.device)
    resize = EvalTransform(data.transform.model_copy(update={"image_size": vision.image_size}))
    resized: list[Example] = []
    for number, one in enumerate(examples):
        shared = number > 0 and numbers[number] == numbers[number - 1]
        images = resized[-1].images if shared else tuple(resize(image) for image in one.images)
        resized.append(replace(one, images=images))
    if len({image.shape for one in resized for image in one.images}) < 2:
        return collate(resized, numbers, parts.tokenizer, {}, data.max_length, 0).to(parts.model.device)
    # Images in their own aspect ratios (ViLT): all are shown in the size of the largest.
    own = [one for place, one in enumerate(resized) if place == 0 or numbers[place] != numbers[place - 1]]
    shown = pad_images([image for one in own for image in one.images], getattr(parts.model.vision, "patch_side", 1))
    blank = [replace(one, images=(torch.zeros(3, 1, 1),) * len(one.images)) for one in resized]
    batch = collate(blank, numbers, parts.tokenizer, {}, data.max_length, 0)
    return replace(batch, images={"clean": shown}).to(parts.model.device)


def blanked(batch: Batch) -> Batch:
    """Return the batch with grey images (or regions of no features): what a model says of it, the text alone told."""
    grey: dict[str, Images | Regions] = {}
    for view, one in batch.images.items():
        if isinstance(one, Images):
            grey[view] = replace(one, pixels=torch.full_like(one.pixels, 128))
        else:
            grey[view] = replace(one, features=torch.zeros_like(one.features))
    return replace(batch, images=grey)


def groups(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` items, the last one shorter."""
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def my_share(number: int) -> slice:
    """Return this rank's part of ``number`` things: contiguous, so that gathered parts are in their order."""
    share = rank_slice(0, number, rank(), world_size())
    return slice(share.start, share.stop)


def labelled_rows(
    parts: Parts,
    reader: Reader,
    labelled: Callable[[Iterator[EvalSample], dict[str, str]], Iterable[tuple[EvalSample, T]]],
    predict: Callable[[Iterator[EvalSample]], Iterable[dict[str, Any]]],
    option: str = "--task.answer",
    several: bool = False,
) -> tuple[list[dict[str, Any]], list[T], dict[str, str]]:
    """Predict this rank's share of the labelled samples; return all ranks' rows, a label for each, and bad samples.

    Args:
        parts: model, tokenizer, run.
        reader: the data.
        labelled: samples -> those that have a label, with it; the others are noted in what it is given.
        predict: samples -> one row for each, in order.
        option: flag that names the labels' field.
        several: a sample may have several texts.

    Raises:
        ValueError: no sample can be used.
    """
    bad: dict[str, str] = {}
    mine = range(len(reader))[my_share(len(reader))]
    samples = seen_samples(parts, reader, bad, several=several, indices=mine)
    labels: list[T] = []

    def remember() -> Iterator[EvalSample]:
        for one, label in labelled(samples, bad):
            labels.append(label)
            yield one

    rows = gather(list(predict(remember())))
    every, bad = gather(labels), gather_bad(bad)
    if not rows:
        raise ValueError(no_labels("val", len(reader), bad, option))
    return rows, every, bad


def no_labels(which: str, number: int, bad: Mapping[str, str], option: str = "--task.answer") -> str:
    """Return the error for data of which no sample can be used; ``option``: the flag that names the labels' field."""
    key, reason = next(iter(bad.items()), ("", "no samples"))
    return (
        f"data.{which}: none of its {number} samples can be used; the first, {key!r}{place_of(key)}: {reason}; "
        f"name the columns or fields with --data.text and, for answers, {option}"
    )


def gather(items: list[T]) -> list[T]:
    """Return all ranks' items, joined in rank order, on every rank."""
    if world_size() == 1:
        return items
    parts: list[list[T] | None] = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part or ()]


def gather_bad(bad: Mapping[str, str]) -> dict[str, str]:
    """Return all ranks' bad samples."""
    return dict(gather(list(bad.items())))


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Put the model into eval mode without gradients for the time of the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
