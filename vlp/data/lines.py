"""Files of one text a line: texts without images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlp.data.records import BadSample, Key, RawSample, digest

LINES_SUFFIX = ".txt"

_CHUNK = 1 << 24  # bytes


class LinesReader:
    """Lines of a UTF-8 file, a sample each, empty ones left out; the file is mapped, not held.

    Args:
        path: The file.

    Raises:
        ValueError: If there is no such file, or no text in it.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self.name = str(path)
        if not self._path.is_file():
            raise ValueError(f"data: there is no file '{path}'; check the path")
        self._size = self._path.stat().st_size
        self._data: npt.NDArray[np.uint8] | None = None
        if self._size == 0:
            raise ValueError(f"data: '{path}' is empty; give a file of one text a line")
        ends = np.concatenate(list(self._line_ends()))
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
        full = np.flatnonzero([self._read(start, end).strip() != b"" for start, end in zip(starts, ends, strict=True)])
        if len(full) == 0:
            raise ValueError(f"data: '{path}' has only empty lines; give a file of one text a line")
        self._lines, self._starts, self._ends = full, starts[full], ends[full]

    def _line_ends(self) -> Iterator[npt.NDArray[np.int64]]:
        """Offsets of the line feeds, and of the file's end where the last line has none."""
        for begin in range(0, self._size, _CHUNK):
            yield np.flatnonzero(self._bytes[begin : begin + _CHUNK] == ord("\n")) + begin
        if self._bytes[-1] != ord("\n"):
            yield np.array([self._size], dtype=np.int64)

    @property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        if self._data is None:
            self._data = np.memmap(self._path, dtype=np.uint8, mode="r")
        return self._data

    def _read(self, start: int, end: int) -> bytes:
        return self._bytes[start:end].tobytes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}  # a worker maps the file itself

    @property
    def fingerprint(self) -> str:
        """Hash of the lines' places and of the first bytes."""
        return digest(self._starts, self._ends, np.array(self._bytes[:_CHUNK]))

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> RawSample:
        """Read text ``index``; its key is the line's number in the file, the first being 1.

        Raises:
            BadSample: If it is not UTF-8.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self._lines[index] + 1
        key = Key(str(number), f"{self.name} line {number}")
        try:
            text = self._read(int(self._starts[index]), int(self._ends[index])).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadSample(key, f"line is not UTF-8: {error}") from error
        return RawSample(key, self.name, {}, {}, (text,))
