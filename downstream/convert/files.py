"""Reading official annotation files: what is not of the format is one clear line, an incomplete entry a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: it is not there, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); give the official annotation file, unpacked") from error


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number (the first is 1) and object of each line of a JSON lines file that is not blank.

    Raises:
        ValueError: it is not there, or a line is not a JSON object.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError(f"{path}: line {number} is not an object; give the official JSON lines file")
                yield number, entry
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON lines ({error}); give the official file, unpacked") from error


def object_in(path: Path, about: str) -> dict[str, Any]:
    """Return the object that a JSON file holds; ``about`` says what the file should be ("GQA questions").

    Raises:
        ValueError: it holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON object was expected, not {type(found).__name__}; give {about}")
    return found


def list_in(path: Path, field: str | None, about: str) -> list[dict[str, Any]]:
    """Return the objects in a JSON file's list, the whole file or its ``field``; ``about`` says what it should be.

    Raises:
        ValueError: there is no such list, or it holds something else than objects.
    """
    return list_of(read_json(path), path, field, about)


def list_of(found: Any, path: Path, field: str | None, about: str) -> list[dict[str, Any]]:
    """Do as ``list_in`` with what was ``found`` in the file."""
    where = f"field {field!r}" if field else "the file"
    if field is not None:
        found = found.get(field) if isinstance(found, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{path}: {where} is not a list of objects; give {about}")
    return found


def lacking(entry: Mapping[str, Any], *fields: str) -> str | None:
    """Return the reason why an entry without one of these fields (absent, null or empty) is bad; None if it has all."""
    missing = [name for name in fields if entry.get(name) in (None, "", [], {})]
    return f"no field {', '.join(missing)}" if missing else None
