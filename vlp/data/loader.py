"""Samples to the batches of each optimizer step, from any position of the run on.

A run is a line of positions 0, 1, 2, ...; which sample stands at one, how it is augmented, which caption is drawn and
how it is masked depend on the seed and the position alone. So ranks, workers and resuming change nothing.
Shapes: T texts, I images per text.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from encoders.types import Batch
from objectives.base import ImageView, View
from vlp.config import Config
from vlp.data.alike import read_alike
from vlp.data.boxes import check_boxes
from vlp.data.edits import EditConfig
from vlp.data.fetch import Fetch, Fetched, Prepare, Slot
from vlp.data.group import group_samples
from vlp.data.instruct import InstructConfig
from vlp.data.order import Order, rank_slice
from vlp.data.pairing import PairingConfig
from vlp.data.reader import Reader
from vlp.data.records import Key, place_of, tolerated
from vlp.data.regions import RegionLayout
from vlp.data.sources import MAIN, Mix, SourceConfig
from vlp.data.tokenizer import Tokenizer, TokenizerConfig
from vlp.data.transforms import ImageTransformConfig, TrainTransform

logger = logging.getLogger(__name__)


class DataConfig(Config):
    """What is read, and how it becomes batches."""

    train: str | tuple[str, ...] | None = None
    """Training data: tar shards ('shards/{000..099}.tar', URLs too), a csv/jsonl/parquet table, a folder, or a list."""
    only: Literal["image", "text"] | None = None
    """What the model is trained on of data.train; none = pairs."""
    ratio: float = Field(default=1.0, gt=0)
    """How often data.train is read, relative to the ratios of `sources`."""
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """Training data beside data.train, by name: texts alone, images alone (FLAVA, BEiT-3, SimVLM), other pairs."""
    mix: Literal["drawn", "joint"] = "drawn"
    """`drawn`: each step reads one source, drawn by the ratios (FLAVA). `joint`: each step reads all sources, its
    samples shared out by the ratios (BEiT-3, SimVLM)."""
    val: str | tuple[str, ...] | None = None
    """Validation data, in the same forms."""
    where: dict[str, Any] | None = None
    """Only samples whose fields have these values, as {split: train}."""
    val_where: dict[str, Any] | None = None
    """The same for the validation data; none = as where."""
    split: float | None = Field(default=None, gt=0, lt=1)
    """Share of the images of `train` that are held out as validation data where `val` names none; which ones follows
    from a hash of each image, so that none is in both. None = no validation data."""
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
    pairing: PairingConfig | None = None
    """Texts of two segments, and pairs that are made false on purpose; none = each text is its image's caption."""
    prefix: str | None = None
    """Words before every text that is read, which say what is asked of it ("vqa:") and which nothing hides or predicts;
    a text that is written has none."""
    answer: str | None = None
    """Field of what is written for a text, by objective lm with view lm:answer: a text, or several or scores by text,
    of which one is drawn; `match`: true or false, by whether `pairing` left the pair true."""
    edits: EditConfig = Field(default_factory=EditConfig)
    """How words are changed in the text view "edited", where an objective reads it (multiview_itc)."""
    spans: str | None = None
    """Field with the spans of each caption, lists of [first character, the one behind the last, kind], of which mlm's
    `spans` masks some."""
    instruct: InstructConfig | None = None
    """What the encoder is asked and the decoder answers, of each sample's fields (OFA); none = the texts alone."""
    boxes: str | None = None
    """Field with the boxes that words of each caption name, lists of [first character, the one behind the last, [left,
    top, right, bottom] as shares of the image's sides], which `model.vision.tokens boxes` reads."""
    whole_region: bool = False
    """Of a detector's regions: the whole image is one more, the first, with the mean of their features (ViLBERT)."""
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
    in any case, or an eighth of data of less than 80 samples."""

    def of(self, source: str) -> DataConfig:
        """Return what is read of a source, ``main`` or one of ``sources``; these have no more than their own settings.

        Raises:
            ValueError: its data are not named, or are those that `split` holds a part out of.
        """
        if source == MAIN:
            return self
        given = self.sources[source]
        if not given.train:
            raise ValueError(
                f"data.sources.{source}.train is not set; name the data with --data.sources.{source}.train, or leave "
                f"them out with --data.sources.{source} none, and the objectives that need them"
            )
        if self.split is not None and self.val is None and given.train == self.train:
            raise ValueError(
                f"data.sources.{source}.train names the data of data.train, of which data.split {self.split:g} holds "
                "out a part for validation; name validation data with --data.val"
            )
        if given.pairing is not None and given.pairing.false_from != "any":
            raise ValueError(
                f"data.sources.{source}.pairing.false_from {given.pairing.false_from}: only data.train's captions are "
                "compared; leave it out"
            )
        plain = {"texts_per_image": 1, "alternates": None, "alternate_share": 0.0, "group": None, "spans": None}
        plain["boxes"] = None
        without: dict[str, Any] = {"val": None, "split": None, "sources": {}}
        own = {name: getattr(given, name) for name in SourceConfig.model_fields}
        return self.model_copy(update=own | plain | without)


def check_hash(reader: Reader, config: DataConfig, source: str = MAIN) -> None:
    """Compare training data with what the run was started on.

    Raises:
        ValueError: They differ.
    """
    if config.hash is not None and config.hash != reader.fingerprint:
        name = "data" if source == MAIN else f"data.sources.{source}"
        raise ValueError(
            f"{name}.hash {config.hash} is not that of {name}.train ({reader.fingerprint}): the data changed since "
            f"the run began; restore them, or set {name}.hash none to go on with these"
        )


def _same(fetched: Any) -> Any:
    return fetched


def leave_signals(worker: int) -> None:
    """Ignore what ends a whole process group (ctrl-C, `timeout`, Slurm): the training process saves, and ends us."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _Micro(NamedTuple):
    """One micro-batch: its source, this rank's positions there, and the number of samples of every rank."""

    source: str
    positions: range
    sizes: tuple[int, ...]


