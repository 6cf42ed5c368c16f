"""Looking at data before anything is trained on them: what is broken, what is there twice, what leaks."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

from downstream.answers import ANSWER_FIELDS, read_truth
from downstream.columns import named_split, open_table
from objectives.answer import Answer
from vlp.data.columns import ANSWER_COLUMNS, QUESTION_COLUMNS, TEXT_COLUMNS, first_known
from vlp.data.group import without_images
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, Sample, decode_sample, open_reader
from vlp.data.records import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS, place_of, tolerated
from vlp.data.regions import RegionLayout, read_all_regions
from vlp.data.split import image_hashes
from vlp.loaded import Loaded
from vlp.run import open_training_data, open_validation_data

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHOWN = 5
"""Keys that a line names."""
LONGEST = 100_000
"""Tokens of a text that are counted."""
LINES = 20
"""Lines of findings of one kind that do not break a sample."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    kind: str
    """What, in a few words: "unreadable image", "same text", ..."""
    keys: tuple[str, ...]
    """The samples that it is about."""
    detail: str
    broken: bool
    """Whether the samples cannot be used."""

    def __str__(self) -> str:
        more = ", ..." if len(self.keys) > SHOWN else ""
        number = f" ({len(self.keys)} samples)" if len(self.keys) > 1 else ""
        shown = ", ".join(f"{key}{place_of(key) if self.broken else ''}" for key in self.keys[:SHOWN])
        return f"{shown}{more}{number}: {self.kind}: {self.detail}"


