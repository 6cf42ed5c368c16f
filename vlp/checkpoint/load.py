"""`vlp.load`: from a folder, an address or a hub id to a ready model."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from objectives import ObjectiveConfig
from vlp.checkpoint.folder import MANIFEST, find_checkpoint, is_checkpoint, manifest_files
from vlp.checkpoint.migrate import migrate
from vlp.checkpoint.native import CONFIG, load_weights, read_config, read_weights
from vlp.config import Config, Layer, build
from vlp.data.loader import DataConfig
from vlp.data.tokenizer import load_tokenizer
from vlp.loaded import Loaded
from vlp.model import ModelConfig, build_model
from vlp.recipes import lift

logger = logging.getLogger(__name__)

LOADABLE = "give a checkpoint or run folder of vlp, an address of one (s3://...), or its id on the hub (owner/name)"


class LoadedConfig(Config):
    """What of a run's config a model needs after training; the run's data need not exist any more."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """What the model is made of."""
    objectives: dict[str, ObjectiveConfig] = Field(default_factory=dict)
    """What it was trained for; their heads answer and match."""
    data: DataConfig = Field(default_factory=DataConfig)
    """How images and texts are prepared."""


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    allow_missing: Iterable[str] = (),
    ignore: Iterable[str] = (),
    average: bool = False,
) -> Loaded:
    """Load a model that is ready to embed, match, answer, caption and classify.

    Args:
        source: a checkpoint folder; a run folder (its newest whole checkpoint); an address of either that fsspec knows
            (``s3://bucket/run``); or a hub id ``owner/name`` or ``owner/name@revision`` (honours ``HF_HUB_OFFLINE``).
        device: where the model goes.
        dtype: of its weights, as torch names it (``"bfloat16"``); None: float32.
        config: settings laid over the stored ones, such as ``{"model": {"vision": {"image_size": 384}}}``.
        allow_missing: patterns of weights that need not be stored.
        ignore: patterns of stored weights to leave out.
        average: take the moving average of the weights (``train.optim.ema``) instead of the last ones.

    Raises:
        ValueError: there is no such checkpoint, it is torn, or its weights do not fit the model; one line.
    """
    place, kind = _device(device), _dtype(dtype)
    with _local(str(source)) as folder:
        state = read_weights(folder, average=average)  # first, because it finds torn checkpoints
        settings = read_loaded_config(folder, config)
        tokenizer = load_tokenizer(folder)
        size = tokenizer.vocabulary.size
        model = build_model(settings.model, settings.objectives, vocabulary_size=size, pretrained=False)
        report = load_weights(model, state, allow_missing=allow_missing, ignore=ignore)
    model.to(device=place, dtype=kind).requires_grad_(False).eval()
    logger.info("loaded %s: %s", source, report.summary().splitlines()[0])
    return Loaded(model, tokenizer, settings, report)


def read_loaded_config(folder: Path, over: Mapping[str, Any] | None = None) -> LoadedConfig:
    """Return the stored config, lifted from older formats, with the settings ``over`` laid over it.

    Raises:
        ValueError: it has fields that this version does not know, or values that it does not take.
    """
    source = str(folder / CONFIG)
    tree = lift(read_config(folder), source, migrate)
    kept = {name: value for name, value in tree.items() if name in LoadedConfig.model_fields}
    return build(LoadedConfig, Layer(kept, source), Layer(over or {}, "config="))


@contextmanager
def _local(source: str) -> Iterator[Path]:
    """Bring a source to this machine and give its checkpoint folder; copies of addresses are removed at the end."""
    path = Path(source)
    if re.match(r"[a-z][a-z0-9+.-]*://", source):
        with tempfile.TemporaryDirectory() as copy:
            yield _fetch(source, Path(copy))
    elif path.is_file():
        hint = f"{path.parent} is a checkpoint, give that" if is_checkpoint(path.parent) else LOADABLE
        raise ValueError(f"cannot load {source}: a single file of a format that vlp does not read; {hint}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) and not path.parent.is_dir():
        yield _snapshot(source)
    elif source.startswith(("open_clip:", "hf:")):
        raise ValueError(f"cannot load {source}: vlp does not read models of this family; {LOADABLE}")
    else:
        if (path / "config.json").is_file() or (path / "open_clip_config.json").is_file():
            raise ValueError(f"cannot load {source}: a folder of a format that vlp does not read; {LOADABLE}")
        yield find_checkpoint(path)


def _fetch(address: str, target: Path) -> Path:
    """Copy the checkpoint at an address, or the newest of the run there, below ``target``."""
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(address)
        numbers = _numbers(system, f"{path}/checkpoints")
        found = f"{path}/checkpoints/{max(numbers, key=int)}" if numbers else path
        if whole := system.exists(f"{found}/{MANIFEST}"):
            system.get(found, str(target / "copy"), recursive=True)
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"cannot load {address}: {_line(error)}; check the address and the extra of fsspec") from error
    if not whole:
        raise ValueError(f"cannot load {address}: there is no {MANIFEST}; {LOADABLE}")
    return target / "copy"


def _numbers(system: Any, folder: str) -> list[str]:
    """Names of a remote run's checkpoints."""
    if not system.isdir(folder):
        return []
    names = (str(name).rstrip("/").rpartition("/")[2] for name in system.ls(folder, detail=False))
    return [name for name in names if name.isdigit()]


def _snapshot(source: str) -> Path:
    """Download a checkpoint from the hub, or take it from the hub's cache."""
    import huggingface_hub

    name, _, revision = source.partition("@")
    fetch = partial(huggingface_hub.snapshot_download, name, revision=revision or None)
    try:
        # The manifest comes first: it says what to fetch, and spares a model of another family the download.
        folder = Path(fetch(allow_patterns=[MANIFEST]))
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"cannot load {source}: the hub's model is of a format that vlp does not read; {LOADABLE}")
        return Path(fetch(allow_patterns=[MANIFEST, *manifest_files(folder)]))
    except OSError as error:
        reason = f"no such folder, and the hub does not give it ({_line(error)})"
        raise ValueError(f"cannot load {source}: {reason}; {LOADABLE}") from error


def _line(error: Exception) -> str:
    """An error's first line: libraries' messages are long."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {str(device)!r} cannot be used here: {_line(error)}; use cpu") from error
    return place


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and (not isinstance(found, torch.dtype) or not found.is_floating_point):
        raise ValueError(f"dtype {str(dtype)!r} cannot be used; use float32, bfloat16 or float16")
    return found
