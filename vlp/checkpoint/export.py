"""`vlp convert`: a loaded model into the formats of other libraries, or into a checkpoint folder of ours.

A family adds its way back with one :class:`Exporter` in a file of its own and one line in ``exporters.py``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlp.checkpoint.card import model_card
from vlp.checkpoint.folder import replace_folder
from vlp.checkpoint.native import save_checkpoint, weights_of, write_tensors

if TYPE_CHECKING:
    from vlp.data.transforms import ImageTransformConfig
    from vlp.loaded import Loaded

logger = logging.getLogger(__name__)

OWN = "vlp"


@dataclass(frozen=True)
class Exported:
    """A model in another format's words."""

    state: Mapping[str, Tensor]
    """Weights under their names."""
    config: Mapping[str, Any]
    """Their config file."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further JSON files by name."""
    save_words: Callable[[Path], None] | None = None
    """Writes the tokenizer's files, where it cannot do so itself in the way that they are read there."""
    left_out: tuple[str, ...] = ()
    """Our weights that the format has no place for, and settings, in words."""


@dataclass(frozen=True)
class Exporter:
    """A way from our models to another format."""

    name: str
    """Of the family, as its loader's."""
    to: str
    """Which library reads it: the value of ``--to``."""
    problem: Callable[[Loaded], str | None]
    """Why a model cannot be said in this format; None: it can."""
    back: Callable[[Mapping[str, Tensor], Loaded], Exported]
    """(weights under our names, the model) -> the same under theirs; the inverse of the family's ``rename``."""
    weights: str = "model.safetensors"
    """File of the weights; one that does not end so is a pickle."""
    key: str = "model"
    """Where a pickle holds them."""
    settings: str = "config.json"
    """File of the config."""


def convert(loaded: Loaded, target: str | Path, to: str, command: str = "") -> tuple[str, ...]:
    """Write a model into a new folder in another format.

    Args:
        loaded: the model.
        target: folder to write; it must not exist, or be empty.
        to: "vlp", or what an exporter is ``to``.
        command: that is recorded in our model card.

    Returns:
        Weights that the format has no place for, by our names, and settings that it cannot say, in words.

    Raises:
        ValueError: the format cannot hold the model, or the target is taken; one line.
    """
    folder = Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name a new folder")
    if to == OWN:
        _save_own(loaded, folder, command)
        return ()
    exporter = choose(loaded, to)
    exported = exporter.back(weights_of(loaded.model), loaded)
    with replace_folder(folder, manifest=False) as partial:
        if exporter.weights.endswith(".safetensors"):
            write_tensors(partial / exporter.weights, exported.state)
        else:
            torch.save({exporter.key: dict(exported.state)}, partial / exporter.weights)
        for name, content in {exporter.settings: exported.config, **exported.files}.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (exported.save_words or _Words(loaded).save)(partial)
    return exported.left_out


_LOOK = ("resize", "interpolation", "antialias", "resampler", "crop", "crop_share", "multiple", "max_patches", "fill")
"""Settings of `data.transform` that an image is evaluated by."""


def other_look(ours: ImageTransformConfig, read: ImageTransformConfig) -> tuple[str, ...]:
    """Return the settings of ``data.transform`` that the readers of a format have otherwise, in words.

    Args:
        ours: what images go through here.
        read: what they go through there, as the written settings say it.
    """
    cut = ours.resize == "shortest" and ours.crop != "none"
    skip = {name for name, moot in {"crop": not cut, "fill": ours.resize != "longest"}.items() if moot}
    return tuple(
        f"data.transform.{name} {getattr(ours, name)} (it has {getattr(read, name)})"
        for name in _LOOK
        if name not in skip and getattr(ours, name) != getattr(read, name)
    )


def formats() -> tuple[str, ...]:
    """Return the values that ``to`` may have."""
    from vlp.checkpoint.exporters import EXPORTERS

    return (OWN, *dict.fromkeys(one.to for one in EXPORTERS))


def choose(loaded: Loaded, to: str) -> Exporter:
    """Return the exporter for a model.

    Raises:
        ValueError: there is none; the message says what each lacks.
    """
    from vlp.checkpoint.exporters import EXPORTERS

    problems = []
    for exporter in EXPORTERS:
        if exporter.to != to:
            continue
        problem = exporter.problem(loaded)
        if problem is None:
            return exporter
        problems.append(f"{exporter.name}: {problem}")
    if not problems:
        raise ValueError(f"--to {to}: unknown format; known are {', '.join(formats())}")
    raise ValueError(f"no format of {to} holds this model ({'; '.join(problems)}); use --to {OWN}")


def _save_own(loaded: Loaded, folder: Path, command: str) -> None:
    """Write a checkpoint of ours; without a tokenizer at hand its config names where that is published."""
    model = loaded.model
    tree = loaded.config.model_copy(update={"model": model.config, "objectives": model.objective_configs})
    save_checkpoint(folder, model, tree, _Words(loaded), model_card(tree, {}, command, model))


@dataclass(frozen=True)
class _Words:
    """The tokenizer of a loaded model, which may not be here."""

    loaded: Loaded

    def save(self, folder: Path) -> None:
        """Write its files, or warn."""
        try:
            tokenizer = self.loaded.tokenizer
        except ValueError as error:
            logger.warning("no tokenizer is written: %s", error)
        else:
            tokenizer.save(folder)
