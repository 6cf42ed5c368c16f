"""Weights in a TorchScript archive, as OpenAI published its CLIP models, without running the program in it.

Such an archive is a zip of a pickle, the tensors' bytes and code. The pickle names modules of that code, and tensors;
here every module becomes a plain holder of its attributes, and nothing but that, tensors and lists can be made.
"""

from __future__ import annotations

import mmap
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
_LOCAL_HEADER, _NAME_LENGTHS = 30, 26


def is_script(path: Path) -> bool:
    """Return whether a zip archive is a TorchScript one."""
    with ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def read_script(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive by the names of its state dict, memory-mapped.

    Raises:
        pickle.UnpicklingError: the archive wants something else to be made than modules and tensors.
        LookupError, ValueError, struct.error: it is damaged.
    """
    with ZipFile(path) as archive, path.open("rb") as file:
        root = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        _refuse_compressed(archive, root)
        with archive.open(root) as pickled:
            module = _Reader(pickled, archive, content, root.removesuffix(".pkl")).load()
    found: dict[str, Tensor] = {}
    _collect(module, "", found, set())
    return found


class _Module:
    """Any module of the archive's program: its attributes alone."""


class _Reader(pickle.Unpickler):
    def __init__(self, pickled: Any, archive: ZipFile, content: mmap.mmap, folder: str) -> None:
        super().__init__(pickled)
        self.archive, self.content, self.folder = archive, content, folder

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in _LISTS:
            return _first
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need")

    def persistent_load(self, reference: Any) -> Tensor:
        kind, dtype, key, _, length = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it asks for a {kind!r}, which no weights need")
        if length == 0:
            return torch.empty(0, dtype=dtype)
        start = _refuse_compressed(self.archive, f"{self.folder}/{key}")
        name, extra = struct.unpack_from("<HH", self.content, start + _NAME_LENGTHS)
        # A view of the mapped file; a length beyond its end is refused here.
        return torch.frombuffer(self.content, dtype=dtype, count=length, offset=start + _LOCAL_HEADER + name + extra)


def _refuse_compressed(archive: ZipFile, name: str) -> int:
    """Where an entry's header begins; torch compresses the code alone, and what expands may be a bomb."""
    entry = archive.getinfo(name)
    if entry.compress_type != ZIP_STORED:
        raise pickle.UnpicklingError(f"its {name} is compressed, which torch does not do")
    return entry.header_offset


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


def _collect(module: Any, prefix: str, found: dict[str, Tensor], seen: set[int]) -> None:
    """Add the tensors among a module's attributes and in the modules below it, each module once."""
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Module) and id(value) not in seen:
            _collect(value, f"{prefix}{name}.", found, seen)