@dataclass
class Checked:
    """What a look at data found."""

    name: str
    """Of the data: "train", "val"."""
    size: int
    """Samples that there are."""
    looked: int
    """Samples that were looked at."""
    findings: list[Finding] = field(default_factory=list)
    sides: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each image, in pixels."""
    lengths: list[int] = field(default_factory=list)
    """Of the texts, in tokens, or words without a tokenizer."""
    images: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Keys of the samples that show an image, by the hash of its bytes."""
    answers: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Keys of the samples that have an answer, by the answer."""

    @property
    def broken(self) -> list[Finding]:
        """What makes samples unusable, one a sample."""
        return [one for one in self.findings if one.broken]

    def lines(self, unit: str = "words") -> Iterator[str]:
        """Yield a line a finding, those that break samples first, then sizes, lengths and counts."""
        others: dict[str, list[Finding]] = defaultdict(list)
        for one in self.findings:
            if one.broken:
                yield f"{self.name} {one}"
            else:
                others[one.kind].append(one)
        for kind, found in others.items():
            yield from (f"{self.name} {one}" for one in found[:LINES])
            if len(found) > LINES:
                yield f"{self.name}: {kind}: and {len(found) - LINES} more"
        if self.sides:
            wide, high = zip(*self.sides, strict=True)
            yield (
                f"{self.name}: {len(self.images)} images, {min(wide)} to {max(wide)} pixels wide and {min(high)} to "
                f"{max(high)} high, median {median(wide):g} x {median(high):g}"
            )
        if self.lengths:
            shown = f"{min(self.lengths)} to {max(self.lengths)} {unit}, median {median(self.lengths):g}"
            yield f"{self.name}: {len(self.lengths)} texts of {shown}"
        if self.answers:
            yield f"{self.name}: {len(self.answers)} different answers"
        rest = "" if self.looked == self.size else f" looked at, of {self.size}"
        yield f"{self.name}: {self.looked} samples{rest}, {len(self.broken)} of them broken"

    def refuse(self, share: float) -> None:
        """Raise where more is broken than ``data.bad_samples`` allows.

        Raises:
            ValueError: with the first of them.
        """
        if len(self.broken) > tolerated(share, self.looked, self.looked):
            shown = "; ".join(str(one) for one in self.broken[:3]) + ("; ..." if len(self.broken) > 3 else "")
            raise ValueError(
                f"data.{self.name}: {len(self.broken)} of {self.looked} samples are broken, more than data.bad_samples "
                f"{share:g} allows: {shown}; repair or remove them, or raise data.bad_samples"
            )


def check(
    name: str,
    reader: Reader,
    data: DataConfig,
    *,
    usable: Callable[[Sample], object],
    answer: str | None = "",
    images: bool = True,
    length: Callable[[str], int] | None = None,
    limit: int | None = None,
) -> Checked:
    """Look at every sample: can its image be decoded, has it a text, which are there twice.

    Args:
        name: of the data in what is said.
        reader: the data.
        data: names the members or columns.
        usable: raises BadSample for a sample that cannot be used; images are as stored.
        answer: field of the answers, None = where the VQA task finds them; "" = none are read.
        images: decode the images.
        length: of a text; None: its words are counted.
        limit: texts longer than this are cut; None: no text is.
    """
    found = Checked(name, len(reader), len(reader))
    texts: dict[str, list[str]] = defaultdict(list)
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for index in range(len(reader)):
        try:
            raw = reader[index]
            shown = raw if images else without_images(raw)
            endings = {name.rsplit(".", 1)[-1] for name in raw.files}
            regions = not endings.isdisjoint(ARRAY_EXTENSIONS) and (not images or endings.isdisjoint(IMAGE_EXTENSIONS))
            need = images and not regions  # these stand for the image
            sample = decode_sample(shown, image=data.image, text=data.text, need_image=need, need_text=False)
            if regions:
                read_all_regions(sample.key, sample.fields, RegionLayout(0, 1))
            usable(sample)
            for each in _answers(sample, answer):
                found.answers[each].append(sample.key)
        except BadSample as error:
            found.findings.append(Finding(_kind(error.reason), (error.key,), error.reason, broken=True))
            continue
        hashes = image_hashes(raw)
        for one in hashes:
            found.images[one].append(sample.key)
        found.sides += [(one.shape[-1], one.shape[-2]) for one in sample.images]
        for text in sample.texts:
            texts[text].append(sample.key)
            rows[(*hashes, text)].append(sample.key)
            found.lengths.append(count := len(text.split()) if length is None else length(text))
            if limit is not None and count > limit:
                detail = f"{count} tokens, of which data.max_length keeps {limit}"
                found.findings.append(Finding("long text", (sample.key,), detail, broken=False))
    found.findings += _twice("same image and text", rows, lambda row: repr(row[-1]))
    if answer == "":  # the same question about many images is how it should be
        whole = {tuple(keys) for keys in rows.values()}
        found.findings += _twice("same text", {t: keys for t, keys in texts.items() if tuple(keys) not in whole}, repr)
    return found


def has_text(sample: Sample) -> None:
    """Raise for a sample without a text.

    Raises:
        BadSample: it has none.
    """
    if not sample.texts:
        raise BadSample(sample.key, "no text, or an empty one")


def _answers(sample: Sample, name: str | None) -> list[str]:
    if name == "":
        return []
    truth = read_truth(sample, name)
    if truth is None:
        raise BadSample(sample.key, f"no answer; its fields are {', '.join(sorted(sample.fields)) or 'none'}")
    return list(truth.scores)


def _kind(reason: str) -> str:
    """What a reason is about."""
    about = {"region": "unreadable regions", "npz": "unreadable regions", "image": "unreadable image"}
    about |= {"answer": "no answer", "text": "empty text", "caption": "empty text"}
    return next((kind for word, kind in about.items() if word in reason), "unusable")


def _twice(kind: str, found: Mapping[T, list[str]], show: Callable[[T], str]) -> list[Finding]:
    several = Counter({what: len(keys) for what, keys in found.items() if len(keys) > 1})
    return [Finding(kind, tuple(found[what]), show(what), broken=False) for what, _ in several.most_common()]


def leaks(train: Checked, val: Checked) -> list[Finding]:
    """Return the images that are in both, by their bytes."""
    both = [one for one in val.images if one in train.images]
    return [
        Finding(
            "leak",
            tuple(val.images[one]),
            f"the image of {', '.join(train.images[one][:SHOWN])} in train",
            broken=False,
        )
        for one in both
    ]


def outside(found: Checked, known: Collection[str], whose: str) -> list[Finding]:
    """Return the answers that are not in a list, most frequent first."""
    ranked = sorted(found.answers.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        Finding("answer outside the list", tuple(keys), f"{answer!r} is not among the {len(known)} of {whose}", False)
        for answer, keys in ranked
        if answer not in known
    ]


def columns_of(data: DataConfig, spec: str | tuple[str, ...], answer: str | None) -> tuple[DataConfig, str]:
    """Return the settings with the text column filled in, and the answers' field, "" where there are none.

    Data with fields for question and answer hold questions; others hold captions.
    """
    table = open_table(data, spec)
    names = list(table[0].fields) if table is not None else _fields(open_reader(spec))
    question = first_known(names, QUESTION_COLUMNS)
    if answer is None and question is not None:
        answer = next((name for name in ANSWER_FIELDS if name in names), None) or first_known(names, ANSWER_COLUMNS)
    text = data.text or (question if answer else None)
    if table is not None:
        text = text or first_known(names, TEXT_COLUMNS) or question
    name = spec if isinstance(spec, str) else ", ".join(spec)
    answers = f", answer from {answer!r}" if answer else ""
    logger.info("%s: text %s%s", name, "as stored" if text is None else f"from {text!r}", answers)
    return data.model_copy(update={"text": text}), answer or ""


def _fields(reader: Reader) -> list[str]:
    """Names of the first sample's fields."""
    try:
        sample = decode_sample(without_images(reader[0]), need_image=False, need_text=False)
    except BadSample:
        return []
    return list(sample.fields)


