"""Our own checkpoint: a folder of weights, config tree, tokenizer and model card.

Weights that several parts share are stored once, under the first of their names, and come back shared because the
model that is built from the config shares them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from encoders.positions import PositionResize, resize_positions
from vlp.checkpoint.folder import CARD, check_whole, checkpoint_folder, find_checkpoint, replace_folder
from vlp.checkpoint.migrate import lift_names
from vlp.config import FORMAT, Config, to_yaml
from vlp.recipes import dump_yaml, read_tree

__all__ = [
    "LoadReport",
    "aliases",
    "checkpoint_folder",
    "find_checkpoint",
    "load_weights",
    "read_config",
    "read_weights",
    "save_checkpoint",
    "weights_of",
    "write_tensors",
]

WEIGHTS = "model.safetensors"
AVERAGE = "ema.safetensors"
CONFIG = "config.yaml"
MOST = 3
"""Names or problems that a message lists before it counts."""


class Saves(Protocol):
    """A tokenizer, or anything else that writes itself to a folder."""

    def save(self, folder: Path) -> None:
        """Write the files from which it can be loaded."""
        ...


@dataclass(frozen=True)
class LoadReport:
    """What became of every weight, by name."""

    loaded: tuple[str, ...] = ()
    """Taken as they were stored."""
    resized: tuple[str, ...] = ()
    """Position embeddings that were interpolated to another image size."""
    converted: tuple[str, ...] = ()
    """Stored in another dtype than the model's."""
    missing: tuple[str, ...] = ()
    """The model's, not stored: they keep their initial values."""
    unexpected: tuple[str, ...] = ()
    """Stored, not the model's."""
    ignored: tuple[str, ...] = ()
    """Stored, and left out on purpose."""
    notes: tuple[str, ...] = field(default=())
    """What the loader assumed."""

    def summary(self) -> str:
        """Return the counts in one line, then a line for each kind of weight that is worth a look."""
        kinds = ("loaded", "resized", "converted", "missing", "unexpected", "ignored")
        names = {kind: getattr(self, kind) for kind in kinds}
        first = ", ".join(f"{len(found)} {kind}" for kind, found in names.items() if found or kind == "loaded")
        rest = [f"{kind}: {_some(found)}" for kind, found in names.items() if found and kind != "loaded"]
        return "\n".join([first, *rest, *self.notes])


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    tree: Config | Mapping[str, Any],
    tokenizer: Saves,
    card: str,
    extra: Mapping[str, bytes | Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all; an existing one is replaced.

    Args:
        folder: to write.
        model: its weights, shared ones once.
        tree: the resolved config of the run.
        tokenizer: saves itself.
        card: the model card.
        extra: further files by name, as bytes or as named tensors (``*.safetensors``); a checkpoint loads
            without them.
    """
    with replace_folder(Path(folder), optional=extra or ()) as partial:
        tokenizer.save(partial)
        write_tensors(partial / WEIGHTS, weights_of(model))
        text = to_yaml(tree) if isinstance(tree, Config) else dump_yaml({"format": FORMAT, **tree})
        (partial / CONFIG).write_text(text, encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
        for name, content in (extra or {}).items():
            assert name not in (WEIGHTS, CONFIG, CARD), f"{name} is written by save_checkpoint itself"
            if isinstance(content, bytes):
                (partial / name).write_bytes(content)
            else:
                write_tensors(partial / name, content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors; equal tensors give equal bytes."""
    # One entry of metadata: safetensors keeps several in no fixed order.
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    path.touch()
    mode = path.stat().st_mode  # safetensors leaves a file that only its owner can read
    save_file(ready, path, metadata={"format": "pt"})
    path.chmod(mode)


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each weight by its first name."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {names[0]: names for names in groups.values()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name, shared ones once, by the first of their names."""
    state = model.state_dict()
    return {name: state[name] for name in aliases(model)}


def holds_average(folder: str | Path) -> bool:
    """Whether a checkpoint folder holds the moving average of the weights beside the last ones: ``ema.safetensors``."""
    return (Path(folder) / AVERAGE).is_file()


def read_weights(folder: str | Path, verify: bool = False, average: bool | None = False) -> dict[str, Tensor]:
    """Return the stored weights by name, on the CPU.

    Args:
        folder: a checkpoint folder, checked against its manifest.
        verify: hash large files too.
        average: the moving average of the weights (``train.optim.ema``) instead, which is what evaluations look at;
            None: where there is one.

    Raises:
        ValueError: the checkpoint is torn, where the message names a whole one beside it; or it holds no average.
    """
    folder = Path(folder)
    check_whole(folder, verify)
    average = holds_average(folder) if average is None else average
    name = AVERAGE if average else WEIGHTS
    if average and not holds_average(folder):
        raise ValueError(f"checkpoint {folder} holds no average of its weights; train with train.optim.ema 0.999, say")
    try:
        return lift_names(load_file(folder / name))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder}: {name} cannot be read: {error}; write or copy it again") from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the stored config tree as it is, its `format` included.

    Raises:
        ValueError: the file is missing or is no YAML mapping.
    """
    return read_tree(Path(folder) / CONFIG)


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    strict: bool = True,
    allow_missing: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> LoadReport:
    """Copy stored weights into a model, in its dtype and on its device; shared weights stay shared.

    The vision encoder's position embedding is interpolated where the image size differs; its config says how.

    Args:
        model: to fill.
        state: weights by name, shared ones under any of their names.
        strict: refuse weights that are missing or unexpected.
        allow_missing: patterns (``objectives.answer.*``) of the model's weights that need not be stored.
        ignore: patterns of stored weights to leave out.

    Raises:
        ValueError: weights are missing or unexpected (when strict), of another shape, or stored twice with different
            values; all in one line. The model is unchanged then.
    """
    targets = model.state_dict()
    # A momentum teacher may hold parts that this model's teacher has no use for, or have no student here.
    skip = _matching(state, ignore) | {name for name in state if name.startswith("teacher.") and name not in targets}
    given = {name: tensor for name, tensor in state.items() if name not in skip}
    vision = getattr(getattr(model, "vision", None), "config", None)
    method: PositionResize = getattr(vision, "position_resize", "bicubic_antialias")
    fit = _fit(model, targets, given, method)
    unexpected = [name for name in given if name not in targets]
    refused = [name for name in fit.missing if name not in _matching(fit.missing, allow_missing)]
    problems = list(fit.problems)
    if strict and refused:
        problems.append(f"missing {_some(refused)} (allow_missing={_pattern(refused)!r} keeps their initial values)")
    if strict and unexpected:
        problems.append(f"unexpected {_some(unexpected)} (the model has no such part)")
    if problems:
        more = f"; and {len(problems) - MOST} more" if len(problems) > MOST else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(problems[:MOST])}{more}")
    converted = [name for name, tensor in fit.filled.items() if tensor.dtype != targets[name].dtype]
    model.load_state_dict(fit.filled, strict=False)
    _fill_teacher(model, fit.missing)
    loaded = tuple(name for name in fit.filled if name not in {*fit.resized, *converted})
    notes = (f"position embeddings resized by {method} interpolation",) if fit.resized else ()
    left = tuple(sorted(skip))
    return LoadReport(loaded, tuple(fit.resized), tuple(converted), tuple(fit.missing), tuple(unexpected), left, notes)


@dataclass(frozen=True)
class _Fit:
    """What stored weights are to a model: by the first of each weight's names there."""

    filled: dict[str, Tensor] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _fit(model: nn.Module, targets: Mapping[str, Tensor], given: Mapping[str, Tensor], method: PositionResize) -> _Fit:
    """Lay stored weights beside a model's, positions of another image size interpolated."""
    found = _Fit()
    for first, names in aliases(model).items():
        stored = [name for name in names if name in given]
        if not stored:
            found.missing.append(first)
            continue
        tensor, wanted = given[stored[0]], targets[first]
        found.problems.extend(
            f"{stored[0]} and {other} differ, but the model shares them"
            for other in stored[1:]
            if not torch.equal(given[other], tensor)
        )
        if tensor.shape != wanted.shape:
            # A part that knows what its table means resizes it itself (relative positions).
            own = getattr(model.get_submodule(first.rpartition(".")[0]), "resized", None)
            fitted = _resize(first, tensor, wanted, method) if own is None else own(tensor)
            if fitted is not None:
                tensor = fitted
                found.resized.append(first)
        if tensor.shape != wanted.shape:
            found.problems.append(f"{first} is {tuple(tensor.shape)}, the model's is {tuple(wanted.shape)}")
        found.filled[first] = tensor
    return found


def _fill_teacher(model: nn.Module, missing: Iterable[str]) -> None:
    """A momentum teacher that was not stored begins as its student."""
    teacher = getattr(model, "teacher", None)
    if teacher is not None:
        teacher.copy_from(model, {name.removeprefix("teacher.") for name in missing if name.startswith("teacher.")})


def _matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def _pattern(names: list[str]) -> str:
    """The narrowest dotted prefix of all names as a pattern."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join([*common, "*"])


def _resize(name: str, stored: Tensor, wanted: Tensor, method: PositionResize) -> Tensor | None:
    """Position embedding [1, prefix + n * n, D] of a ViT at another image size; None where it is something else."""
    if (
        name.removeprefix("teacher.") != "vision.vit.pos_embed"
        or stored.dim() != 3
        or stored.shape[2] != wanted.shape[2]
    ):
        return None
    prefix = stored.shape[1] - math.isqrt(stored.shape[1]) ** 2  # squares lie further apart than a few prefix tokens
    after = math.isqrt(wanted.shape[1] - prefix)
    if after * after != wanted.shape[1] - prefix or stored.shape[1] <= prefix:
        return None
    return resize_positions(stored, (after, after), prefix, method)
