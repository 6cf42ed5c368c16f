"""Samples of the same image as one: the image is encoded once for all of their texts.

Shapes: S samples, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vlp.data.reader import BadSample, RawSample, Reader, decode_sample
from vlp.data.records import IMAGE_EXTENSIONS, read_words


@dataclass(frozen=True)
class Groups:
    """Which samples of a reader belong together, in the order of each group's first."""

    members: npt.NDArray[np.int64]
    """[S] indices of the samples, group by group, each group in stored order."""
    starts: npt.NDArray[np.int64]
    """[G + 1] where each group begins in ``members``."""

    def __len__(self) -> int:
        """G."""
        return len(self.starts) - 1

    def __getitem__(self, group: int) -> npt.NDArray[np.int64]:
        """Indices of one group's samples."""
        return self.members[self.starts[group] : self.starts[group + 1]]


def group_samples(reader: Reader, field: str) -> Groups:
    """Group the samples by the value of ``field``; reads all of them, but no image where the reader can leave that out.

    One that cannot be read or lacks the field is a group of its own, for the loader to count.

    Raises:
        ValueError: none has the field.
    """
    found: dict[object, list[int]] = {}
    for index in range(len(reader)):
        found.setdefault(_value(reader, index, field) or (index,), []).append(index)
    if len(found) and all(isinstance(key, tuple) for key in found):
        raise ValueError(f"data.group {field!r}: no sample has such a field; name one that equals for equal images")
    sizes = [0, *(len(members) for members in found.values())]
    return Groups(_int64(i for members in found.values() for i in members), np.cumsum(_int64(sizes)))


def _value(reader: Reader, index: int, field: str) -> str | None:
    try:
        sample = decode_sample(without_images(read_words(reader, index)), need_image=False, need_text=False)
    except BadSample:
        return None
    value = sample.fields.get(field)
    return None if value is None else str(value)


def without_images(raw: RawSample) -> RawSample:
    """Return the sample without its image members, so that nothing is decoded."""
    kept = {name: data for name, data in raw.files.items() if name.rsplit(".", 1)[-1] not in IMAGE_EXTENSIONS}
    return replace(raw, files=kept)


def _int64(values: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(values, dtype=np.int64)
