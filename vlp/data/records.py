"""What readers hand out, and how they keep many small things without many Python objects.

A list of a million strings costs reference counts, and those are written to: forked workers then copy every page
they read. So names and rows live in ``Blobs``: one byte array and its offsets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "img"])
"""Last part of a member or file name that says it is an image; ``img`` stands for "sniff it"."""

ARRAY_EXTENSIONS = frozenset(["npz", "npy"])
"""Last part of a member name that says it holds arrays, such as regions."""

TEXT_FIELDS = (
    "caption",
    "captions",
    "text",
    "texts",
    "title",
    "question",
    "questions",
    "sentence",
    "sentences",
    "description",
)
"""Names of a table column or json field that is taken for the text if none is named, best first."""


class Key(str):
    """Name of a sample within its source that also knows where the sample stands.

    Attributes:
        place: File and line, or shard, for messages; "" where that is not known.
    """

    place: str

    def __new__(cls, name: str, place: str = "") -> Key:
        key = super().__new__(cls, name)
        key.place = place
        return key


def place_of(key: str) -> str:
    """Return where a sample stands, as it follows its name in messages: " (pairs.csv line 7)", or "" if nobody said."""
    place = getattr(key, "place", "")
    return f" ({place})" if place else ""


class BadSample(ValueError):  # noqa: N818 - named for what it says about the sample
    """One sample cannot be used; the data set counts it, logs it and goes on.

    Attributes:
        key: Which sample.
        reason: Why, in a few words.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)  # both in `args`, so that it survives the way out of a worker process
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}{place_of(self.key)}: {self.reason}"


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample as stored, nothing decoded.

    Attributes:
        key: Name within its source (WebDataset key, row number, relative path); a ``Key`` where the reader knows more.
        source: Shard, table or folder that it comes from.
        files: Bytes by extension, in stored order: ``{"jpg": ..., "txt": ..., "json": ...}``.
        fields: Columns of the table row; empty for shards, whose fields are still inside ``files["json"]``.
        texts: Texts if the reader knows them (tables), None if they are to be found in files and fields.
    """

    key: str
    source: str
    files: dict[str, bytes]
    fields: dict[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] | None = None


class Reader(Protocol):
    """A stored data set in which any sample can be read by number, in any process (it pickles and forks)."""

    @property
    def fingerprint(self) -> str:
        """Hash of the samples' names and their order (and sizes or rows, where known): has the data changed?"""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawSample:
        """Read sample ``index`` (0 .. len - 1).

        Raises:
            BadSample: If a part of this sample cannot be read.
        """


@runtime_checkable
class OnDisk(Protocol):
    """A reader that can name the files it reads."""

    def paths(self) -> Iterator[str]:
        """Yield their paths or urls; some may be missing."""


@runtime_checkable
class ReadsWords(Protocol):
    """A reader that can leave out what takes the longest to read."""

    def words(self, index: int) -> RawSample:
        """Read sample ``index`` without its images and arrays.

        Raises:
            BadSample: If what is read of it cannot be read, or a file with an image is not there.
        """


def read_words(reader: Reader, index: int) -> RawSample:
    """Read a sample for its texts and fields; of a reader that is ``ReadsWords`` no image file is read.

    Raises:
        BadSample: If it cannot be read.
    """
    return reader.words(index) if isinstance(reader, ReadsWords) else reader[index]


@dataclass(frozen=True, slots=True)
class Blobs:
    """An immutable list of byte strings in two arrays.

    Attributes:
        data: All bytes, uint8 [total].
        offsets: Item i is ``data[offsets[i]:offsets[i + 1]]``, int64 [items + 1].
    """

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def pack(cls, items: Iterable[bytes]) -> Blobs:
        """Copy ``items`` one after the other."""
        data, offsets = bytearray(), [np.zeros(1, dtype=np.int64)]
        block: list[int] = []
        for item in items:
            data += item
            block.append(len(data))
            if len(block) == 65536:  # boxed integers only ever exist for one block
                offsets.append(np.array(block, dtype=np.int64))
                block = []
        offsets.append(np.array(block, dtype=np.int64))
        return cls(np.frombuffer(bytes(data), dtype=np.uint8), np.concatenate(offsets))

    @classmethod
    def join(cls, parts: Iterable[Blobs]) -> Blobs:
        """All items of ``parts``, in order."""
        parts = list(parts)
        starts = np.cumsum([0, *(len(part.data) for part in parts)])
        offsets = [part.offsets[1:] + start for part, start in zip(parts, starts)]
        return cls(np.concatenate([part.data for part in parts]), np.concatenate([[np.int64(0)], *offsets]))

    def take(self, indices: Iterable[int]) -> Blobs:
        """The items at ``indices``, in that order."""
        return Blobs.pack(self[int(i)] for i in indices)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


def tolerated(share: float, seen: int, size: int) -> float:
    """Return how many of ``seen`` samples may be bad, of data of ``size`` samples (`data.bad_samples`).

    ``share`` of those that were seen; ten in any case, or an eighth of data of less than 80 samples; none if it is 0.
    """
    return max(share * seen, min(10, math.ceil(size / 8))) if share > 0 else 0


def matches(fields: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether ``fields`` has each value that ``where`` asks for.

    Values are compared as text, since a csv file knows nothing else: ``{"fold": 3}`` finds ``"3"``. A list in
    ``where`` accepts any of its values.
    """
    for name, wanted in where.items():
        if name not in fields:
            return False
        accepted = wanted if isinstance(wanted, list | tuple | set | frozenset) else (wanted,)
        if str(fields[name]) not in {str(value) for value in accepted}:
            return False
    return True


class NothingLeft(ValueError):  # noqa: N818 - named for what it says
    """No sample of a data set passes its filter."""


def nothing_left(source: str, where: Mapping[str, Any], known: Iterable[str]) -> NothingLeft:
    """The error for a filter that no sample passes."""
    return NothingLeft(
        f"where: {dict(where)} matches no sample of {source}; fields there: {', '.join(sorted(known)) or 'none'}"
    )


def digest(*parts: npt.NDArray[Any] | str) -> str:
    """Short hash of the content of arrays and texts."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).data)
    return state.hexdigest()[:16]
