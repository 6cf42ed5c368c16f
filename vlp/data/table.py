"""Tables with image paths (csv, tsv, json, jsonl, parquet) and folders of images.

A table row is kept as its own JSON text in one byte array (parquet: as Arrow columns), not as Python objects.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vlp.data.columns import IMAGE_COLUMNS, TEXT_COLUMNS, delimiter, first_known, image_column
from vlp.data.records import (
    IMAGE_EXTENSIONS,
    BadSample,
    Blobs,
    Key,
    RawSample,
    digest,
    matches,
    nothing_left,
)

__all__ = ["IMAGE_COLUMNS", "TABLE_SUFFIXES", "FolderReader", "TableReader"]

log = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class _Rows(Protocol):
    """Rows of a table by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def fingerprint(self) -> str: ...

    def place(self, index: int) -> str: ...


_Numbered: TypeAlias = tuple[int, bytes]
"""Line at which a row begins, the first being 1 and 0 = not known, and the row as JSON."""


class _JsonRows:
    def __init__(self, rows: Iterator[_Numbered]):
        lines = array("q")  # boxed integers would take several times the memory

        def texts() -> Iterator[bytes]:
            for line, row in rows:
                lines.append(line)
                yield row

        self._rows = Blobs.pack(texts())
        self._lines = np.array(lines, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return json.loads(self._rows[index])

    def fingerprint(self) -> str:
        return digest(self._rows.data, self._rows.offsets)

    def place(self, index: int) -> str:
        return f"line {self._lines[index]}" if self._lines[index] else _row(index)


class _ArrowRows:
    def __init__(self, path: Path):
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ValueError(f"data: '{path}' needs pyarrow; install it with: pip install 'vlp[parquet]'") from error
        try:
            self._table = parquet.read_table(path, memory_map=True)
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            raise ValueError(f"data: '{path}' is not a readable parquet file: {_one_line(error)}") from error
        self._stamp = np.array([path.stat().st_size, self._table.num_rows], dtype=np.int64)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._table.slice(index, 1).to_pylist()[0]

    def fingerprint(self) -> str:
        return digest(self._stamp, str(self._table.schema))

    def place(self, index: int) -> str:
        return _row(index)


def _row(index: int) -> str:
    return f"row {index}, counted from 0"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _csv_rows(path: Path) -> Iterator[_Numbered]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter(header, path.suffix))
        names = [name.strip() for name in next(reader, [])]
        end = reader.line_num
        for row in reader:
            line, end = end + 1, reader.line_num  # a cell may hold several lines
            if len(row) > len(names):
                raise ValueError(
                    f"data: '{path}' line {reader.line_num} has {len(row)} cells for {len(names)} columns; "
                    "put cells that hold the separator in double quotes"
                )
            if row:
                yield line, json.dumps(dict(zip(names, row + [""] * (len(names) - len(row))))).encode()


def _jsonl_rows(path: Path) -> Iterator[_Numbered]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"data: '{path}' line {number} is not json: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"data: '{path}' line {number} is not an object with named fields")
                yield number, line


def _json_rows(path: Path) -> Iterator[_Numbered]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"data: '{path}' is not json: {error}; one object a line is called .jsonl") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"data: '{path}' must be a list of objects with named fields; convert it to .jsonl")
    yield from ((0, json.dumps(row).encode()) for row in rows)


