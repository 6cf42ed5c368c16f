"""Foreign checkpoints: what a family's file says, how it is recognised, and what its weights are called here.

A family is one file beside this one with one :class:`Family`; ``families.py`` lists them.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlp.checkpoint.script import is_script, read_script

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shape of every stored tensor by its name there."""
State: TypeAlias = Mapping[str, Tensor]

WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "model.pth",
    "model.ckpt",
    "model.pt",
)
CONFIG_FILES = ("config.json", "open_clip_config.json")
PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
"""Transformers' image processor alone, and, since transformers 5, together with the other halves of a processor."""
_STATE_KEYS = ("model", "state_dict", "module", "model_state_dict")
"""Where pickled checkpoints keep their weights."""


@dataclass(frozen=True)
class Recipe:
    """What a foreign checkpoint is in our words."""

    tree: dict[str, Any]
    """Settings of model, objectives and data, as a recipe would state them."""
    assumed: tuple[str, ...] = ()
    """What neither the file nor ``config=`` said and the family's published literals did."""


@dataclass(frozen=True)
class Renamed:
    """Weights under our names, and what became of the others."""

    state: dict[str, Tensor]
    ignored: dict[str, str] = field(default_factory=dict)
    """Left out on purpose: name there -> reason."""
    unexpected: tuple[str, ...] = ()
    """Names there that the family does not know."""


@dataclass(frozen=True)
class Family:
    """A family of checkpoints; all its functions are pure."""

    name: str
    recognise: Callable[[Shapes, Mapping[str, Any]], bool]
    """(shapes, config in the authors' keys) -> whether it is of this family."""
    recipe: Callable[[Shapes, Mapping[str, Any]], Recipe]
    """(shapes, config in the authors' keys) -> what it is here."""
    rename: Callable[[State], Renamed]
    """Weights under the authors' names -> under ours; differentiable."""


@dataclass(frozen=True)
class Rule:
    """What becomes of the names that match ``pattern`` as a whole; the first rule that matches decides."""

    pattern: str
    to: str | tuple[str, ...] | None = None
    """Template of our name; several = the tensor is cut into as many equal parts along axis 0; None = left out."""
    reason: str = ""
    """Why it is left out."""
    convert: Callable[[Tensor], Tensor] | None = None
    """Applied to the tensor before it is cut (a transpose, another scale)."""


def rename_by(rules: Sequence[Rule], state: State) -> Renamed:
    """Rename by the first rule that matches each name.

    Raises:
        ValueError: two names become one of ours, and their values differ.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    found = Renamed({})
    unexpected = []
    for name, tensor in state.items():
        match, rule = next(((m, rule) for regex, rule in compiled if (m := regex.fullmatch(name))), (None, None))
        if match is None or rule is None:
            unexpected.append(name)
        elif rule.to is None:
            found.ignored[name] = rule.reason
        else:
            value = tensor if rule.convert is None else rule.convert(tensor)
            targets = (rule.to,) if isinstance(rule.to, str) else rule.to
            for target, part in zip(targets, value.chunk(len(targets)) if len(targets) > 1 else (value,), strict=True):
                _put(found.state, match.expand(target), part, name)
    return Renamed(found.state, found.ignored, tuple(unexpected))


def _put(state: dict[str, Tensor], ours: str, tensor: Tensor, name: str) -> None:
    """Add a tensor; a second copy of a shared weight must be equal and is dropped."""
    if ours in state and not torch.equal(state[ours], tensor):
        raise ValueError(f"{name} and another stored weight are both {ours} here, but differ; the file is not whole")
    state.setdefault(ours, tensor)


def find_weights(path: Path) -> Path:
    """Return the file of weights: ``path`` itself, or the one in this folder.

    Raises:
        ValueError: the folder holds none, or none in one piece.
    """
    if path.is_file():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    single = sorted(one for one in path.glob("*") if one.suffix in (".safetensors", ".pth", ".ckpt", ".pt", ".bin"))
    if len(single) != 1:
        raise ValueError(f"cannot load {path}: {len(single)} files of weights in the folder; name the file itself")
    return single[0]


def read_settings(weights: Path) -> dict[str, Any]:
    """Return the config.json (or open_clip_config.json) beside the weights, {} if there is none.

    A preprocessor_config.json beside it, or the image's half of a processor_config.json, is its entry
    "preprocessor_config".

    Raises:
        ValueError: one of them is no JSON mapping.
    """
    files = [weights.parent / name for name in CONFIG_FILES]
    found = next((_read_mapping(path) for path in files if path.is_file()), {})
    if (path := weights.parent / PREPROCESSOR_FILE).is_file():
        found["preprocessor_config"] = _read_mapping(path)
    elif (path := weights.parent / PROCESSOR_FILE).is_file():
        image = _read_mapping(path).get("image_processor")
        found |= {"preprocessor_config": image} if isinstance(image, dict) else {}
    return found


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"cannot load {path}: it is no JSON ({error}); write or copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"cannot load {path}: a mapping was expected, not {type(found).__name__}")
    return found


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the stored weights by name, memory-mapped where the format allows it; nothing of a pickle is executed.

    Raises:
        ValueError: the file cannot be read, or holds something else than named tensors; one line.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"cannot load {path}: {first_line(error)}; write or copy it again") from error
    return _named_tensors(_unpickle(path), path)


def _unpickle(path: Path) -> Any:
    try:
        if _is_zip(path):
            if is_script(path):
                return read_script(path)
            _refuse_bomb(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch raises whatever the damaged pickle makes its readers raise
        reason = first_line(error)
        if reason.startswith("Weights only load failed"):  # torch goes on with advice to execute it
            reason = "it is damaged, or holds more than tensors (a pickle can run code)"
        elif isinstance(error, LookupError | pickle.UnpicklingError | EOFError):  # of bytes that are no pickle: "101"
            reason = f"it is no file of weights, or damaged ({type(error).__name__}: {reason})"
        raise ValueError(f"cannot load {path}: {reason}; nothing of it was executed") from error


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive that expands: torch stores tensors uncompressed."""
    with ZipFile(path) as archive:
        inside = sum(entry.file_size for entry in archive.infolist())
    if inside > path.stat().st_size:
        raise ValueError(f"its {path.stat().st_size:,} bytes would expand to {inside:,}; no checkpoint does")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the weights in what a pickled checkpoint holds; ``module.`` of a data-parallel wrapper is taken off."""
    for key in _STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {name: one for name, one in content.items() if isinstance(one, Tensor)} if _is_state(content) else {}
    if not tensors:
        raise ValueError(f"cannot load {path}: it holds no named tensors; give the file of the model's weights")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): one for name, one in tensors.items()}
    return tensors


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and all(isinstance(name, str) for name in content)


def first_line(error: Exception) -> str:
    """An error's first line, cut: torch's messages are long."""
    return (next(iter(str(error).strip().splitlines()), "") or type(error).__name__)[:200]


def names_there(names: Iterable[str], renamed: State, state: State) -> tuple[str, ...]:
    """Return what weights are called in their file that a family has called otherwise on its way.

    Args:
        names: of some of them, on the way.
        renamed: the weights on the way, the very tensors of the file.
        state: the weights as they are stored.
    """
    stored = {id(tensor): name for name, tensor in state.items()}
    return tuple(name if name in state else stored[id(renamed[name])] for name in names)


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def count_layers(shapes: Shapes, pattern: str) -> int:
    r"""Return one more than the largest number that ``pattern``'s first group matches at the start of a name; 0 = none.

    ``count_layers(shapes, r"visual_encoder\.blocks\.(\d+)\.")`` is the depth of that tower.
    """
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1