@dataclass(frozen=True)
class CheckedData:
    """What a look at a whole data set found."""

    parts: tuple[Checked, ...]
    """Of training and validation data."""
    lines: tuple[str, ...]
    """All of it in words, a line a finding."""


def check_data(data: DataConfig, answer: str | None = None, loaded: Loaded | None = None) -> CheckedData:
    """Look at training data, and at validation data where they are named, by ``data.val`` or the table's own column.

    Args:
        data: the data.
        answer: field of the answers; None: guessed.
        loaded: whose tokens are counted, and whose answers are the list; None: words, and the training answers.

    Raises:
        ValueError: the data cannot be opened.
    """
    assert data.train is not None
    data, answer = columns_of(data, data.train, answer)
    if data.val is None and (named := named_split(data)) is not None and named.val is not None:
        data = data.model_copy(update={"where": named.train, "val": data.train, "val_where": named.val})
    readers = {"train": open_training_data(data)} | ({"val": open_validation_data(data)} if data.val else {})
    length, limit = None, None
    if loaded is not None:
        tokenizer, limit = loaded.tokenizer, loaded.config.data.max_length

        def length(text: str) -> int:
            return len(tokenizer.encode(text, LONGEST)[0])

    how: dict[str, Any] = {"usable": has_text, "answer": answer, "length": length, "limit": limit}
    parts = tuple(check(name, reader, data, **how) for name, reader in readers.items())
    lines = [line for one in parts for line in one.lines("words" if loaded is None else "tokens")]
    if len(parts) == 2:
        lines += [f"val {one}" for one in leaks(*parts)]
    heads = [] if loaded is None else [one for _, one in loaded.model.named_objectives() if isinstance(one, Answer)]
    known, whose = (heads[0].config.answers, "the checkpoint") if heads else (tuple(parts[0].answers), "data.train")
    for one in parts if heads else parts[1:]:
        lines += [f"{one.name} {finding}" for finding in outside(one, frozenset(known), whose)[:LINES]]
    return CheckedData(parts, tuple(lines))
