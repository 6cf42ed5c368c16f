"""Opening a data set by its name, and decoding one sample of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vlp.data.benchmark import emoji_path
from vlp.data.decode import decode_image
from vlp.data.easy_vqa import SCHEME as EASY_VQA
from vlp.data.easy_vqa import EasyVqaReader
from vlp.data.lines import LINES_SUFFIX, LinesReader
from vlp.data.records import (
    IMAGE_EXTENSIONS,
    TEXT_FIELDS,
    BadSample,
    Key,
    NothingLeft,
    OnDisk,
    RawSample,
    Reader,
    digest,
    place_of,
    read_words,
)
from vlp.data.scenes import SCHEME as SCENES
from vlp.data.scenes import ScenesReader
from vlp.data.shards import ShardReader
from vlp.data.table import TABLE_SUFFIXES, FolderReader, TableReader

__all__ = ["BadSample", "RawSample", "Reader", "Sample", "decode_sample", "decode_texts", "open_reader"]

EMOJI = "emoji:"
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # names of the Hugging Face image folder


@dataclass(frozen=True, slots=True)
class Sample:
    """A decoded sample.

    Attributes:
        key: Name within its source.
        images: uint8 [3, H, W] each, as stored; empty only if the task needs none.
        texts: Stripped texts, none of them empty.
        fields: Everything else: columns of the table row or content of the .json member, and other members as bytes.
    """

    key: str
    images: tuple[Tensor, ...]
    texts: tuple[str, ...]
    fields: dict[str, Any]


def open_reader(
    spec: str | Sequence[str],
    *,
    image: str | Sequence[str] | None = None,
    text: str | None = None,
    root: str | Path | None = None,
    where: Mapping[str, Any] | None = None,
) -> Reader:
    """Open a data set by the form of its name.

    Args:
        spec: Tar shards (path or fsspec url, with braces or globs), a table (csv, tsv, json, jsonl, parquet), a folder
            of images (or of .tar files, or with a metadata.csv / .jsonl / .parquet), a .txt file of one text a line,
            or a list of those, read in order;
            ``emoji:STYLE,...`` for the embedded benchmark, ``emoji-scenes:STYLE,...`` for two of its emoji a picture,
            ``easy-vqa:train`` or ``:test`` for easy-vqa.
        image: Tables: column or columns with image paths; None guesses, ``()`` for texts without images.
        text: Tables: column with the text; None guesses.
        root: Tables: folder that image paths are relative to; None means the folder of the table.
        where: Keep samples whose fields (row, or .json member) have these values.

    Raises:
        ValueError: If nothing is there, nothing is left, or an option does not fit the form.
    """
    specs = [path for name in ([spec] if isinstance(spec, str) else spec) for path in _resolve(name)]
    if not specs:
        raise ValueError("data: the list is empty; name shards, a table or a folder")
    if all(is_shards(name) for name in specs):
        return _without_columns(ShardReader(specs, where), root)
    if len(specs) > 1:
        return _concat([partial(open_reader, name, image=image, text=text, root=root, where=where) for name in specs])
    if specs[0].startswith(EASY_VQA):
        return EasyVqaReader(specs[0].removeprefix(EASY_VQA), where)
    if specs[0].startswith(SCENES):
        return ScenesReader(specs[0].removeprefix(SCENES), where)
    path = Path(specs[0])
    if path.is_dir():
        if any(path.glob("*.tar")):
            return _without_columns(ShardReader(os.path.join(path, "*.tar"), where), root)
        tables = [path / name for name in _METADATA if (path / name).is_file()]
        if not tables:
            if where:
                raise ValueError(
                    f"where: the images of folder '{path}' have no fields; add a metadata.csv to filter by"
                )
            return FolderReader(path)
        path = tables[0]
    if not path.exists() and not path.suffix:
        raise ValueError(f"data: there is no file or folder '{path}'; check the path")
    if path.suffix == LINES_SUFFIX:
        if image or where:
            raise ValueError(f"data: '{path}' holds a text a line, without images or fields; leave image and where out")
        return LinesReader(path)
    if path.suffix not in TABLE_SUFFIXES:
        known = ", ".join((".tar", *TABLE_SUFFIXES))
        raise ValueError(f"data: '{path}' is neither a folder nor a file ending in {known}; check the path")
    return TableReader(path, image, text, root, where)


def _concat(opened: Sequence[Callable[[], Reader]]) -> Reader:
    """The readers behind each other; one of which a filter leaves nothing is left out, unless that is so of all."""
    readers, empty = [], []
    for each in opened:
        try:
            readers.append(each())
        except NothingLeft as error:
            empty.append(error)
    if not readers:
        raise empty[0]
    return ConcatReader(readers)


def _resolve(name: str) -> list[str]:
    """The paths that a name stands for: ``emoji:noto,twemoji`` the shards of these styles."""
    if not name.startswith(EMOJI):
        return [name]
    return [str(emoji_path(style.strip())) for style in name.removeprefix(EMOJI).split(",")]


def is_shards(name: str) -> bool:
    """Whether a name of data is one of tar shards."""
    return name.startswith("pipe:") or ".tar" in os.path.basename(name)


def _without_columns(reader: ShardReader, root: str | Path | None) -> ShardReader:
    if root is not None:
        raise ValueError(f"root: '{root}' is for tables with image paths, shards hold their images; leave it out")
    return reader


class ConcatReader:
    """Several readers, one after the other.

    Args:
        readers: At least one.
    """

    def __init__(self, readers: Sequence[Reader]):
        assert readers
        self._readers = tuple(readers)
        self._ends = np.cumsum([len(reader) for reader in readers], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Hash of the readers' own."""
        return digest("".join(reader.fingerprint for reader in self._readers))

    def paths(self) -> Iterator[str]:
        """Yield the readers' own files."""
        return chain.from_iterable(one.paths() for one in self._readers if isinstance(one, OnDisk))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> RawSample:
        """Read sample ``index``.

        Raises:
            BadSample: If a part of it cannot be read.
        """
        reader, number = self._at(index)
        return reader[number]

    def words(self, index: int) -> RawSample:
        """Read sample ``index`` without its images."""
        return read_words(*self._at(index))

    def _at(self, index: int) -> tuple[Reader, int]:
        """The reader that has sample ``index``, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._readers[part], index - (int(self._ends[part - 1]) if part else 0)


def decode_sample(
    raw: RawSample,
    *,
    image: str | Sequence[str] | None = None,
    text: str | None = None,
    need_image: bool = True,
    need_text: bool = True,
) -> Sample:
    """Decode the parts of one sample.

    Images are all members with an image extension, in stored order; texts are the ``txt`` members (``txt``, ``0.txt``,
    ...), else the first field that is called caption, text, question or the like.

    Args:
        raw: As read.
        image: Shards: member or members that hold the images, by extension, in this order.
        text: Shards: member or json field that holds the text.
        need_image: Whether a sample without image is bad.
        need_text: Whether a sample without text is bad.

    Raises:
        BadSample: If an image cannot be decoded, a text is empty or not UTF-8, or a part is missing.
    """
    fields = _fields(raw)
    texts, text_members = _texts(raw, fields, text)
    images = _image_members(raw, image)
    used = {*images, *text_members}
    fields |= {e: data for e, data in raw.files.items() if e not in used and not _is_json(e) and not _is_image(e)}
    if need_image and not images:
        raise BadSample(raw.key, f"no image; it has {_parts(raw, fields)}")
    if need_text and not texts:
        raise BadSample(raw.key, f"no text; it has {_parts(raw, fields)}")
    stripped = tuple(item.strip() for item in texts)
    if need_text and not all(stripped):
        raise BadSample(raw.key, "empty caption")
    decoded = tuple(decode_image(raw.files[extension], _member(raw, extension)) for extension in images)
    return Sample(raw.key, decoded, tuple(item for item in stripped if item), fields)


def decode_texts(raw: RawSample, *, text: str | None = None) -> tuple[str, ...]:
    """Return one sample's texts, stripped, without those that are empty; no image is decoded.

    Args:
        raw: As read.
        text: Shards: member or json field that holds the text.

    Raises:
        BadSample: If a text is not UTF-8 or a json member is broken.
    """
    texts, _ = _texts(raw, _fields(raw), text)
    return tuple(item.strip() for item in texts if item.strip())


def _fields(raw: RawSample) -> dict[str, Any]:
    """Columns of the row, and the content of json members."""
    fields = dict(raw.fields)
    for extension, data in raw.files.items():
        if _is_json(extension):
            fields |= _json_fields(raw.key, extension, data)
    return fields


def _member(raw: RawSample, extension: str) -> str:
    """The sample's key where an error is about one member of a shard: its place names the member too."""
    if raw.texts is not None or not place_of(raw.key):  # of tables and folders
        return raw.key
    return Key(raw.key, f"{raw.source} member {raw.key}.{extension}")


