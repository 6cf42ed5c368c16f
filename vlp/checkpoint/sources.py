"""Where checkpoints come from: files and folders, addresses that fsspec knows, ids on the hub."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from vlp.checkpoint.folder import MANIFEST, find_checkpoint, is_checkpoint, manifest_files
from vlp.checkpoint.foreign import CONFIG_FILES, PREPROCESSOR_FILE, PROCESSOR_FILE, WEIGHT_FILES, first_line
from vlp.data.presets import CLIP_MEAN, CLIP_STD
from vlp.data.records import IMAGE_EXTENSIONS
from vlp.data.table import TABLE_SUFFIXES
from vlp.recipes import did_you_mean

LOADABLE = (
    "give a checkpoint or run folder of vlp, a file or folder of a known family (vlp inspect), an address of one "
    "(s3://...), its id on the hub (owner/name), or open_clip:MODEL/TAG"
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "beit3.spm")
OPEN_CLIP = "open_clip:"
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
OTHERS = {
    **dict.fromkeys(TABLE_SUFFIXES, "a table"),
    **{f".{ending}": "an image" for ending in IMAGE_EXTENSIONS},
    **dict.fromkeys((".yaml", ".yml"), "a recipe or config"),
    ".tar": "a tar file, as shards of data are",
    ".npz": "a file of numpy's arrays",
    ".zip": "an archive",
}
"""What files are that hold no weights, by their endings."""
_SMALL = ("*.json", "*.txt", "*.model", "*.spm")
"""Configs and tokenizers of foreign checkpoints on the hub."""


@contextmanager
def local(source: str) -> Iterator[Path]:
    """Bring a source to this machine: a checkpoint folder of ours, or a foreign file or folder.

    Copies of addresses are removed at the end.

    Raises:
        ValueError: there is nothing, or nothing that could be loaded; one line.
    """
    source = re.sub(r"^(local-dir|hf-hub|hf):", "", source)  # as open_clip writes a folder or a hub id
    path = Path(source)
    if source.startswith(OPEN_CLIP):
        with tempfile.TemporaryDirectory() as folder:
            yield _open_clip(source, Path(folder))
    elif re.match(r"[a-z][a-z0-9+.-]*://", source):
        with tempfile.TemporaryDirectory() as copy:
            yield _fetch(source, Path(copy))
    elif path.is_file():
        if is_checkpoint(path.parent):
            raise ValueError(f"cannot load {source}: {path.parent} is a checkpoint, give that")
        if (other := other_than_weights(path)) is not None:
            raise ValueError(f"cannot load {source}: it is {other}, no checkpoint; {LOADABLE}")
        yield path
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) and not path.parent.is_dir():
        yield _snapshot(source)
    else:
        foreign = [name for name in (*CONFIG_FILES, *WEIGHT_FILES) if (path / name).is_file()]
        yield path if foreign and not is_checkpoint(path) else find_checkpoint(path)


def other_than_weights(path: Path) -> str | None:
    """Return what a file is that holds no weights, by its first bytes and its ending; None: it may hold some."""
    ending = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(512)
    stored = head.startswith((b"PK\x03\x04", b"\x80")) or head[8:9] == b"{"  # a zip archive, a pickle, safetensors
    if stored and ending in (".npz", ".zip"):
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        stored = any(name.endswith("data.pkl") for name in names)  # as torch.save writes
    if ending in WEIGHT_ENDINGS or stored:
        return None  # if it is damaged, its reader says so
    if ending == ".json":
        return "a config, an index or a table (.json)"
    if ending in OTHERS:
        return f"{OTHERS[ending]} ({ending})"
    return None if b"\0" in head else "a text file" if head else "an empty file"


def _open_clip(source: str, folder: Path) -> Path:
    """Download the weights ``open_clip:MODEL/TAG`` (or take them from the cache) and put the model's config beside."""
    import open_clip  # takes seconds, and is only needed here

    model, _, tag = source.removeprefix(OPEN_CLIP).partition("/")
    config, known = open_clip.get_model_config(model), open_clip.list_pretrained_tags_by_model(model)
    if config is None:
        near = did_you_mean(model, open_clip.list_models())
        hint = near if near.startswith("perhaps") else "open_clip.list_models() names them"
        raise ValueError(f"cannot load {source}: open_clip has no model {model!r}; {hint}")
    if not open_clip.is_pretrained_cfg(model, tag):
        raise ValueError(f"cannot load {source}: write open_clip:{model}/TAG with one of {', '.join(known) or 'none'}")
    tagged = open_clip.get_pretrained_cfg(model, tag)
    # The tag says which activation its weights were trained with, and the preprocessing where it is not the usual one.
    config["quick_gelu"] = bool(tagged.get("quick_gelu", config.get("quick_gelu", False)))
    usual = {"mean": CLIP_MEAN, "std": CLIP_STD, "resize_mode": "shortest", "interpolation": "bicubic"}
    preprocess = {name: tagged.get(name) or value for name, value in usual.items()}
    try:
        weights = Path(open_clip.download_pretrained(tagged)).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load {source}: {first_line(error)}; check the network, or HF_HOME") from error
    (folder / f"open_clip_model{weights.suffix}").symlink_to(weights)
    settings = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _fetch(address: str, target: Path) -> Path:
    """Copy what lies at an address below ``target``: a file with the small files beside it, or a checkpoint folder."""
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(address)
        if system.isfile(path):
            return _fetch_file(system, path, target)
        numbers = _numbers(system, f"{path}/checkpoints")
        found = f"{path}/checkpoints/{max(numbers, key=int)}" if numbers else path
        names = _names(system, found)
        if known := {MANIFEST, *WEIGHT_FILES} & set(names):
            system.get(found, str(target / "copy"), recursive=MANIFEST in known)
            for name in () if MANIFEST in known else names:
                system.get(f"{found}/{name}", str(target / "copy" / name))
    except (OSError, ImportError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"cannot load {address}: {reason}; check the address and the extra of fsspec") from error
    if not known:
        raise ValueError(f"cannot load {address}: there is no {MANIFEST} and no known file of weights; {LOADABLE}")
    return target / "copy"