_Wanted: TypeAlias = tuple[str, list[Slot]]
"""Source, and its slots."""


class _Fetches(Dataset[Fetched]):
    """The micro-batches of all sources; what worker processes do."""

    def __init__(self, by_source: Mapping[str, Fetch]) -> None:
        self.by_source = dict(by_source)

    def __getitem__(self, wanted: _Wanted) -> Fetched:
        source, slots = wanted
        found = self.by_source[source][slots]
        if source == MAIN:
            return found
        bad = ((Key(f"{source}/{key}", getattr(key, "place", "")), reason) for key, reason in found.bad)
        return found._replace(bad=tuple(bad))


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
        micro_batches: Parts that each rank cuts its share of a step into; a source's share of it into parts as large.
        rank: This rank.
        world: Number of ranks.
        shuffle: Draw a new order every epoch, else read as stored.
        again: Give also the view "again" of the images, augmented anew.
        image_views: Image views besides "clean" by name, and what they hide (``Model.image_views()``); None: nothing.
        regions: What is read of a detector's regions, in place of images; None: images are read.
        sources: What fetches the samples of other sources than ``reader``, by name; ``config`` has their ratios.

    Attributes:
        bad: Reason of every unusable sample that this rank met, by its key in quotes and where it stands.
        positions: Samples of each source that the run has read after the step that :meth:`steps` gave last.

    Raises:
        ValueError: There are no samples, fewer in a step than ranks, or none with the regions that are read.
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
        again: bool = False,
        image_views: Mapping[str, ImageView | None] | None = None,
        regions: RegionLayout | None = None,
        sources: Mapping[str, Fetch] | None = None,
    ):
        if global_batch < world:
            raise ValueError(f"global_batch {global_batch} is less than the {world} ranks; raise it or use fewer ranks")
        assert micro_batches >= 1
        check_boxes(config)
        groups = None if config.group is None else group_samples(reader, config.group)
        train = TrainTransform(config.transform)
        more = (again, image_views or {}, regions, config.only)
        pairing, alike = config.pairing, None
        if pairing is not None and pairing.false_text and pairing.false_from == "alike":
            alike = read_alike(reader, groups, config.text)
        main = Fetch(reader, groups, prepare, tokenizer, views, config, train, seed, *more, alike=alike)
        self._fetches = _Fetches({MAIN: main, **(sources or {})})
        for name, one in self._fetches.by_source.items():
            one.check_regions("data.train" if name == MAIN else f"data.sources.{name}.train")
        self._orders = {name: Order(len(one), one.seed, shuffle) for name, one in self._fetches.by_source.items()}
        ratios = {MAIN: config.ratio, **{name: config.sources[name].ratio for name in sources or {}}}
        self._mix = Mix(ratios, config.mix == "joint", seed, world)
        self._mix.check(global_batch)
        self.bad: dict[str, str] = {}
        self.positions: dict[str, int] = {}
        self._config, self._micro_batches = config, micro_batches
        self._global_batch, self._rank, self._world = global_batch, rank, world
        self._seen = 0

    @property
    def order(self) -> Order:
        """Of the main source."""
        return self._orders[MAIN]

    def steps(self, start: int, end: int, positions: Mapping[str, int] | None = None) -> Iterator[list[Batch]]:
        """Yield the micro-batches of every step over the positions ``start`` .. ``end - 1``.

        The last step may be smaller; one with fewer samples than ranks is left out, with a line in the log. All ranks
        get equally many micro-batches per step; where ranks differ in size, ``Batch.counts`` says how.

        Args:
            start: Samples that the run has seen.
            end: Samples at which it stops.
            positions: Samples of each source that it has read; None: as steps of this size have.

        Raises:
            ValueError: Too many samples are bad, or do not fit together.
        """
        at = self._mix.positions(start, self._global_batch) if positions is None else positions
        self.positions = dict(at)
        slots = (
            (micro.source, [(p, self._orders[micro.source].index(p)) for p in micro.positions])
            for _, micros, _ in self._plan(start, end, at)
            for micro in micros
        )
        fetched = self._batches(slots)
        done = start
        for begin, micros, after in self._plan(start, end, at):
            batches = []
            for micro in micros:
                batch = next(fetched)
                counts = _counts(batch, micro.sizes)
                batches.append(replace(batch, source=micro.source, seen=begin, counts=counts))
            self.positions = after
            yield batches
            done = begin + self._global_batch
        if done < end:
            logger.info("the last %d samples are fewer than the %d ranks and are left out", end - done, self._world)

    def report_bad(self) -> None:
        """Say in the log how many samples were bad."""
        if self.bad:
            logger.warning("%d samples were bad, of %d read: %s", len(self.bad), self._seen, _some(self.bad))

    def _plan(self, start: int, end: int, at: Mapping[str, int]) -> Iterator[tuple[int, list[_Micro], dict[str, int]]]:
        """Samples seen, micro-batches, and what is read of each source then, of every step."""
        for step in self._mix.steps(start, end, self._global_batch, at):
            micros = []
            for source, whole in step.parts.items():
                shares = [rank_slice(whole.start, len(whole), rank, self._world) for rank in range(self._world)]
                # The last share is the smallest: no rank may run out of micro-batches while others wait for it.
                number = min(self._parts_of(len(whole), step.end - step.begin), len(shares[-1]))
                for k in range(number):
                    parts = [rank_slice(share.start, len(share), k, number) for share in shares]
                    micros.append(_Micro(source, parts[self._rank], tuple(len(part) for part in parts)))
            if not micros:
                return
            yield step.begin, micros, step.after

    def _parts_of(self, samples: int, whole: int) -> int:
        """Into how many micro-batches each rank cuts its share of a source's samples in a step of ``whole``."""
        if samples == whole:
            return self._micro_batches
        largest = math.ceil(math.ceil(self._global_batch / self._world) / self._micro_batches)
        return math.ceil(math.ceil(samples / self._world) / largest)

    def _batches(self, slots: Iterable[_Wanted]) -> Iterator[Batch]:
        """Fetch micro-batches in order, in workers or here."""
        loader: DataLoader[Fetched] = DataLoader(
            self._fetches,
            batch_size=None,
            sampler=slots,
            collate_fn=_same,
            num_workers=self._config.workers,
            worker_init_fn=leave_signals,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # torch would draw from the global one, which a resumed run could not repeat
        )
        for fetched in loader:
            self._note(fetched)
            if fetched.error is not None:
                raise fetched.error
            assert fetched.batch is not None  # bad samples are substituted
            yield fetched.batch

    def _note(self, fetched: Fetched) -> None:
        """Count bad samples, each once, and stop when they are too many."""
        self._seen += 0 if fetched.batch is None else len(_positions(fetched.batch))
        met = {f"'{key}'{place_of(key)}": reason for key, reason in fetched.bad}
        new = {name: reason for name, reason in met.items() if name not in self.bad}
        for name, reason in new.items():
            logger.warning("bad sample %s: %s", name, reason)
        self.bad |= new
        share, size = self._config.bad_samples, sum(order.size for order in self._orders.values())
        seen = min(max(self._seen, len(self.bad)), size)  # later epochs show the same samples again
        if new and len(self.bad) > tolerated(share, seen, size):
            raise ValueError(
                f"data: {len(self.bad)} of the {seen} samples read so far are bad, more than data.bad_samples "
                f"{share:g} allows: {_some(self.bad)}; repair or remove them, or raise data.bad_samples"
            )


def _some(bad: Mapping[str, str]) -> str:
    shown = [f"{name}: {' '.join(reason.split())}" for name, reason in list(bad.items())[:5]]
    return ", ".join(shown) + (", ..." if len(bad) > len(shown) else "")


def _positions(batch: Batch) -> Tensor:
    assert batch.position is not None
    return batch.position


def _counts(batch: Batch, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    """(images, texts) of every rank's micro-batch where ranks differ; all samples have as many of each as here."""
    if len(set(sizes)) == 1:
        return None
    samples = len(_positions(batch))
    images, texts = batch.num_images // samples, batch.num_texts // samples
    return tuple((size * images, size * texts) for size in sizes)
