"""Samples to the batches of each optimizer step, from any position of the run on.

A run is a line of positions 0, 1, 2, ...; which sample stands at one, how it is augmented, which caption is drawn and
how it is masked depend on the seed and the position alone. So ranks, workers and resuming change nothing.
Shapes: T texts, I images per text.
"""

from __future__ import annotations

import logging
import math
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from encoders.types import Batch
from objectives.base import Draw, View
from vlp.config import Config
from vlp.data.batch import Example, collate, numbered, stable_hash
from vlp.data.group import Groups, group_samples, without_images
from vlp.data.order import Order, batch_positions, rank_slice
from vlp.data.reader import BadSample, RawSample, Reader, Sample, decode_sample
from vlp.data.tokenizer import Tokenizer, TokenizerConfig
from vlp.data.transforms import ImageTransformConfig, TrainTransform

logger = logging.getLogger(__name__)

_TRIES = 100  # samples in a row that may be bad
_TOLERATED = 10  # bad samples that the first few hundred may hold, whatever their share

Prepare: TypeAlias = Callable[[Sample, np.random.Generator], Example]
"""Sample with transformed images, generator keyed by its position and the text's number there -> example of one text.
It pickles; it may raise BadSample."""

Slot: TypeAlias = tuple[int, int]
"""Position in the run, index of the sample there."""


