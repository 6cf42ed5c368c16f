"""What a checkpoint is, told from its names, shapes and config alone: nothing is built and no weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vlp.checkpoint.asked import AuthorsConfig, given_settings
from vlp.checkpoint.folder import is_checkpoint
from vlp.checkpoint.foreign import Shapes, find_weights, first_line, read_state, shapes_of
from vlp.checkpoint.load import LoadedConfig, describe, has_tokenizer, read_loaded_config, settled
from vlp.checkpoint.native import WEIGHTS
from vlp.checkpoint.sources import local
from vlp.loaded import ABILITIES, abilities


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
    """What a loaded model of it can do with what is here: without a tokenizer no more than to embed images."""
    words: str | None
    """Where its tokenizer is; None: nowhere."""
    assumed: tuple[str, ...] = ()
    """What the file does not say and the family's published literals do, and settings that were given in vain."""


def inspect(source: str | Path, config: AuthorsConfig | None = None) -> Inspection:
    """Tell what a checkpoint is.

    Args:
        source: as ``vlp.load`` takes it.
        config: of a foreign checkpoint, its configuration in the authors' own keys, or a file of it.

    Raises:
        ValueError: it cannot be read, or no family knows it.
    """
    with local(str(source)) as path:
        if is_checkpoint(path):
            return _tell("vlp", read_loaded_config(path), _read_shapes(path / WEIGHTS), path)
        weights = find_weights(path)
        shapes = _read_shapes(weights)
        family, recipe = describe(path, weights, shapes, given_settings(config))
        found = settled(recipe, family, {})
        return _tell(family.name, found, shapes, weights.parent, recipe.assumed)


def _read_shapes(path: Path) -> Shapes:
    if path.suffix != ".safetensors":
        return shapes_of(read_state(path))  # memory-mapped: only names and shapes are read
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}; write or copy it again") from error


def _tell(family: str, config: LoadedConfig, shapes: Shapes, folder: Path, assumed: tuple[str, ...] = ()) -> Inspection:
    count = sum(math.prod(shape) for shape in shapes.values())
    words = _words(config, folder)
    can = abilities(config) if words is not None else abilities(config) & {"embed_images"}
    return Inspection(family, config, count, len(shapes), tuple(one for one in ABILITIES if one in can), words, assumed)


def _words(config: LoadedConfig, folder: Path) -> str | None:
    """Where the tokenizer is; None: nowhere."""
    source = config.data.tokenizer.source
    if has_tokenizer(folder):
        return "beside the weights"
    return None if source == "train" else f"{source}, which is read when text first comes (a hub id: from its cache)"