def _open_rows(path: Path) -> _Rows:
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}
    if path.suffix == ".parquet":
        return _ArrowRows(path)
    if path.suffix not in readers:
        raise ValueError(f"data: '{path}' has no known ending; use one of {', '.join(TABLE_SUFFIXES)}")
    try:
        return _JsonRows(readers[path.suffix](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"data: '{path}' is not UTF-8 ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"data: '{path}' is not a csv table: {error}") from error


class TableReader:
    """Samples of a csv, tsv, json (list of objects), jsonl or parquet file.

    A cell of an image column holds a path (or a list of paths); in parquet also the encoded image itself, alone
    or as ``{"bytes": ..., "path": ...}``. A cell of the text column holds a text or a list of texts.

    Args:
        path: The table.
        image_column: Column, or columns in order for several images; None guesses, ``()`` for a table without.
        text_column: Column of the text; None guesses, "" for a table without.
        root: Folder that image paths are relative to; None means the folder of the table.
        where: Keep only rows with these values, see ``records.matches``.

    Raises:
        ValueError: If the file is missing or malformed, a column is not there, or no row is left.
    """

    def __init__(
        self,
        path: str | Path,
        image_column: str | Sequence[str] | None = None,
        text_column: str | None = None,
        root: str | Path | None = None,
        where: Mapping[str, Any] | None = None,
    ):
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"data: there is no file '{path}'; check the path")
        self.name = str(path)
        self._root = Path(root) if root is not None else path.parent
        if not self._root.is_dir():
            raise ValueError(f"root: there is no folder '{self._root}'; image paths are relative to it")
        self._rows = _open_rows(path)
        if len(self._rows) == 0:
            raise ValueError(f"data: '{path}' has no rows")
        columns = list(self._rows[0])
        self._image_columns = self._pick_images(self._rows[0], image_column)
        self._text_column = self._pick_text(columns, text_column)
        self._kept: npt.NDArray[np.int64] | None = None
        if where:
            kept = [i for i in range(len(self._rows)) if matches(self._rows[i], where)]
            if not kept:
                raise nothing_left(self.name, where, columns)
            self._kept = np.array(kept, dtype=np.int64)

    def _pick_images(self, row: Mapping[str, Any], named: str | Sequence[str] | None) -> tuple[str, ...]:
        if named is None:
            guess = image_column(row)
            if guess is None:
                raise ValueError(
                    f"data.image: no column of '{self.name}' looks like an image path; name it with --data.image, "
                    f"columns: {', '.join(row)}"
                )
            _say(f"{self.name}: images from column '{guess}'")
            return (guess,)
        names = (named,) if isinstance(named, str) else tuple(named)
        for name in names:
            _check_column("data.image", name, list(row), self.name)
        return names

    def _pick_text(self, columns: list[str], named: str | None) -> str | None:
        if named is None:
            guess = first_known(columns, TEXT_COLUMNS)
            found = f"texts from column '{guess}'" if guess else "no text column"
            _say(f"{self.name}: {found}")
            return guess
        if named:
            _check_column("data.text", named, columns, self.name)
        return named or None

    @property
    def fingerprint(self) -> str:
        """Hash of the rows (of size and schema for parquet) and of which are kept."""
        kept = self._kept if self._kept is not None else np.zeros(0, dtype=np.int64)
        return digest(self._rows.fingerprint(), kept)

    def __len__(self) -> int:
        return len(self._rows) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> RawSample:
        """Read row ``index``; its key is the row's number in the file, the first being 0.

        Raises:
            BadSample: If an image file cannot be read.
        """
        return self._sample(index, Path.read_bytes)

    def words(self, index: int) -> RawSample:
        """Read row ``index`` without its images, whose files are only looked for."""
        return replace(self._sample(index, _nothing_of), files={})

    def _sample(self, index: int, content: Callable[[Path], bytes]) -> RawSample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index if self._kept is None else int(self._kept[index])
        key, fields = Key(str(number), f"{self.name} {self._rows.place(number)}"), self._rows[number]
        images: list[tuple[str, bytes]] = []
        for column in self._image_columns:
            # An image inside the table is moved to the files: fields stay small.
            cell = fields.get(column)
            inside = isinstance(cell, bytes | dict) or (isinstance(cell, list) and any(map(_is_image, cell)))
            images += self._images(key, column, fields.pop(column, None) if inside else cell, content)
        only = len(images) == 1
        files = {ext if only else f"{i}.{ext}": data for i, (ext, data) in enumerate(images)}
        return RawSample(key, self.name, files, fields, self._texts(key, fields))

    def _images(self, key: str, column: str, cell: Any, content: Callable[[Path], bytes]) -> list[tuple[str, bytes]]:
        """Extension and content of the images in one cell."""
        if isinstance(cell, list):
            return [image for item in cell for image in self._images(key, column, item, content)]
        if isinstance(cell, dict) and not cell.get("bytes"):
            cell = cell.get("path")
        if isinstance(cell, bytes | dict):
            return [("img", cell if isinstance(cell, bytes) else cell["bytes"])]
        if not cell or not isinstance(cell, str):
            raise BadSample(key, f"no image path in column '{column}'")
        try:
            extension = "npz" if cell.lower().endswith(".npz") else _extension(cell)
            return [(extension, content(self._root / cell))]
        except (OSError, ValueError) as error:
            raise BadSample(key, f"cannot read image '{cell}': {error}") from error

    def paths(self) -> Iterator[str]:
        """Yield the files that are read: the table, and every row's images."""
        yield self.name
        for index in range(len(self)):
            row = self._rows[index if self._kept is None else int(self._kept[index])]
            columns = [row.get(column) for column in self._image_columns]
            for cell in chain.from_iterable(one if isinstance(one, list) else [one] for one in columns):
                name = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else cell
                if name and isinstance(name, str):
                    yield os.path.join(self._root, name)

    def _texts(self, key: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
        cell = fields.get(self._text_column) if self._text_column is not None else None
        cells = cell if isinstance(cell, list) else [cell]
        return tuple(str(item) for item in cells if item is not None)


def _nothing_of(path: Path) -> bytes:
    """Look for a file, and leave it unread."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'")
    return b""


@cache
def _say(what: str) -> None:
    """Log it once, however often the table is opened."""
    log.info("%s", what)


def _is_image(cell: Any) -> bool:
    return isinstance(cell, bytes | dict)


def _extension(name: str) -> str:
    suffix = os.path.splitext(name)[1][1:].lower()
    return suffix if suffix in IMAGE_EXTENSIONS else "img"


def _check_column(option: str, name: str, columns: Sequence[str], table: str) -> None:
    if name not in columns:
        raise ValueError(
            f"{option}: '{table}' has no column '{name}'; columns: {', '.join(columns)}; name one with --{option}"
        )


class FolderReader:
    """Images of a folder and its sub-folders in the order of their paths, each with the text of ``<stem>.txt``, if any.

    Args:
        path: The folder.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """

    def __init__(self, path: str | Path):
        self._root = Path(path)
        self.name = str(path)
        if not self._root.is_dir():
            raise ValueError(f"data: there is no folder '{path}'; check the path")
        self._names = Blobs.pack(os.fsencode(name) for name in self._find())
        if len(self) == 0:
            raise ValueError(f"data: folder '{path}' holds no images ({', '.join(sorted(IMAGE_EXTENSIONS - {'img'}))})")

    def _find(self) -> Iterator[str]:
        for folder, folders, names in os.walk(self._root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith(".") and _extension(name) != "img":
                    yield os.path.relpath(os.path.join(folder, name), self._root)

    @property
    def fingerprint(self) -> str:
        """Hash of the relative paths."""
        return digest(self._names.data, self._names.offsets)

    def paths(self) -> Iterator[str]:
        """Yield the files of the images."""
        return (os.path.join(self._root, os.fsdecode(self._names[index])) for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> RawSample:
        """Read image ``index``; its key is the relative path.

        Raises:
            BadSample: If the image or its text cannot be read.
        """
        return self._sample(index, Path.read_bytes)

    def words(self, index: int) -> RawSample:
        """Read the text of image ``index``."""
        return replace(self._sample(index, _nothing_of), files={})

    def _sample(self, index: int, content: Callable[[Path], bytes]) -> RawSample:
        key = Key(os.fsdecode(self._names[index]), self.name)
        path = self._root / key
        caption = path.with_suffix(".txt")
        try:
            files = {_extension(key): content(path)}
            texts = (caption.read_text(encoding="utf-8"),) if caption.exists() else ()
        except (OSError, UnicodeDecodeError) as error:
            raise BadSample(key, f"cannot read it or its caption: {error}") from error
        return RawSample(key, self.name, files, {"image": key}, texts)