class DataConfig(Config):
    """What is read, and how it becomes batches."""

    train: str | tuple[str, ...] | None = None
    """Training data: tar shards ('shards/{000..099}.tar', URLs too), a csv/jsonl/parquet table, a folder, or a list."""
    val: str | tuple[str, ...] | None = None
    """Validation data, in the same forms."""
    where: dict[str, Any] | None = None
    """Only samples whose fields have these values, as {split: train}."""
    val_where: dict[str, Any] | None = None
    """The same for the validation data; none = as where."""
    image: str | tuple[str, ...] | None = None
    """Column or columns (tables), or members by extension (shards), of the images; none = guessed."""
    text: str | None = None
    """Column (tables), member or json field (shards) of the texts; none = guessed."""
    root: str | None = None
    """Folder that the image paths of tables are relative to; none = the table's own."""
    alternates: str | None = None
    """Field with other texts of the image (tags): a trained tokenizer learns their words too."""
    alternate_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the training samples whose text is drawn from `alternates`, where they have any."""
    texts_per_image: int = Field(default=1, ge=1)
    """Texts that come with each training image, which is encoded once for all: other captions of its sample, or the
    texts of its group; where there are fewer they repeat. Samples, batch sizes and durations then count images."""
    group: str | None = None
    """Field by which training samples show the same image (image_id); they count as one, with several texts."""
    hash: str | None = None
    """Fingerprint that the training data must have; written when a run starts, so that resuming on others shows."""
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    """Text to ids."""
    max_length: int = Field(default=32, ge=3)
    """Most ids of a text, the special ones included; longer texts are cut."""
    transform: ImageTransformConfig = Field(default_factory=ImageTransformConfig)
    """Image size and augmentation."""
    workers: int = Field(default=2, ge=0)
    """Loader processes per rank; 0 loads in the training process. The batches are the same."""
    bad_samples: float = Field(default=0.01, ge=0, le=1)
    """Share of bad samples, of those read by a rank, above which the run stops; 0 = at the first. Else ten are let pass
    in any case, or a tenth of data of less than 100 samples."""


def check_hash(reader: Reader, config: DataConfig) -> None:
    """Compare training data with what the run was started on.

    Raises:
        ValueError: They differ.
    """
    if config.hash is not None and config.hash != reader.fingerprint:
        raise ValueError(
            f"data.hash {config.hash} is not that of data.train ({reader.fingerprint}): the data changed since "
            "the run began; restore them, or set data.hash none to go on with these"
        )


def pair_example(sample: Sample, generator: np.random.Generator) -> Example:
    """Image-text pair for pretraining: one of the sample's captions, drawn anew at each position.

    Raises:
        BadSample: No caption, or only empty ones.
    """
    captions = [text for text in sample.texts if text.strip()]
    if not captions:
        raise BadSample(sample.key, "no caption, or an empty one")
    return Example(sample.key, sample.images, captions[int(generator.integers(len(captions)))])


def image_identity(raw: RawSample, sample: Sample) -> int:
    """Id that marks samples of the same image, or concept, as such.

    The field ``image_id`` if there is one; else of shards the key; of tables, whose keys are row numbers and which may
    name an image in several rows, the content of the image files.
    """
    if (named := sample.fields.get("image_id")) is not None:
        return stable_hash(str(named))
    if raw.texts is None:
        return stable_hash(raw.key)
    return stable_hash(b"".join(raw.files.values()))


class _Fetched(NamedTuple):
    """What a worker hands over for one micro-batch; errors come as values, since torch would wrap their message."""

    batch: Batch | None
    bad: tuple[tuple[str, str], ...]
    error: ValueError | None


@dataclass(frozen=True)
class _Fetch(Dataset[_Fetched]):
    """Slots of one micro-batch -> its batch. Everything that a worker process does."""

    reader: Reader
    groups: Groups | None
    """What slots count instead of samples."""
    prepare: Prepare
    tokenizer: Tokenizer
    views: Mapping[str, View]
    config: DataConfig
    transform: TrainTransform
    seed: int

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self.reader if self.groups is None else self.groups)

    @property
    def draw(self) -> Draw:
        """Source of the draws of each position."""
        return Draw(self.seed)

    def __getitem__(self, slots: Sequence[Slot]) -> _Fetched:
        bad: list[tuple[str, str]] = []
        try:
            found = [(position, each) for position, index in slots for each in self._examples(position, index, bad)]
            positions, examples = [position for position, _ in found], [each for _, each in found]
            batch = collate(examples, positions, self.tokenizer, self.views, self.config.max_length, self.seed)
            return _Fetched(batch, tuple(bad), None)
        except ValueError as error:
            plain = ValueError(str(error))  # subclasses may not pickle
            plain.add_note("".join(traceback.format_exception(error)))
            return _Fetched(None, tuple(bad), plain)

    def _examples(self, position: int, index: int, bad: list[tuple[str, str]]) -> list[Example]:
        """The examples of one position; the next good sample takes a bad one's place."""
        tries = min(_TRIES, len(self))
        for offset in range(tries):
            try:
                return self._make(position, (index + offset) % len(self))
            except BadSample as error:
                bad.append((error.key, error.reason))
        raise ValueError(
            f"data: {tries} samples in a row are unusable, the first is '{bad[-tries][0]}': {bad[-tries][1]}; "
            "check the data, and data.image and data.text"
        )

    def _make(self, position: int, index: int) -> list[Example]:
        raw, samples = self._read(position, index)
        # Whatever the task makes the text of must not say left or right when the image is mirrored.
        said = [text for sample in samples for text in (*sample.texts, *_strings(sample.fields))]
        generator = self.draw.sample("augment", position)
        images = tuple(self.transform(image, generator, said) for image in samples[0].images)
        examples = []
        for number, sample in enumerate(samples):
            if self.config.alternates is not None:
                sample = self._alternate(sample, self.config.alternates, position, number)
            one = self.prepare(replace(sample, images=images), self.draw.sample(numbered("example", number), position))
            try:
                for text in (one.text, *one.other_texts.values()):
                    text.encode()
            except UnicodeEncodeError as error:
                raise BadSample(sample.key, f"text is not Unicode: {error.reason}") from error
            examples.append(replace(one, image_id=image_identity(raw, sample)) if one.image_id is None else one)
        return examples

    def _read(self, position: int, index: int) -> tuple[RawSample, list[Sample]]:
        """The sample as stored, and one sample a text to train on; only the first has its images decoded."""
        number = self.config.texts_per_image
        generator = self.draw.sample("texts", position)
        indices = [index] if self.groups is None else _some_of(self.groups[index].tolist(), number, generator)
        raws = [self.reader[i] for i in indices]
        # Whether a text is needed, and which, is for `prepare` to say.
        text, need = self.config.text, self.config.image
        samples = [decode_sample(raws[0], image=need, text=text, need_text=False)]
        samples += [
            decode_sample(without_images(raw), text=text, need_image=False, need_text=False) for raw in raws[1:]
        ]
        if number == 1:
            return raws[0], samples
        if len(samples[0].images) > 1:
            raise ValueError(
                f"data.texts_per_image {number} shares one image, but sample '{samples[0].key}' has "
                f"{len(samples[0].images)}; set it to 1"
            )
        if len(samples) == 1:
            samples = [replace(samples[0], texts=(each,)) for each in samples[0].texts] or samples
            first = samples[0]
            samples = [replace(each, images=first.images) for each in _some_of(samples, number, generator)]
        return raws[0], [samples[i % len(samples)] for i in range(number)]

    def _alternate(self, sample: Sample, field: str, position: int, number: int) -> Sample:
        """The sample with one of its other texts in place of its own, for a share of the positions."""
        found = [text for text in _strings(sample.fields.get(field, ())) if text.strip()]
        generator = self.draw.sample(numbered("alternate", number), position)
        if not found or generator.random() >= self.config.alternate_share:
            return sample
        return replace(sample, texts=(found[int(generator.integers(len(found)))],))


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _same(fetched: Any) -> Any:
    return fetched


