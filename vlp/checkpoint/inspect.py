"""What a checkpoint is, told from its names, shapes and config alone: nothing is built and no weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vlp.checkpoint.folder import is_checkpoint
from vlp.checkpoint.foreign import Shapes, find_weights, first_line, read_settings, read_state, shapes_of
from vlp.checkpoint.load import LoadedConfig, read_loaded_config, recognise
from vlp.checkpoint.native import WEIGHTS
from vlp.checkpoint.sources import local
from vlp.config import Layer, build


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds."""

    family: str
    """Whose format it is; "vlp" for our own."""
    config: LoadedConfig
    """What it is in our words."""
    parameters: int
    """Stored values, copies of shared weights included."""
    tensors: int
    abilities: tuple[str, ...]
    """What a loaded model of it can do."""
    assumed: tuple[str, ...] = ()
    """What the file does not say and the family's published literals do."""


def inspect(source: str | Path, config: Mapping[str, Any] | None = None) -> Inspection:
    """Tell what a checkpoint is.

    Args:
        source: as ``vlp.load`` takes it.
        config: of a foreign checkpoint, its configuration in the authors' own keys.

    Raises:
        ValueError: it cannot be read, or no family knows it.
    """
    with local(str(source)) as path:
        if is_checkpoint(path):
            return _tell("vlp", read_loaded_config(path), _read_shapes(path / WEIGHTS))
        weights = find_weights(path)
        shapes = _read_shapes(weights)
        theirs = {**read_settings(weights), **(config or {})}
        family = recognise(shapes, theirs, path)
        recipe = family.recipe(shapes, theirs)
        found = build(LoadedConfig, Layer(recipe.tree, f"{family.name} checkpoint"))
        return _tell(family.name, found, shapes, recipe.assumed)


def _read_shapes(path: Path) -> Shapes:
    if path.suffix != ".safetensors":
        return shapes_of(read_state(path))  # memory-mapped: only names and shapes are read
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}; write or copy it again") from error


def _tell(family: str, config: LoadedConfig, shapes: Shapes, assumed: tuple[str, ...] = ()) -> Inspection:
    count = sum(math.prod(shape) for shape in shapes.values())
    return Inspection(family, config, count, len(shapes), abilities(config), assumed)


def abilities(config: LoadedConfig) -> tuple[str, ...]:
    """Name what a model of these objectives can do, as the methods of ``Loaded`` are called."""
    objectives = config.objectives.values()
    kinds = {one.kind for one in objectives}
    memories = {getattr(one, "memory", None) for one in objectives if one.kind == "lm"}
    images = getattr(config.model.fusion, "images", "one")
    known = {
        "embed_images, embed_texts, classify": any(one.trains_embed for one in objectives),
        "match": bool(kinds & {"itm", "rank"}),
        "answer": ("answer" in kinds and images == "one") or "fused" in memories,
        "caption": "image" in memories,
    }
    return tuple(name for name, has in known.items() if has)
