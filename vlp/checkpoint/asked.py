"""The authors' own settings (``config=``), and which of them a family asked for: what nobody reads is to be said."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from vlp.recipes import read_tree

WHOLE = ("preprocessor_config", "preprocess_cfg")
"""Mappings that are handed on as they are."""
MOST = 5
"""Keys that a note names before it counts."""
AuthorsConfig: TypeAlias = Mapping[str, Any] | str | Path
"""Settings in the authors' own keys, or a JSON or YAML file of them."""


def read_settings_file(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file.

    Raises:
        ValueError: there is none; one line.
    """
    if path.suffix != ".json":
        return read_tree(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"config {path}: {error}; give a JSON or YAML file") from error
    if not isinstance(found, dict):
        raise ValueError(f"config {path}: a mapping was expected, not {type(found).__name__}")
    return found


def given_settings(config: AuthorsConfig | None) -> dict[str, Any]:
    """Return what ``config=`` says, read from a file where it is the path of one.

    Raises:
        ValueError: it is neither a mapping nor such a file; one line.
    """
    if config is None:
        return {}
    if isinstance(config, str | Path):
        return read_settings_file(Path(config))
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config={config!r:.60} should be a mapping of the authors' own keys, or a JSON or YAML file of them"
        )
    return dict(config)


def laid_over(below: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the settings of ``over``, mappings within them merged likewise."""
    found = dict(below)
    for name, value in over.items():
        old = found.get(name)
        found[name] = laid_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


class Asked(Mapping[str, Any]):
    """Settings that remember which of their keys were asked for, those of mappings within them too."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self._parts = {
            name: Asked(value) for name, value in given.items() if isinstance(value, Mapping) and name not in WHOLE
        }
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self._parts[name] if name in self._parts else self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def unread(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what to say of the keys of ``given``, a part of these settings, that were not asked for.

        Likely misspellings get a line each; all others, of which the authors' own files have many, one together.
        """
        near, far = [], []
        for name, known in self._unasked(given):
            meant = difflib.get_close_matches(name.rpartition(".")[2], known, n=1, cutoff=0.8)
            if meant:
                near.append(f"config= {name} is not read; perhaps you meant {meant[0]}")
            else:
                far.append(name)
        more = f" and {len(far) - MOST} more" if len(far) > MOST else ""
        return (*near, *([f"config= not read: {', '.join(far[:MOST])}{more}"] if far else []))

    def _unasked(self, given: Mapping[str, Any]) -> Iterator[tuple[str, set[str]]]:
        """Dotted names that were not asked for, and the names that were in their place."""
        for name, value in given.items():
            if name not in self.asked:
                yield name, self.asked
            elif name in self._parts and isinstance(value, Mapping):
                yield from ((f"{name}.{inner}", known) for inner, known in self._parts[name]._unasked(value))