def _leave_signals(worker: int) -> None:
    """Ignore what ends a whole process group (ctrl-C, `timeout`, Slurm): the training process saves, and ends us."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _Micro(NamedTuple):
    """One micro-batch: this rank's positions, and the number of samples of every rank."""

    positions: range
    sizes: tuple[int, ...]


class Loader:
    """Batches of one rank, step by step.

    Args:
        reader: The samples.
        prepare: Makes an example of a sample.
        tokenizer: Text to ids.
        views: Text views besides "clean", by name (``Model.text_views()``).
        config: Of the data.
        seed: Of the run.
        global_batch: Samples of one step over all ranks and micro-batches.
        micro_batches: Parts that each rank cuts its share of a step into.
        rank: This rank.
        world: Number of ranks.
        shuffle: Draw a new order every epoch, else read as stored.
        transform: Of the images in ``steps``; None = augmentation as ``config.transform`` says.

    Attributes:
        bad: Key and reason of every unusable sample that this rank met.

    Raises:
        ValueError: There are no samples, or fewer in a step than ranks.
    """

    def __init__(
        self,
        reader: Reader,
        prepare: Prepare,
        tokenizer: Tokenizer,
        views: Mapping[str, View],
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        micro_batches: int = 1,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        transform: TrainTransform | EvalTransform | None = None,
    ):
        if global_batch < world:
            raise ValueError(f"global_batch {global_batch} is less than the {world} ranks; raise it or use fewer ranks")
        assert micro_batches >= 1
        self.order = Order(len(reader), seed, shuffle)
        self.bad: dict[str, str] = {}
        self._config, self._micro_batches = config, micro_batches
        self._global_batch, self._rank, self._world = global_batch, rank, world
        self._seen = 0
        train = transform or TrainTransform(config.transform)
        self._fetch = _Fetch(reader, prepare, tokenizer, views, config, train, seed, substitute=True)

    def steps(self, start: int, end: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of every step over the positions ``start`` .. ``end - 1``.

        The last step may be smaller; one with fewer samples than ranks is left out, with a line in the log. All ranks
        get equally many micro-batches per step; where ranks differ in size, ``Batch.counts`` says how.

        Args:
            start: Samples that the run has seen.
            end: Samples at which it stops.

        Raises:
            ValueError: Too many samples are bad, or do not fit together.
        """
        index = self.order.index
        slots = ([(p, index(p)) for p in micro.positions] for _, micros in self._plan(start, end) for micro in micros)
        fetched = self._batches(self._fetch, slots)
        done = start
        for begin, micros in self._plan(start, end):
            batches = []
            for micro in micros:
                batch = next(fetched)
                assert batch is not None  # bad samples are substituted
                batches.append(replace(batch, seen=begin, counts=_counts(batch, micro.sizes)))
            yield batches
            done = begin + self._global_batch
        if done < end:
            logger.info("the last %d samples are fewer than the %d ranks and are left out", end - done, self._world)

    def examples_once(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Yield every sample once, in stored order and without augmentation; each rank a contiguous part.

        Bad samples are left out, counted and named. ``Batch.position`` is the sample's index in the reader.

        Args:
            batch_size: Samples per batch of this rank; None = the largest micro-batch of a step.

        Raises:
            ValueError: Too many samples are bad, or do not fit together.
        """
        size = batch_size or math.ceil(self._global_batch / (self._world * self._micro_batches))
        own = rank_slice(0, self.order.size, self._rank, self._world)
        slots = ([(i, i) for i in own[first : first + size]] for first in range(0, len(own), size))
        fetch = replace(self._fetch, transform=EvalTransform(self._config.transform), substitute=False)
        for batch in self._batches(fetch, slots):
            if batch is not None:
                yield batch

    def report_bad(self) -> None:
        """Say in the log how many samples were bad."""
        if self.bad:
            logger.warning("%d samples were bad, of %d read: %s", len(self.bad), self._seen, _some(self.bad))

    def _plan(self, start: int, end: int) -> Iterator[tuple[int, list[_Micro]]]:
        """First position and micro-batches of every step."""
        while start < end:
            whole = batch_positions(start, self._global_batch, end)
            shares = [rank_slice(start, len(whole), rank, self._world) for rank in range(self._world)]
            # The last share is the smallest: no rank may run out of micro-batches while others wait for it.
            number = min(self._micro_batches, len(shares[-1]))
            if number == 0:
                return
            micros = []
            for k in range(number):
                parts = [rank_slice(share.start, len(share), k, number) for share in shares]
                micros.append(_Micro(parts[self._rank], tuple(len(part) for part in parts)))
            yield start, micros
            start = whole.stop

    def _batches(self, fetch: _Fetch, slots: Iterable[list[Slot]]) -> Iterator[Batch | None]:
        """Fetch micro-batches in order, in workers or here; None where no sample of one is good."""
        loader: DataLoader[_Fetched] = DataLoader(
            fetch,
            batch_size=None,
            sampler=slots,
            collate_fn=_same,
            num_workers=self._config.workers,
            worker_init_fn=_leave_signals,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # torch would draw from the global one, which a resumed run could not repeat
        )
        for fetched in loader:
            self._note(fetched)
            if fetched.error is not None:
                raise fetched.error
            yield fetched.batch

    def _note(self, fetched: _Fetched) -> None:
        """Count bad samples, each once, and stop when they are too many."""
        self._seen += 0 if fetched.batch is None else fetched.batch.num_texts
        new = {key: reason for key, reason in fetched.bad if key not in self.bad}
        for key, reason in new.items():
            logger.warning("bad sample '%s': %s", key, reason)
        self.bad |= new
        share, size = self._config.bad_samples, self.order.size
        seen = min(max(self._seen, len(self.bad)), size)  # later epochs show the same samples again
        allowed = max(share * seen, min(_TOLERATED, math.ceil(size / 10))) if share > 0 else 0
        if new and len(self.bad) > allowed:
            raise ValueError(
                f"data: {len(self.bad)} of the {seen} samples read so far are bad, more than data.bad_samples "
                f"{share:g} allows: {_some(self.bad)}; repair or remove them, or raise data.bad_samples"
            )


def _some(bad: Mapping[str, str]) -> str:
    shown = [f"'{key}' ({' '.join(reason.split())})" for key, reason in list(bad.items())[:5]]
    return ", ".join(shown) + (", ..." if len(bad) > len(shown) else "")


def _counts(batch: Batch, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    """(images, texts) of every rank's micro-batch where ranks differ; every text has as many images as here."""
    if len(set(sizes)) == 1:
        return None
    images = batch.num_images // batch.num_texts
    return tuple((size * images, size) for size in sizes)