def _fetch_file(system: Any, path: str, target: Path) -> Path:
    folder, _, name = path.rpartition("/")
    known = (*CONFIG_FILES, PREPROCESSOR_FILE, PROCESSOR_FILE, *TOKENIZER_FILES)
    beside = [one for one in _names(system, folder) if one in known]
    for one in (name, *beside):
        system.get(f"{folder}/{one}", str(target / one))
    return target / name


def _names(system: Any, folder: str) -> list[str]:
    """Names of the files and folders directly in a remote folder."""
    if not system.isdir(folder):
        return []
    return [str(name).rstrip("/").rpartition("/")[2] for name in system.ls(folder, detail=False)]


def _numbers(system: Any, folder: str) -> list[str]:
    """Names of a remote run's checkpoints."""
    return [name for name in _names(system, folder) if name.isdigit()]


def _snapshot(source: str) -> Path:
    """Download a checkpoint from the hub, or take it from the hub's cache."""
    import huggingface_hub

    name, _, revision = source.partition("@")
    fetch = partial(huggingface_hub.snapshot_download, name, revision=revision or None)
    try:
        # The manifest comes first: it says what to fetch.
        folder = Path(fetch(allow_patterns=[MANIFEST]))
        if (folder / MANIFEST).is_file():
            return Path(fetch(allow_patterns=[MANIFEST, *manifest_files(folder)]))
        # Of several formats of the same weights the safe one.
        for weights in ("*.safetensors", "*.bin", "*.pth", "*.ckpt", "*.pt"):
            folder = Path(fetch(allow_patterns=[*_SMALL, weights]))
            if any(folder.glob(weights)):
                return folder
    except OSError as error:
        reason = f"no such folder, and the hub does not give it ({first_line(error)})"
        raise ValueError(f"cannot load {source}: {reason}; {LOADABLE}") from error
    raise ValueError(f"cannot load {source}: the hub's repository holds no weights; {LOADABLE}")
