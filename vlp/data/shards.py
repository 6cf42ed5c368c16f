"""WebDataset tar shards, read by sample number.

The tar headers are scanned once into a few arrays (``tar_index.py``, which also says what is cached where);
afterwards a sample is one positioned read. Names are grouped as webdataset groups them: the key is the path up to
the first dot of the base name, the extension is the rest, members of a sample follow each other. Shards written
by img2dataset (.jpg, .txt, .json) are of this form.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from vlp.data.records import (
    ARRAY_EXTENSIONS,
    IMAGE_EXTENSIONS,
    BadSample,
    Blobs,
    Key,
    RawSample,
    digest,
    matches,
    nothing_left,
)
from vlp.data.tar_index import ShardIndex, default_index_cache, expand_shards, is_local, load_index

log = logging.getLogger(__name__)

_NO_WORDS = IMAGE_EXTENSIONS | ARRAY_EXTENSIONS


class _OpenFile:
    """A file descriptor that closes itself; evicting it from a cache leaves a read in another thread alone."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardReader:
    """Samples of WebDataset tar shards, by number, in stored order.

    Pickles and forks: the index is a handful of arrays, and files are opened by each process for itself.

    Args:
        patterns: Local paths or fsspec urls with braces or globs, see ``expand_shards``.
        where: Keep only samples whose .json member has these values (see ``records.matches``); reads every .json once.
        index_cache: Folder for the indexes of large shards, "auto" for the user's cache folder; None keeps nothing.

    Raises:
        ValueError: If a shard is missing, damaged or compressed, or if no sample is left.
    """

    max_open_files = 64
    """Shards a process keeps open at a time (descriptors)."""

    def __init__(
        self,
        patterns: str | Sequence[str],
        where: Mapping[str, Any] | None = None,
        index_cache: str | Path | None = "auto",
    ):
        shards = expand_shards(patterns)
        if len(shards) > 100:
            log.info("indexing %d shards", len(shards))
        cache = default_index_cache() if index_cache == "auto" else index_cache and Path(index_cache)
        with ThreadPoolExecutor(8) as pool:  # for remote shards: a header is a round trip
            parts = list(pool.map(lambda url: load_index(url, cache or None), shards))
        self._shards = Blobs.pack(url.encode() for url in shards)
        self._index = ShardIndex.join(parts)
        self._open: dict[int, _OpenFile] = {}
        self.name = shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"
        if len(self) == 0:
            raise ValueError(f"data: {self.name} holds no samples; their members are named like 000.jpg, 000.txt")
        if where:
            self._filter(where)

    @property
    def fingerprint(self) -> str:
        """Hash of keys, sizes and their order."""
        return digest(self._index.keys.data, self._index.keys.offsets, self._index.size, self._index.first)

    def paths(self) -> Iterator[str]:
        """Yield the shards' paths or urls."""
        return (self._shards[number].decode() for number in range(len(self._shards)))

    def __len__(self) -> int:
        return len(self._index.keys)

    def __getitem__(self, index: int) -> RawSample:
        """Read sample ``index``.

        Raises:
            BadSample: If the shard has become shorter or unreadable since it was indexed.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        members = range(self._index.first[index], self._index.first[index + 1])
        return self._sample(index, [members])  # they follow each other: one read, headers included

    def words(self, index: int) -> RawSample:
        """Read sample ``index`` without its images and arrays."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        members = range(self._index.first[index], self._index.first[index + 1])
        wanted = [member for member in members if self._extension(member).rsplit(".", 1)[-1] not in _NO_WORDS]
        # An image may lie between them; of a remote shard it is read too, as every read is a round trip.
        local = is_local(self._shards[int(self._index.shard[index])].decode())
        return self._sample(index, [[member] for member in wanted] if local or not wanted else [wanted])

    def _extension(self, member: int) -> str:
        return self._index.extensions[self._index.extension[member]]

    def _sample(self, index: int, runs: Sequence[Sequence[int]]) -> RawSample:
        """Sample ``index`` with these of its members, each run of them in one read."""
        here, shard = self._index, int(self._index.shard[index])
        source = self._shards[shard].decode()
        key, files = Key(here.keys[index].decode("utf-8", "replace"), source), dict[str, bytes]()
        for members in runs:
            offsets, sizes = ([int(array[member]) for member in members] for array in (here.offset, here.size))
            data = self._read(shard, offsets[0], offsets[-1] + sizes[-1], key)
            for member, offset, size in zip(members, offsets, sizes, strict=True):
                files[self._extension(member)] = data[offset - offsets[0] : offset - offsets[0] + size]
        return RawSample(key, source, files)

    def _read(self, shard: int, start: int, end: int, key: str) -> bytes:
        url = self._shards[shard].decode()
        try:
            if is_local(url):
                data = os.pread(self._descriptor(shard, url).descriptor, end - start, start)
            else:
                filesystem, path = fsspec.core.url_to_fs(url)  # instances are cached by fsspec, per process
                data = filesystem.cat_file(path, start=start, end=end)
        except OSError as error:
            raise BadSample(key, f"cannot read shard '{url}': {error}") from error
        if len(data) != end - start:
            raise BadSample(key, f"shard '{url}' has become shorter since it was indexed")
        return data

    def _descriptor(self, shard: int, path: str) -> _OpenFile:
        file = self._open.pop(shard, None) or _OpenFile(path)
        while len(self._open) >= self.max_open_files:
            del self._open[next(iter(self._open))]
        self._open[shard] = file  # last = most recently used
        return file

    def _filter(self, where: Mapping[str, Any]) -> None:
        """Keep the samples whose json member passes ``where``."""
        here = self._index
        kept: list[int] = []
        known: set[str] = set()
        json_code = here.extensions.index("json") if "json" in here.extensions else -1
        members = np.flatnonzero(here.extension == json_code)
        samples = np.searchsorted(here.first, members, side="right") - 1
        for i, member in zip(samples.tolist(), members.tolist()):
            fields = self._json(i, int(here.offset[member]), int(here.size[member]))
            known.update(fields)
            if matches(fields, where):
                kept.append(i)
        if not kept:
            raise nothing_left(self.name, where, known)
        self._index = here.take(np.array(kept, dtype=np.int64))

    def _json(self, index: int, start: int, size: int) -> dict[str, Any]:
        shard, key = int(self._index.shard[index]), self._index.keys[index].decode("utf-8", "replace")
        try:
            fields = json.loads(self._read(shard, start, start + size, key))
        except ValueError as error:
            raise ValueError(
                f"where: {key}.json in '{self._shards[shard].decode()}' cannot be read: {error}"
            ) from error
        return fields if isinstance(fields, dict) else {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def write_shards(
    samples: Iterable[Mapping[str, Any]], pattern: str, max_count: int = 10_000, max_bytes: float = 1e9
) -> list[str]:
    """Write samples as WebDataset tar shards; the same samples give the same bytes.

    Args:
        samples: Each with ``__key__`` and one entry per member: ``{"__key__": "000", "jpg": ..., "txt": ...}``.
            Values are bytes, or what webdataset encodes for the extension (str, dict for json, PIL image, ...).
        pattern: Path with one ``%d`` field for the number of the shard, as in ``out/train-%06d.tar``.
        max_count: Samples in a shard at most.
        max_bytes: Bytes after which a shard is closed.

    Returns:
        The paths written.

    Raises:
        ValueError: If ``pattern`` lacks its number, or a key would be split differently when read.
    """
    from webdataset import ShardWriter

    if not re.search(r"%0?\d*d", pattern):
        raise ValueError(f"pattern: '{pattern}' has no shard number; write for example out/train-%06d.tar")
    Path(pattern).parent.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    with ShardWriter(pattern, maxcount=max_count, maxsize=max_bytes, verbose=0, post=written.append, mtime=0) as writer:
        for sample in samples:
            key = sample.get("__key__", "")
            if not key or "." in key.rsplit("/", 1)[-1]:
                raise ValueError(f"__key__ is '{key}'; it must be a non-empty name without a dot in its last part")
            writer.write(dict(sample))
    return written
