"""A folder of files that is there whole or not at all, and finding the newest whole one.

`manifest.json` holds size and SHA-256 of each file. Only the model card is left out, so that it may be edited; files
marked as optional, such as the training state, may be removed before a checkpoint is passed on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CARD = "README.md"
BEST = "best"
"""File of a run folder that names the checkpoint to use, where that is not the newest."""
CHEAP = 64 * 2**20
"""Files up to this many bytes are hashed whenever they are read; larger ones on request."""


@contextmanager
def replace_folder(folder: Path, optional: Collection[str] = (), manifest: bool = True) -> Iterator[Path]:
    """Give an empty folder to write to; at the end it takes the place of ``folder`` in one step.

    Whatever happens in between, ``folder`` is what it was before, or the new one. (A kill between the two renames of a
    replacement leaves the old one as ``.NAME.replaced``, where `find_checkpoint` looks for it.)

    Args:
        folder: to write.
        optional: names of files without which it is still whole.
        manifest: write one, as a checkpoint of ours has it.
    """
    folder = folder.absolute()
    partial, replaced = folder.with_name(f".{folder.name}.partial"), _replaced(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        yield partial
        if manifest:
            _write_manifest(partial, optional)
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(folder, replaced)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            os.rename(replaced, folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_manifest(folder: Path, optional: Collection[str]) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CARD
    }
    for name in optional:
        files[name]["optional"] = True
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_files(folder: Path) -> list[str]:
    """Return the names of the files that a whole checkpoint must have.

    Raises:
        ValueError: there is no readable manifest.
    """
    return [name for name, entry in _read_manifest(folder).items() if not entry.get("optional")]


def _read_manifest(folder: Path) -> dict[str, dict[str, str | int]]:
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({' '.join(str(error).split())})") from None


def fault_of(folder: Path, verify: bool = False) -> str | None:
    """Return what is wrong with a checkpoint folder, in a few words, or None if it is whole.

    Args:
        folder: to look at.
        verify: hash all files, not only the small ones.
    """
    try:
        for name, entry in _read_manifest(folder).items():
            path = folder / name
            if not path.is_file():
                if entry.get("optional"):
                    continue
                return f"{name} is missing"
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} of {entry['size']} bytes"
            if (verify or size <= CHEAP) and _sha256(path) != entry["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
    except ValueError as error:
        return str(error)
    return None


def check_whole(folder: Path, verify: bool = False) -> None:
    """Check a checkpoint folder against its manifest.

    Args:
        folder: to check.
        verify: hash all files, not only the small ones.

    Raises:
        ValueError: it is torn; the message names the file and the newest checkpoint beside it that is whole.
    """
    fault = fault_of(folder, verify)
    if fault is None:
        return
    for other in reversed(_numbered(folder.parent)):
        if other.name != folder.name and fault_of(other) is None:
            raise ValueError(f"checkpoint {folder} is torn: {fault}; use an older checkpoint: {other}")
    raise ValueError(f"checkpoint {folder} is torn: {fault}; copy or write it again, no checkpoint beside it is whole")


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint of ours, whole or torn: a manifest, or weights beside config.yaml."""
    return (folder / MANIFEST).is_file() or all(
        (folder / one).is_file() for one in ("config.yaml", "model.safetensors")
    )


def checkpoint_folder(run: str | Path, seen: int) -> Path:
    """Return where a run's checkpoint after ``seen`` samples lies."""
    return Path(run) / "checkpoints" / f"{seen:012d}"


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run in the order of their samples, without those that are half written."""
    found = {int(path.name): path for path in folder.glob("*") if path.name.isdigit() and is_checkpoint(path)}
    for path in folder.glob(".*.replaced"):
        if (name := path.name.split(".")[1]).isdigit() and not (folder / name).exists():
            found[int(name)] = path
    return [found[seen] for seen in sorted(found)]


def mark_best(run: Path, checkpoint: Path) -> None:
    """Write down which checkpoint of a run is to be used."""
    partial = run / f".{BEST}.partial"
    partial.write_text(f"{checkpoint.name}\n", encoding="utf-8")
    partial.replace(run / BEST)


def find_checkpoint(path: str | Path, *, newest: bool = False) -> Path:
    """Return a checkpoint folder: the path itself, or of a run folder its best checkpoint (a finetuning's), else the
    newest whole one.

    Args:
        path: of a checkpoint or a run.
        newest: of a run the newest in any case, to go on with it.

    Raises:
        ValueError: there is none, or none is whole.
    """
    path = Path(path)
    if not path.exists() and is_checkpoint(_replaced(path.absolute())):
        return _replaced(path.absolute())
    if not path.is_dir():
        raise ValueError(f"checkpoint {path}: no such folder; give a checkpoint or a run folder")
    if is_checkpoint(path):
        return path
    if not newest and (path / BEST).is_file():
        best = path / "checkpoints" / (path / BEST).read_text(encoding="utf-8").strip()
        if is_checkpoint(best) and fault_of(best) is None:
            return best
        logger.warning("checkpoint %s, the best of the run, is torn or gone; taking the newest", best)
    known = _numbered(path / "checkpoints") or _numbered(path)
    for candidate in reversed(known):
        fault = fault_of(candidate)
        if fault is None:
            return candidate
        logger.warning("checkpoint %s is torn (%s); trying the one before it", candidate, fault)
    if known:
        fault = fault_of(known[-1])
        raise ValueError(f"run {path}: none of its {len(known)} checkpoints is whole; the newest, {known[-1]}: {fault}")
    raise ValueError(f"{path} holds no checkpoint (no {MANIFEST}, no checkpoints/); give a checkpoint or run folder")
