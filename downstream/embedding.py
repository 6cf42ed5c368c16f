"""`vlp embed` and `vlp search`: a file of unit-norm vectors, and what in it is nearest to a text or an image.

Vectors are written as they are made; only their names are held in memory.
Shapes: n vectors, E embedding.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from downstream.evaluate import weights_hash
from downstream.gallery import Gallery, embed_images, embed_texts, open_gallery
from downstream.metrics.retrieval import topk_chunked
from encoders.types import Modality
from vlp.data.decode import AnyImage
from vlp.data.reader import Reader, open_reader
from vlp.data.records import IMAGE_EXTENSIONS, place_of
from vlp.loaded import Loaded

logger = logging.getLogger(__name__)

SUFFIXES = (".npz", ".parquet")
_INFO = "vlp"  # where an index says what made it

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Index:
    """An opened file of vectors."""

    keys: Sequence[str]
    """Names: image paths or ids, or the texts themselves."""
    vectors: Floats
    """[n, E], unit-norm."""
    info: dict[str, Any]
    """`model` (SHA-256 of its weights), `modality`, `data` (fingerprint)."""


@dataclass(frozen=True)
class Embedded:
    """What was written."""

    count: int
    """Vectors."""
    bad: dict[str, str]
    """Samples left out: key -> reason."""


class _Sink(Protocol):
    def add(self, keys: Sequence[str], vectors: Floats) -> None:
        """Write the next vectors [n, E]."""
        ...


def embed_folder(
    loaded: Loaded,
    source: Reader | str | Path,
    out: str | Path,
    *,
    modality: Modality = "image",
    batch_size: int = 64,
    workers: int = 0,
) -> Embedded:
    """Embed all images (or all texts) of a folder or other data set into one file.

    Args:
        loaded: the model.
        source: a folder of images, or whatever `data.val` may be; or an open reader.
        out: file to write, whole or not at all: ``.npz`` (arrays `keys`, `vectors`) or ``.parquet`` (columns `key`,
            `vector`).
        modality: what is embedded.
        batch_size: images or texts run at a time.
        workers: processes that decode images; 0 = this one.

    Raises:
        ValueError: the model has no common space, nothing can be read, or the file's form is unknown or needs an extra.
    """
    path, model = Path(out), loaded.model
    _check_suffix(path)
    if model.space() is None:
        raise ValueError("this checkpoint has no common space of images and texts; pretrain it with objective itc")
    reader = open_reader(str(source)) if isinstance(source, str | Path) else source
    bad: dict[str, str] = {}
    data = loaded.config.data.model_copy(update={"image": None, "text": None, "boxes": None, "workers": workers})
    gallery = open_gallery(reader, data, loaded.tokenizer, model.config, bad, texts=modality == "text")
    total = gallery.num_images if modality == "image" else gallery.num_texts
    if total == 0:
        key, reason = next(iter(bad.items()), ("", "no samples"))
        raise ValueError(
            f"embed: none of the {len(reader)} samples has a usable {modality}; the first, '{key}'{place_of(key)}: "
            f"{reason}"
        )
    info = {"model": weights_hash(model), "modality": modality, "data": reader.fingerprint}
    count = 0
    with _sink(path, model.config.embed.width, info) as sink:
        for keys, vectors, broken in _vectors(loaded, gallery, modality, batch_size, total):
            sink.add(keys, vectors)
            count += len(keys)
            bad |= broken
    for key, reason in bad.items():
        logger.warning("left out %s%s: %s", key, place_of(key), reason)
    logger.info("%d vectors in %s", count, path)
    return Embedded(count, bad)


def _vectors(
    loaded: Loaded, gallery: Gallery, modality: Modality, batch_size: int, total: int
) -> Iterator[tuple[list[str], Floats, dict[str, str]]]:
    """Names and vectors of each batch, and what of it could not be used; with a progress bar on a terminal."""
    console = Console(stderr=True)
    starts = range(0, total, batch_size)
    bar = track(starts, "embedding", console=console, disable=not console.is_terminal)
    if modality == "text":
        for first in bar:
            part = gallery.some_texts(range(first, min(first + batch_size, total)))
            yield list(part.captions), embed_texts(loaded.model, part, batch_size).cpu().numpy(), {}
        return
    for _, (index, vectors, broken) in zip(bar, embed_images(loaded.model, gallery, batch_size), strict=True):
        names = gallery.image_keys
        yield [names[n] for n in index], vectors.cpu().numpy(), {names[n]: reason for n, reason in broken.items()}


def search(
    loaded: Loaded, index: Index | str | Path, queries: Sequence[AnyImage | str], k: int = 10
) -> list[list[tuple[str, float]]]:
    """Find the k nearest vectors of each query.

    Args:
        loaded: the model that made the index.
        index: an index, or its file.
        queries: a text; or an image: Pillow's, a ``Path``, or a string that is the path of an image file.
        k: how many.

    Returns:
        For each query (key, cosine) pairs, best first.

    Raises:
        ValueError: the file is no index, was made with other weights, or an image cannot be read.
    """
    opened = index if isinstance(index, Index) else read_index(index)
    if not queries:
        return []
    if opened.info.get("model") != weights_hash(loaded.model):
        raise ValueError(
            f"the index {'' if isinstance(index, Index) else index} was made with other weights, or the same in "
            "another dtype; load the checkpoint that made it, or embed again"
        )
    found = torch.stack([_query(loaded, query) for query in queries])
    scores, nearest = topk_chunked(found, torch.from_numpy(opened.vectors), k)
    return [
        [(str(opened.keys[i]), score) for i, score in zip(row, values, strict=True)]
        for row, values in zip(nearest.tolist(), scores.tolist(), strict=True)
    ]


def _query(loaded: Loaded, query: AnyImage | str) -> torch.Tensor:
    """[E] of a text or an image."""
    if isinstance(query, Image.Image | Path) or _is_image_file(query):
        return loaded.embed_images([query])[0]
    return loaded.embed_texts([query])[0]


def _is_image_file(query: str) -> bool:
    return Path(query).suffix[1:].lower() in IMAGE_EXTENSIONS and Path(query).is_file()


def read_index(path: str | Path) -> Index:
    """Open a file that ``embed_folder`` wrote.

    Raises:
        ValueError: it is missing, of an unknown form, or no index.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise ValueError(f"there is no index '{path}'; write it with vlp embed")
    try:
        return _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:  # pyarrow's own errors derive from these
        reason = " ".join(str(error).split())
        raise ValueError(f"'{path}' is not an index of vlp embed ({reason}); write it again") from error


