"""Training and validation data out of one data set, so that no image is in both.

Which images are held out follows from a hash of their bytes, not from their order or names: the same data give the same
split anywhere, and shuffled rows or renamed files change nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from vlp.data.reader import BadSample, RawSample, Reader
from vlp.data.records import IMAGE_EXTENSIONS, OnDisk, digest, read_words

LARGEST = 5000
"""Images that are held out at most, whatever their share."""

MANY = 20_000
"""Samples whose reading is announced."""

logger = logging.getLogger(__name__)

Half = Literal["train", "val"]


class SubsetReader:
    """Some samples of a reader.

    Args:
        reader: all of them.
        indices: which, [N] int64.
    """

    def __init__(self, reader: Reader, indices: npt.NDArray[np.int64]) -> None:
        self._reader, self.indices = reader, indices

    @property
    def fingerprint(self) -> str:
        """Hash of the data and of which samples of them these are."""
        return digest(self._reader.fingerprint, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> RawSample:
        """Read sample ``index`` of these.

        Raises:
            BadSample: If a part of it cannot be read.
        """
        return self._reader[self._number(index)]

    def words(self, index: int) -> RawSample:
        """Read sample ``index`` of these without its images."""
        return read_words(self._reader, self._number(index))

    def _number(self, index: int) -> int:
        """Number of sample ``index`` among all."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(self.indices[index])


@dataclass(frozen=True)
class Split:
    """Which samples of a data set are held out."""

    train: npt.NDArray[np.int64]
    """Numbers of the training samples, ascending."""
    val: npt.NDArray[np.int64]
    """Numbers of those held out."""
    images: tuple[int, int]
    """Different images in each."""
    contents: str = ""
    """Hash of every sample's image, by its bytes."""

    @property
    def hash(self) -> str:
        """By which the split is known again: which samples, of which images."""
        return digest(self.train, self.val, self.contents)

    def of(self, reader: Reader, half: Half) -> SubsetReader:
        """Return a half of the data."""
        return SubsetReader(reader, self.train if half == "train" else self.val)


_made: dict[tuple[str, str, float], Split] = {}
"""Splits of this process by data, state of their files, and share: training and evaluation ask for the same one."""


def split_by_image(reader: Reader, share: float) -> Split:
    """Hold out a share of the images, at least one, with all of their samples.

    Samples show the same image if their image files have the same bytes, or the same field ``image_id``. Reads every
    image once; a sample whose image cannot be read trains, where it is counted.

    Args:
        reader: the data.
        share: of the images, in 0..1; at most ``LARGEST`` are held out.

    Raises:
        ValueError: there are fewer than two images.
    """
    made = (reader.fingerprint, _state(reader), share)
    if made not in _made:
        _made[made] = _split(reader, share)
    return _made[made]


def _state(reader: Reader) -> str:
    """Hash of size and time of every file that is read, as a fingerprint knows the files' names only."""
    state = hashlib.sha256()
    for path in reader.paths() if isinstance(reader, OnDisk) else ():
        try:
            found = os.stat(path)
        except OSError:  # missing, or a url
            continue
        state.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
    return state.hexdigest()


def _split(reader: Reader, share: float) -> Split:
    if len(reader) > MANY:
        logger.info("reading %s images, so that the split has none in both halves", f"{len(reader):,}")
    images, contents = same_images(reader)
    known = sorted({image for image in images if image is not None})
    if len(known) < 2:
        raise ValueError(
            f"data.split {share:g}: the {len(reader)} samples show {len(known) or 'no'} image that can be read, and "
            "dividing takes two; name validation data with --data.val"
        )
    number = min(max(round(share * len(known)), 1), LARGEST, len(known) - 1)
    held = set(known[:number])
    chosen = np.array([image in held for image in images])
    return Split(np.flatnonzero(~chosen), np.flatnonzero(chosen), (len(known) - number, number), contents)


def same_images(reader: Reader) -> tuple[list[str | None], str]:
    """Return a name for each sample's image, from its bytes: equal for samples of the same image; None = unreadable.

    A sample with several images makes them one. Also returns a hash of the bytes of all samples' images, in order.
    """
    contents = hashlib.sha256()
    found: list[str | None] = []
    first: dict[str, str] = {}
    parent: dict[str, str] = {}
    for index in range(len(reader)):
        try:
            raw = reader[index]
        except BadSample:
            found.append(None)
            continue
        hashes = image_hashes(raw)
        contents.update(f"{index}: {' '.join(hashes)}\n".encode())
        found.append(hashes[0] if hashes else None)
        for one in hashes:
            parent.setdefault(one, one)
            _join(parent, hashes[0], one)
        if hashes and (name := raw.fields.get("image_id")) not in (None, ""):
            _join(parent, hashes[0], first.setdefault(f"{raw.source}:{name}", hashes[0]))
    return [None if one is None else _root(parent, one) for one in found], contents.hexdigest()


def image_hashes(raw: RawSample) -> list[str]:
    """Return the SHA-256 of each of a sample's image files, or of its files with a detector's arrays."""
    images = (data for name, data in raw.files.items() if name.rsplit(".", 1)[-1] in (*IMAGE_EXTENSIONS, "npz"))
    return [hashlib.sha256(data).hexdigest() for data in images]


def _root(parent: Mapping[str, str], one: str) -> str:
    while parent[one] != one:
        one = parent[one]
    return one


def _join(parent: dict[str, str], one: str, other: str) -> None:
    """Make two one; the lesser name stands for both, so that the order of the samples does not count."""
    low, high = sorted((_root(parent, one), _root(parent, other)))
    parent[high] = low
