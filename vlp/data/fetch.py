"""What stands at a position of the run: samples are read, augmented and made into examples, and these into a batch.

Everything here is a pure function of the seed, the position and the data, and runs in loader workers.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from torch.utils.data import Dataset

from encoders.types import Batch
from objectives.base import EDITED, Draw, ImageView, View
from objectives.spans import SpannedView
from vlp.data.alike import AlikeCaptions
from vlp.data.asking import ask
from vlp.data.batch import Example, caption_hash, collate, numbered, stable_hash
from vlp.data.boxes import boxes_of
from vlp.data.edits import edit
from vlp.data.group import Groups, without_images
from vlp.data.instruct import instructed
from vlp.data.pairing import pair
from vlp.data.reader import BadSample, RawSample, Reader, Sample, decode_sample
from vlp.data.records import place_of
from vlp.data.regions import NAMES, RegionArrays, RegionLayout, missing_array, read_all_regions, read_regions
from vlp.data.sources import Only
from vlp.data.spans import one_caption, spans_of
from vlp.data.tokenizer import Tokenizer
from vlp.data.transforms import TrainTransform

if TYPE_CHECKING:
    from vlp.data.loader import DataConfig

_TRIES = 100  # samples in a row that may be bad
_LOOKED_AT = 8  # samples that say whether data have regions at all

Prepare: TypeAlias = Callable[[Sample, np.random.Generator], Example]
"""Sample with transformed images, generator keyed by its position and the text's number there -> example of one text.
It pickles; it may raise BadSample."""

Slot: TypeAlias = tuple[int, int]
"""Position in the run, index of the sample (or group) there."""

T = TypeVar("T")


def pair_example(sample: Sample, generator: np.random.Generator) -> Example:
    """Image-text pair for pretraining: one of the sample's captions, drawn anew at each position.

    Raises:
        BadSample: No caption, or only empty ones.
    """
    captions = [text for text in sample.texts if text.strip()]
    if not captions:
        raise BadSample(sample.key, "no caption, or an empty one")
    return Example(sample.key, sample.images, captions[int(generator.integers(len(captions)))])


def image_example(sample: Sample, generator: np.random.Generator) -> Example:
    """Image without a text."""
    return Example(sample.key, sample.images, None)


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


class Fetched(NamedTuple):
    """What a worker hands over for one micro-batch; errors come as values, since torch would wrap their message."""

    batch: Batch | None
    bad: tuple[tuple[str, str], ...]
    error: ValueError | None


@dataclass(frozen=True)
class Fetch(Dataset[Fetched]):
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
    again: bool = False
    """Whether the images come a second time, augmented anew."""
    image_views: Mapping[str, ImageView | None] = field(default_factory=dict)
    """Image views with hidden patches."""
    regions: RegionLayout | None = None
    """What is read of a detector's regions, in place of images; None: images."""
    only: Only = None
    """The one modality that is read; None: both."""
    alike: AlikeCaptions | None = None
    """Where captions of false pairs are found that are like the true one; None: they are any."""

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self.reader if self.groups is None else self.groups)

    @property
    def draw(self) -> Draw:
        """Source of the draws of each position."""
        return Draw(self.seed)

    def check_regions(self, name: str) -> None:
        """Say once that the data have no arrays where a model reads a detector's: all samples would be bad.

        Args:
            name: of the data, for the error.

        Raises:
            ValueError: none of some samples, spread over the data, has what is read.
        """
        missing, number = "", len(self.reader)
        for index in range(0, number, max(1, number // _LOOKED_AT)) if self.regions is not None else ():
            assert self.regions is not None
            try:
                raw = self.reader[index]
                fields = self._without_image(raw).fields
                lacks = missing_array(fields, self.regions)
            except BadSample:
                return  # which the loader counts
            if lacks is None:
                return
            known = ", ".join(dict.fromkeys([*raw.files, *fields])) or "nothing"
            missing = missing or f"no {' or '.join(NAMES[lacks])} in {raw.source}, whose samples have {known}"
        if missing:
            raise ValueError(
                f"{name}: model.vision.kind region reads a detector's arrays, but there are {missing}; store them as "
                "KEY.npz in the shards, or name a table's column with paths of .npz files by --data.image, or use "
                "another model.vision.kind"
            )

    def __getitem__(self, slots: Sequence[Slot]) -> Fetched:
        bad: list[tuple[str, str]] = []
        try:
            found = [(position, each) for position, index in slots for each in self._examples(position, index, bad)]
            positions, examples = [position for position, _ in found], [each for _, each in found]
            length, more = self.config.max_length, (self.image_views, self.regions)
            batch = collate(examples, positions, self.tokenizer, self.views, length, self.seed, *more)
            return Fetched(batch, tuple(bad), None)
        except ValueError as error:
            plain = ValueError(str(error))  # subclasses may not pickle
            plain.add_note("".join(traceback.format_exception(error)))
            return Fetched(None, tuple(bad), plain)

    def _examples(self, position: int, index: int, bad: list[tuple[str, str]]) -> list[Example]:
        """The examples of one position; the next good sample takes a bad one's place."""
        tries = min(_TRIES, len(self))
        for offset in range(tries):
            try:
                return self._make(position, (index + offset) % len(self))
            except BadSample as error:
                bad.append((error.key, error.reason))
        first, reason = bad[-tries]
        raise ValueError(
            f"data: {tries} samples in a row are unusable, the first is '{first}'{place_of(first)}: {reason}; check "
            "the data, and data.image and data.text"
        )

    def _make(self, position: int, index: int) -> list[Example]:
        raw, samples = self._read(position, index)
        # Whatever the task makes the text of must not say left or right when the image is mirrored.
        said = [text for sample in samples for text in (*sample.texts, *_strings(sample.fields))]
        generator = self.draw.sample("augment", position)
        images = tuple(self.transform(image, generator, said) for image in samples[0].images)
        generator = self.draw.sample("augment/again", position)
        again = tuple(self.transform(image, generator, said) for image in samples[0].images) if self.again else ()
        regions, more = self._regions(samples[0], position, index)
        examples: list[Example] = []
        for number, sample in enumerate(samples):
            original = sample
            if self.config.alternates is not None:
                sample = self._alternate(sample, self.config.alternates, position, number)
            one = self._prepared(replace(sample, images=images), position, number, index)
            one = self._paired(replace(one, regions=regions, more_regions=more), sample, position, number, index)
            if self.config.prefix is not None or self.config.answer is not None:
                generator = self.draw.sample(numbered("answer", number), position)
                one = ask(one, sample, self.config.prefix, self.config.answer, generator)
            if self.config.spans is not None and any(isinstance(view, SpannedView) for view in self.views.values()):
                one = replace(one, spans=spans_of(original, self.config.spans, one.text))
            if self.config.boxes is not None:
                one = replace(one, named=boxes_of(original, self.config.boxes, one.text))
            if EDITED in self.views and one.text is not None:
                generator = self.draw.sample(numbered(EDITED, number), position)
                changed = {EDITED: edit(one.text, self.config.edits, generator)}
                one = replace(one, other_texts={**one.other_texts, **changed})
            try:
                for text in (one.text or "", one.second or "", *one.other_texts.values()):
                    text.encode()
            except UnicodeEncodeError as error:
                raise BadSample(sample.key, f"text is not Unicode: {error.reason}") from error
            if one.image_id is None and not examples:  # the first one's counts
                one = replace(one, image_id=image_identity(raw, sample))
            examples.append(replace(one, again=again))
        return examples

    def _prepared(self, sample: Sample, position: int, number: int, index: int) -> Example:
        """What the task makes of a sample; of pretraining's pairs, question and answer where these are asked for."""
        generator, wanted = self.draw.sample(numbered("example", number), position), self.config.instruct
        if wanted is None or self.prepare is not pair_example:
            return self.prepare(sample, generator)
        bins = self.config.tokenizer.bins
        return instructed(wanted, sample, lambda: self._other(position, index), generator, bins)

    def _read(self, position: int, index: int) -> tuple[RawSample, list[Sample]]:
        """The sample as stored, and one sample a text to train on; only the first has its images decoded."""
        number = self.config.texts_per_image
        generator = self.draw.sample("texts", position)
        indices = [index] if self.groups is None else _some_of(self.groups[index].tolist(), number, generator)
        raws = [self.reader[i] for i in indices]
        # Whether a text is needed, and which, is for `prepare` to say.
        config = self.config
        if self.regions is None and self.only != "text":
            samples = [decode_sample(raws[0], image=config.image, text=config.text, need_text=False)]
        else:
            samples = [self._without_image(raws[0])]
        for raw in raws[1:]:
            samples.append(self._without_image(raw))
        if number == 1:
            return raws[0], samples
        if len(samples[0].images) > 1:
            raise ValueError(
                f"data.texts_per_image {number} shares one image, but sample '{samples[0].key}'"
                f"{place_of(samples[0].key)} has {len(samples[0].images)}; set it to 1"
            )
        if len(samples) == 1:  # its captions, in an order of their own at each position
            captions = [one_caption(samples[0], i, self.config.spans) for i in range(len(samples[0].texts))]
            samples = _some_of(captions, number, generator) or samples
        return raws[0], [samples[i % len(samples)] for i in range(number)]

    def _without_image(self, raw: RawSample) -> Sample:
        return decode_sample(without_images(raw), text=self.config.text, need_image=False, need_text=False)

    def _other(self, position: int, index: int) -> Sample:
        """Another sample than ``index``, the same one for all that ask at a position; no image is decoded."""
        if len(self) < 2:
            raise ValueError("data: there is one sample, but others are needed to make pairs false; give more data")
        # Keyed by the index too: where the other one is bad, the sample that takes this one's place has another.
        found = int(self.draw.sample(f"other/{index}", position).integers(len(self) - 1))
        found += found >= index
        return self._without_image(self.reader[found if self.groups is None else int(self.groups[found][0])])

    def _regions(
        self, sample: Sample, position: int, index: int
    ) -> tuple[RegionArrays | None, tuple[RegionArrays, ...]]:
        """What a detector saw of the sample's image, and of another one's where a view shows such regions; and of its
        further images.
        """
        if self.regions is None:
            return None, ()
        found, *more = read_all_regions(sample.key, sample.fields, self.regions)
        if not self.regions.replaces:
            return found, tuple(more)
        other = self._other(position, index)
        return replace(found, other=read_regions(other.key, other.fields, self.regions).features), tuple(more)

    def _paired(self, example: Example, sample: Sample, position: int, number: int, index: int) -> Example:
        """The example with its second segment, made false for its share of the positions."""
        if self.config.pairing is None:
            return example
        generator = self.draw.sample(numbered("pairing", number), position)
        alike = None if self.alike is None else lambda text: self._alike(sample, text, position, index)
        return pair(self.config.pairing, example, sample, lambda: self._other(position, index), generator, alike)

    def _alike(self, sample: Sample, text: str, position: int, index: int) -> Sample:
        """One of the samples whose captions are the most like a text; any other one where none shares a rare word."""
        assert self.alike is not None and self.config.pairing is not None
        own = {caption_hash(each) for each in sample.texts}
        found = self.alike.nearest(index, text, self.config.pairing.alike)
        for one in self.draw.sample(f"alike/{index}", position).permutation(found).tolist():
            other = self._without_image(self.reader[one if self.groups is None else int(self.groups[one][0])])
            if not own & {caption_hash(each) for each in other.texts}:  # the same words would make no false pair
                return other
        return self._other(position, index)

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


def _some_of(items: Sequence[T], number: int, generator: np.random.Generator) -> list[T]:
    """Up to ``number`` of the items in a drawn order."""
    return [items[i] for i in np.argsort(generator.random(len(items)), kind="stable")[:number]]
