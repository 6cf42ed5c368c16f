"""Where the members of tar shards lie: patterns to paths, headers to arrays, arrays to a cache folder.

Scanning reads every header, which takes minutes for a large data set. Indexes of shards of ``CACHE_FROM_BYTES`` and
more are therefore kept in a cache folder (``$VLP_CACHE/index``, else ``$XDG_CACHE_HOME/vlp/index``, else
``~/.cache/vlp/index``), under a name that holds the hash of url, size and modification time: a changed shard is
scanned again. Small data never touches the disk, nor does anything with no cache folder. Nothing is
written beside the shards, which may lie in a read-only or shared place.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import fsspec
import numpy as np
import numpy.typing as npt

from vlp.data.records import Blobs

log = logging.getLogger(__name__)

CACHE_FROM_BYTES = 64 << 20
_INDEX_VERSION = 1
_REMEDY = "copy or unpack it again, or leave it out of the list"
_BLOCK = 512  # tar's unit
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's base_plus_ext
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's skip_meta
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def default_index_cache() -> Path:
    """Where indexes of large shards are kept unless the caller says otherwise."""
    if "VLP_CACHE" in os.environ:
        return Path(os.environ["VLP_CACHE"]) / "index"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vlp" / "index"


def expand_shards(patterns: str | Sequence[str]) -> list[str]:
    """Paths and urls that patterns stand for, in order.

    Args:
        patterns: Local paths or fsspec urls, each with ``{000..099}``, ``{a,b}`` or a glob in it where wanted.

    Raises:
        ValueError: If a pattern matches nothing or cannot be read at a position.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern.startswith("pipe:"):
            raise ValueError(
                f"data: '{pattern}' is a stream, samples are read by position; name the fsspec url "
                "(s3://, gs://, hf://, https://) that the command reads, or copy the shards to a local folder"
            )
        for url in _expand_braces(pattern):
            if re.search(r"[*?\[]", url):
                urls = _glob(url)
                if not urls:
                    raise ValueError(f"data: '{url}' matches no file; check the path")
                found.extend(urls)
            else:
                found.append(url)
    if not found:
        raise ValueError("data: the list of shards is empty; name at least one")
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    bounds = _RANGE.fullmatch(match[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        step = 1 if last >= first else -1
        choices = [f"{i:0{width}d}" for i in range(first, last + step, step)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def is_local(url: str) -> bool:
    """Whether it is a plain path, to be opened by the operating system."""
    return "://" not in url


def _glob(url: str) -> list[str]:
    if is_local(url):
        return sorted(glob.glob(url, recursive=True))
    filesystem, path = fsspec.core.url_to_fs(url)
    return sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(path))


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of S samples lie, in one shard or in several joined ones (then ``shard`` tells which)."""

    keys: Blobs  # S keys
    first: npt.NDArray[np.int64]  # [S + 1], members of sample i: first[i] .. first[i + 1] - 1
    offset: npt.NDArray[np.int64]  # [members], of the content in its tar file
    size: npt.NDArray[np.int64]  # [members], bytes
    extension: npt.NDArray[np.int32]  # [members], index into extensions
    extensions: tuple[str, ...]
    shard: npt.NDArray[np.int32]  # [S]

    @classmethod
    def join(cls, parts: Sequence[ShardIndex]) -> ShardIndex:
        names = tuple(dict.fromkeys(name for part in parts for name in part.extensions))
        code = {name: i for i, name in enumerate(names)}
        codes = [np.array([code[name] for name in part.extensions], dtype=np.int32) for part in parts]
        starts = np.cumsum([0, *(len(part.offset) for part in parts)])
        return cls(
            keys=Blobs.join(part.keys for part in parts),
            first=np.concatenate([[np.int64(0)], *(part.first[1:] + start for part, start in zip(parts, starts))]),
            offset=np.concatenate([part.offset for part in parts]),
            size=np.concatenate([part.size for part in parts]),
            extension=np.concatenate([table[part.extension] for table, part in zip(codes, parts)]),
            extensions=names,
            shard=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.keys) for part in parts]),
        )

    def take(self, samples: npt.NDArray[np.int64]) -> ShardIndex:
        members = [np.arange(self.first[i], self.first[i + 1]) for i in samples]
        kept = np.concatenate(members)
        return ShardIndex(
            keys=self.keys.take(samples),
            first=np.cumsum([0, *(len(m) for m in members)], dtype=np.int64),
            offset=self.offset[kept],
            size=self.size[kept],
            extension=self.extension[kept],
            extensions=self.extensions,
            shard=self.shard[samples],
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        names = np.frombuffer("\0".join(self.extensions).encode(), dtype=np.uint8)
        with aside.open("wb") as file:
            np.savez(
                file, data=self.keys.data, offsets=self.keys.offsets, first=self.first, offset=self.offset,
                size=self.size, extension=self.extension, extensions=names,
            )  # fmt: skip
        os.replace(aside, path)  # ranks may race: each writes the same content, the last one stays

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        with np.load(path, allow_pickle=False) as stored:
            names = tuple(stored["extensions"].tobytes().decode().split("\0"))
            keys = Blobs(stored["data"], stored["offsets"])
            parts = (stored["first"], stored["offset"], stored["size"], stored["extension"])
            return cls(keys, *parts, names, np.zeros(len(keys), dtype=np.int32))


def _scan(url: str, file: BinaryIO) -> ShardIndex:
    """Read all headers of one tar file.

    Raises:
        ValueError: If it is no plain tar file, is cut short, or holds a name twice in one sample.
    """
    keys: list[str] = []
    first: list[int] = [0]
    offset: list[int] = []
    size: list[int] = []
    extension: list[int] = []
    codes: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else member.offset_data
                name = _split_name(member)
                if name is None:
                    continue
                key, suffix = name
                if not keys or key != keys[-1]:
                    keys.append(key)
                    first.append(first[-1])
                code = codes.setdefault(suffix, len(codes))
                if code in extension[first[-2] :]:
                    raise ValueError(f"data: shard '{url}' holds '{member.name}' twice in one sample; write it anew")
                offset.append(member.offset_data)
                size.append(member.size)
                extension.append(code)
                first[-1] += 1
    except tarfile.TarError as error:
        raise ValueError(f"data: shard '{url}' is not a whole, uncompressed tar file ({error}); {_REMEDY}") from error
    # tarfile takes a damaged header for the end of the archive, so look for the real end: a block of zeros.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise ValueError(f"data: shard '{url}' is truncated or damaged at byte {end}; {_REMEDY}")
    return ShardIndex(
        keys=Blobs.pack(key.encode("utf-8", "surrogateescape") for key in keys),
        first=np.array(first, dtype=np.int64),
        offset=np.array(offset, dtype=np.int64),
        size=np.array(size, dtype=np.int64),
        extension=np.array(extension, dtype=np.int32),
        extensions=tuple(codes),
        shard=np.zeros(len(keys), dtype=np.int32),
    )


def _split_name(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Key and lower-case extension, or None for what is no part of a sample."""
    base = member.name.rsplit("/", 1)[-1]
    # Dot files (macOS writes "._name" beside each file) and stored pax headers come from careless packing.
    skipped = not member.isreg() or base.startswith(".") or "PaxHeader" in member.name or _META.match(member.name)
    match = None if skipped else _NAME.match(member.name)
    return (match[1], match[2].lower()) if match else None


def load_index(url: str, cache: Path | None) -> ShardIndex:
    """Index of one shard, from the cache if it is there."""
    try:
        if is_local(url):
            stat = os.stat(url)
            size, stamp = stat.st_size, str(stat.st_mtime_ns)
            url_key = os.path.abspath(url)
        else:
            filesystem, path = fsspec.core.url_to_fs(url)
            info = filesystem.info(path)
            size, url_key = info.get("size") or 0, url
            stamp = str(next((info[k] for k in ("ETag", "etag", "mtime", "LastModified", "updated") if k in info), ""))
        stored = None
        # A remote shard that shows no time of change could be replaced unseen: never cached.
        if cache is not None and size >= CACHE_FROM_BYTES and stamp:
            name = hashlib.sha256(f"{_INDEX_VERSION}\n{url_key}\n{size}\n{stamp}".encode()).hexdigest()[:32]
            stored = cache / f"{name}.npz"
            if stored.exists():
                try:
                    return ShardIndex.load(stored)
                except (OSError, ValueError, KeyError, BadZipFile) as error:
                    log.warning("index cache: %s is unreadable (%s), scanning '%s' again", stored, error, url)
        with fsspec.open(url, "rb") as file:
            index = _scan(url, file)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"data: shard '{url}' is not there; check the path, and the range in braces") from error
    if stored is not None:
        try:
            index.save(stored)
        except OSError as error:
            log.warning("index cache: cannot write %s (%s); this shard is scanned again at each start", stored, error)
    return index