def _read_npz(path: Path) -> Index:
    with np.load(path, allow_pickle=False) as file:
        return Index(file["keys"].tolist(), file["vectors"], json.loads(str(file[_INFO])))


def _read_parquet(path: Path) -> Index:
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    info = json.loads((table.schema.metadata or {})[_INFO.encode()])
    width = table.schema.field("vector").type.list_size
    flat = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return Index(table.column("key").to_pylist(), np.array(flat, dtype=np.float32).reshape(-1, width), info)


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"index '{path}' should end in {' or '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ValueError(f"index '{path}' needs pyarrow; pip install 'vlp[parquet]', or write .npz") from error


@contextmanager
def _sink(path: Path, width: int, info: dict[str, Any]) -> Iterator[_Sink]:
    """Open a sink for vectors [n, width]; the file appears only when all are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    opened = _npz if path.suffix == ".npz" else _parquet
    try:
        with opened(partial, width, info) as sink:
            yield sink
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _NpzSink:
    def __init__(self, spool: Any) -> None:
        self.spool, self.keys = spool, list[str]()

    def add(self, keys: Sequence[str], vectors: Floats) -> None:
        self.spool.write(np.ascontiguousarray(vectors, dtype="<f4").data)
        self.keys += keys


@contextmanager
def _npz(path: Path, width: int, info: dict[str, Any]) -> Iterator[_Sink]:
    """The array's header holds its length, which is known last: vectors wait in a file of their own."""
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        sink = _NpzSink(spool)
        yield sink
        spool.seek(0)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
            with file.open("vectors.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(sink.keys), width)}
                np.lib.format.write_array_header_1_0(member, header)
                shutil.copyfileobj(spool, member)
            for name, content in (("keys", sink.keys), (_INFO, json.dumps(info))):
                with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.array(content, dtype=np.str_), allow_pickle=False)


@contextmanager
def _parquet(path: Path, width: int, info: dict[str, Any]) -> Iterator[_Sink]:
    import pyarrow
    from pyarrow import parquet

    vector = pyarrow.list_(pyarrow.float32(), width)
    schema = pyarrow.schema({"key": pyarrow.string(), "vector": vector}, {_INFO: json.dumps(info)})
    with parquet.ParquetWriter(path, schema) as writer:

        class ParquetSink:
            def add(self, keys: Sequence[str], vectors: Floats) -> None:
                flat = pyarrow.array(vectors.reshape(-1), pyarrow.float32())
                columns = [pyarrow.array(keys, pyarrow.string()), pyarrow.FixedSizeListArray.from_arrays(flat, width)]
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))

        yield ParquetSink()