def _last(extension: str) -> str:
    return extension.rsplit(".", 1)[-1]


def _is_json(extension: str) -> bool:
    return _last(extension) == "json"


def _is_image(extension: str) -> bool:
    return _last(extension) in IMAGE_EXTENSIONS


def _parts(raw: RawSample, fields: Mapping[str, Any]) -> str:
    return ", ".join(dict.fromkeys([*raw.files, *fields])) or "nothing"


def _json_fields(key: str, extension: str, data: bytes) -> dict[str, Any]:
    """Fields of one json member: those of ``.json`` stand at the top, others under their name."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise BadSample(key, f".{extension} is not json: {error}") from error
    return content if extension == "json" and isinstance(content, dict) else {extension: content}


def _image_members(raw: RawSample, named: str | Sequence[str] | None) -> list[str]:
    if named is None or raw.texts is not None:  # tables: the reader has chosen the columns
        return [extension for extension in raw.files if _is_image(extension)]
    names = [named] if isinstance(named, str) else list(named)
    for name in names:
        if name not in raw.files:
            raise BadSample(raw.key, f"no member .{name}; it has {_parts(raw, {})}")
    return names


def _texts(raw: RawSample, fields: Mapping[str, Any], named: str | None) -> tuple[tuple[str, ...], list[str]]:
    """The texts and the members that they come from."""
    if raw.texts is not None:
        return raw.texts, []
    members = [e for e in raw.files if (_last(e) == "txt" if named is None else e == named)]
    if members:
        try:
            return tuple(raw.files[extension].decode("utf-8") for extension in members), members
        except UnicodeDecodeError as error:
            named = " or ".join(f".{extension}" for extension in members)
            raise BadSample(raw.key, f"text {named} is not UTF-8: {error}") from error
    if named is not None and named not in fields:
        return (), []
    name = named if named is not None else next((name for name in TEXT_FIELDS if fields.get(name) is not None), None)
    cell = fields[name] if name is not None else None
    cells = cell if isinstance(cell, list) else [cell]
    return tuple(str(item) for item in cells if item is not None), []
