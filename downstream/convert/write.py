"""Runs a converter and writes its rows: the whole table, or nothing."""

from __future__ import annotations

import inspect
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from downstream.convert.types import IMAGE_FIELDS, Bad, Converter, Row


@dataclass(frozen=True)
class Parameter:
    """What one option of a converter takes."""

    name: str
    kind: type
    """Path, str, int or bool."""
    several: bool
    needed: bool

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    def read(self, words: Sequence[str]) -> Any:
        """Return the value that these words of the command line give.

        Raises:
            ValueError: there are several for one, or none is of its kind.
        """
        if not self.several and len(words) > 1:
            raise ValueError(f"{self.option}: {len(words)} values were given, this converter takes one")
        try:
            values = [self.kind(word) for word in words]
        except ValueError as error:
            raise ValueError(f"{self.option} {' '.join(words)}: {error}") from error
        return values if self.several else values[0]


def parameters(converter: Converter) -> list[Parameter]:
    """Return what a converter takes, from its signature."""
    hints, found = get_type_hints(converter), []
    for name, one in inspect.signature(converter).parameters.items():
        kind = hints[name]
        if get_origin(kind) in (Union, UnionType):
            kind = next(part for part in get_args(kind) if part is not type(None))
        several = get_origin(kind) is not None
        kind = get_args(kind)[0] if several else kind
        assert kind in (Path, str, int, bool), f"{converter.__name__}: {name} is none of the kinds of types.py"
        found.append(Parameter(name, kind, several, one.default is inspect.Parameter.empty))
    return found


@dataclass
class Written:
    """What was written."""

    rows: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    """Rows of each split; rows without one are not counted."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Entries left out, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """Key of the first entry of each reason."""

    def __str__(self) -> str:
        """Say it in one line."""
        rows = f"{self.rows} rows"
        if self.splits:
            rows += f" ({', '.join(f'{name} {count}' for name, count in self.splits.items())})"
        reasons = [f"{count} {reason} (as {self.first[reason]})" for reason, count in self.skipped.most_common()]
        return f"{rows}, {self.skipped.total()} skipped" + (f": {'; '.join(reasons)}" if reasons else "")


def write_rows(entries: Iterator[Row | Bad], out: Path, images: Path | None = None) -> Written:
    """Write a converter's rows as JSON lines; nothing is left behind if that fails.

    Args:
        entries: from a converter.
        out: file to write; one that is there is replaced.
        images: folder of the images: rows then name their files from the table's own folder, or by their whole path if
            this is one, and those without a file are skipped. None: rows name them as the data set does.

    Raises:
        ValueError: no entry can be used, or a source is not of the converter's format.
    """
    if out.suffix != ".jsonl":
        raise ValueError(f"--out {out}: rows are written as JSON lines; give a name that ends in .jsonl")
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images}: there is no such folder")
    place = _Place(images, out.parent)
    done = Written()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for entry in _of_the_format(entries):
                entry = entry if isinstance(entry, Bad) else place(entry)
                if isinstance(entry, Bad):
                    done.skipped[entry.reason] += 1
                    done.first.setdefault(entry.reason, entry.key)
                    continue
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                done.rows += 1
                if "split" in entry:
                    done.splits[str(entry["split"])] += 1
        if not done.rows:
            raise ValueError(f"{out}: no entry can be used, {done}; check that the files belong together")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return done


def _of_the_format(entries: Iterator[Row | Bad]) -> Iterator[Row | Bad]:
    """The same; what is of another type than the format says is the file's fault, said in one line."""
    try:
        yield from entries
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"an entry is not of the data set's format ({type(error).__name__}: {error}); give the official files"
        ) from error


class _Place:
    """Where the images of rows are."""

    def __init__(self, images: Path | None, table: Path) -> None:
        self.images = images
        self.prefix = images if images is None or images.is_absolute() else Path(os.path.relpath(images, table))
        self.there: dict[str, bool] = {}  # several rows show one image: it is looked for once

    def __call__(self, row: Row) -> Row | Bad:
        """Return the row with its images' paths from the table's folder."""
        if self.images is None or self.prefix is None:
            return row
        changes: dict[str, Any] = {}
        for name in IMAGE_FIELDS:
            if name not in row:
                continue
            cells = row[name] if isinstance(row[name], list) else [row[name]]
            for cell in cells:
                if cell not in self.there:
                    self.there[cell] = (self.images / cell).is_file()
                if not self.there[cell]:
                    return Bad(str(cell), f"no image file in {self.images}")
            placed = [(self.prefix / cell).as_posix() for cell in cells]
            changes[name] = placed if isinstance(row[name], list) else placed[0]
        return row | changes


def bind(name: str, converter: Converter, given: Mapping[str, Sequence[str] | bool | None]) -> dict[str, Any]:
    """Return a converter's arguments from the words given for all converters' options (None or False: not given).

    Raises:
        ValueError: one that it needs is missing, or one is given that it does not take.
    """
    known = {one.name: one for one in parameters(converter)}
    usage = " ".join(f"{one.option} ..." if one.needed else f"[{one.option} ...]" for one in known.values())
    values: dict[str, Any] = {}
    for option, words in given.items():
        if words is None or words is False:
            continue
        if option not in known:
            raise ValueError(f"--{option.replace('_', '-')}: not an option of {name}, which takes {usage}")
        values[option] = True if words is True else known[option].read(words)
    missing = [one.option for one in known.values() if one.needed and one.name not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; {name} takes {usage}")
    return values
