"""`vlp.load`: from a folder, an address or a hub id to a ready model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from objectives import ObjectiveConfig
from vlp.checkpoint.asked import Asked, AuthorsConfig, given_settings, laid_over
from vlp.checkpoint.folder import is_checkpoint
from vlp.checkpoint.foreign import (
    Family,
    Recipe,
    Shapes,
    find_weights,
    first_line,
    read_settings,
    read_state,
    shapes_of,
)
from vlp.checkpoint.migrate import migrate
from vlp.checkpoint.native import CONFIG, holds_average, load_weights, read_config, read_weights
from vlp.checkpoint.sources import TOKENIZER_FILES, local
from vlp.config import Config, ConfigError, Layer, build
from vlp.data.loader import DataConfig
from vlp.data.tokenizer import OPEN_CLIP_FILE, Tokenizer, load_tokenizer
from vlp.loaded import LazyTokenizer, Loaded
from vlp.model import Model, ModelConfig, build_model
from vlp.recipes import lift

logger = logging.getLogger(__name__)

WHICH = ("the moving average of the weights", "the last weights, not their moving average")
"""What was read of a checkpoint that holds both."""


class LoadedConfig(Config):
    """What of a run's config a model needs after training; the run's data need not exist any more."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """What the model is made of."""
    objectives: dict[str, ObjectiveConfig] = Field(default_factory=dict)
    """What it was trained for; their heads answer and match."""
    data: DataConfig = Field(default_factory=DataConfig)
    """How images and texts are prepared."""


class FinetunedConfig(LoadedConfig):
    """That of a finetuning."""

    task: dict[str, Any]
    """Settings of the task that it was finetuned for, as they were stored."""


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    config: AuthorsConfig | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    allow_missing: Iterable[str] = (),
    ignore: Iterable[str] = (),
    average: bool | None = None,
) -> Loaded:
    """Load a model that is ready to embed, match, answer, caption and classify.

    Args:
        source: a checkpoint folder; a run folder (its newest whole checkpoint); a file or folder of another project's
            checkpoint (``vlp inspect`` tells which are known); an address of any of these that fsspec knows
            (``s3://bucket/run``); or a hub id ``owner/name`` or ``owner/name@revision`` (honours ``HF_HUB_OFFLINE``).
        device: where the model goes.
        dtype: of its weights, as torch names it (``"bfloat16"``); None: float32.
        config: of a foreign checkpoint, its configuration in the authors' own keys, where the file does not carry it: a
            mapping, or a JSON or YAML file of one. The report names keys that its family does not read.
        settings: our settings, laid over the stored ones, such as ``{"model": {"vision": {"image_size": 384}}}``.
        tokenizer: of a foreign checkpoint, the folder or hub id of its tokenizer, where it is not the published one.
        allow_missing: patterns of weights that need not be stored.
        ignore: patterns of stored weights to leave out.
        average: True: the moving average of the weights (``train.optim.ema``, file ``ema.safetensors``); False: the
            last ones (``model.safetensors``); None: the average where there is one, as it is what a run's evaluations
            look at and what its best checkpoint is known by. Which it was is the report's first note.

    Raises:
        ValueError: there is no such checkpoint, it is torn, it has no average where one is asked for, or its weights do
            not fit the model; one line.
    """
    place, kind = _device(device), _dtype(dtype)
    rules = Strictness(tuple(allow_missing), tuple(ignore))
    with local(str(source)) as path:
        if is_checkpoint(path) and config is None:
            loaded = _load_own(path, settings, rules, average)
        elif average:
            raise ValueError(f"{source} is no checkpoint of ours, whose average could be read; leave average out")
        else:
            loaded = load_foreign(path, given_settings(config), settings, tokenizer, rules)
    loaded.model.to(device=place, dtype=kind).requires_grad_(False).eval()
    whose = "".join(f"{note}, " for note in loaded.report.notes if note in WHICH)
    logger.info("loaded %s: %s%s", source, whose, loaded.report.summary().splitlines()[0])
    return loaded


@dataclass(frozen=True)
class Strictness:
    """What a checkpoint may lack, and what of it is left out, as patterns."""

    allow_missing: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


def _load_own(folder: Path, settings: Mapping[str, Any] | None, rules: Strictness, average: bool | None) -> Loaded:
    state = read_weights(folder, average=average)  # first, because it finds torn checkpoints
    found = read_loaded_config(folder, settings)
    words: Tokenizer | LazyTokenizer = LazyTokenizer(found.data.tokenizer)  # a converted one may be without its files
    if has_tokenizer(folder):
        words = load_tokenizer(folder)
    size = words.vocabulary.size if isinstance(words, Tokenizer) else None
    model = build_model(found.model, found.objectives, vocabulary_size=size, pretrained=False)
    report = load_weights(model, state, allow_missing=rules.allow_missing, ignore=rules.ignore)
    if holds_average(folder):
        report = replace(report, notes=(WHICH[average is False], *report.notes))
    return Loaded(model, words, found, report)


def load_foreign(
    path: Path,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    rules: Strictness = Strictness(),
) -> Loaded:
    """Load another project's checkpoint, a file or a folder.

    Raises:
        ValueError: no family recognises it, or its weights do not fit what its family's recipe builds; one line.
    """
    weights = find_weights(path)
    state = read_state(weights)
    shapes = shapes_of(state)
    family, recipe = describe(path, weights, shapes, config or {})
    with _whole(path, family):
        found = settled(recipe, family, settings or {})
        model = build_model(found.model, found.objectives, pretrained=False)
        renamed = family.rename(state)
    report = load_weights(
        model,
        {**renamed.state, **{name: state[name] for name in renamed.unexpected}},
        allow_missing=rules.allow_missing,
        ignore=(*rules.ignore, *unread(model)),
    )
    notes = (f"family {family.name}", *recipe.assumed)
    left = tuple(f"{name} ({reason})" if reason else name for name, reason in renamed.ignored.items())
    report = replace(report, ignored=(*report.ignored, *left), notes=(*notes, *report.notes))
    words = found.data.tokenizer
    if tokenizer is not None:
        words = words.model_copy(update={"source": str(tokenizer)})
    beside = weights.parent if tokenizer is None and has_tokenizer(weights.parent) else None
    return Loaded(model, LazyTokenizer(words, beside), found, report)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in (*TOKENIZER_FILES, OPEN_CLIP_FILE))


def describe(path: Path, weights: Path, shapes: Shapes, config: Mapping[str, Any]) -> tuple[Family, Recipe]:
    """Return the family of a foreign checkpoint and what it is in our words; what was assumed is said in full.

    Args:
        path: as it was named, for messages.
        weights: its file of weights, beside which its settings lie.
        shapes: of the weights.
        config: further settings in the authors' keys, over those.

    Raises:
        ValueError: no family knows it, or it is not whole; one line.
    """
    theirs = Asked(laid_over(read_settings(weights), config))
    family = recognise(shapes, theirs, path)
    with _whole(path, family):
        recipe = family.recipe(shapes, theirs)
    notes = (*(f"assumed: {one}" for one in recipe.assumed), *theirs.unread(config))
    return family, Recipe(recipe.tree, notes)


def settled(recipe: Recipe, family: Family, settings: Mapping[str, Any]) -> LoadedConfig:
    """Return a foreign checkpoint's config, with our settings over it.

    Raises:
        ValueError: the settings are wrong, or the file's sizes are no model's; one line.
    """
    try:
        return build(LoadedConfig, Layer(recipe.tree, f"{family.name} checkpoint"), Layer(settings, "settings="))
    except ConfigError as error:
        raise ValueError("; ".join(error.problems)) from error


def unread(model: Model) -> tuple[str, ...]:
    """Return patterns of the fusion's weights that a checkpoint may hold and the model lacks, as nobody reads them."""
    if model.fusion is None:
        return ()
    pooler = () if model.fusion.pooler is not None and list(model.fusion.pooler.parameters()) else ("pooler.*",)
    return tuple(f"fusion.{part}" for part in (*getattr(model.fusion, "unread", ()), *pooler))


@contextmanager
def _whole(path: Path, family: Family) -> Iterator[None]:
    """Say in one line that a checkpoint is not whole: a family's functions expect what a whole one holds."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        if isinstance(error, ValueError) and "\n" not in str(error):
            raise  # in words already; pydantic's take several lines
        reason = f"{type(error).__name__}: {' '.join(first_line(error).split())}"
        raise ValueError(
            f"cannot load {path}: it looks like a {family.name} checkpoint but is not whole, or needs config= "
            f"({reason}); copy it again, or give the authors' settings"
        ) from error


def recognise(shapes: Shapes, config: Mapping[str, Any], path: Path) -> Family:
    """Return the family of a checkpoint.

    Raises:
        ValueError: none knows it.
    """
    from vlp.checkpoint.families import FAMILIES

    for family in FAMILIES:
        if family.recognise(shapes, config):
            return family
    names = ", ".join(list(shapes)[:3])
    raise ValueError(
        f"cannot load {path}: its weights ({names}, ...) are of no family that vlp reads "
        f"({', '.join(sorted({one.name for one in FAMILIES}))}); convert it, or give a vlp checkpoint"
    )


def read_loaded_config(folder: Path, over: Mapping[str, Any] | None = None) -> LoadedConfig:
    """Return the stored config, lifted from older formats, with the settings ``over`` laid over it.

    Raises:
        ValueError: it has fields that this version does not know, or values that it does not take.
    """
    source = str(folder / CONFIG)
    tree = lift(read_config(folder), source, migrate)
    cls = FinetunedConfig if tree.get("task") else LoadedConfig
    kept = {name: value for name, value in tree.items() if name in cls.model_fields}
    return build(cls, Layer(kept, source), Layer(over or {}, "settings="))


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {str(device)!r} cannot be used here: {first_line(error)}; use cpu") from error
    return place


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and (not isinstance(found, torch.dtype) or not found.is_floating_point):
        raise ValueError(f"dtype {str(dtype)!r} cannot be used; use float32, bfloat16 or float16")
    return found
