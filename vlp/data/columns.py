"""Which column of a table holds what, by the names that people give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from vlp.data.records import IMAGE_EXTENSIONS, TEXT_FIELDS

IMAGE_COLUMNS = (
    "image",
    "images",
    "image_path",
    "image_paths",
    "img_path",
    "filepath",
    "file_path",
    "file_name",
    "filename",
    "path",
    "img",
    "image_file",
    "image_name",
    "image_filename",
    "img_name",
    "img_file",
    "photo",
    "picture",
    "file",
    "features",
    "regions",
)
"""Column names that are taken for the image, or for a detector's arrays (.npz), if none is named, best first."""

TEXT_COLUMNS = (*TEXT_FIELDS, "comment", "alt_text", "alt", "label_text", "txt")
"""The same for a caption; the first ones are also those of fields in shards."""

QUESTION_COLUMNS = ("question", "questions", "question_text", "query", "prompt", "q")
"""The same for a question."""

ANSWER_COLUMNS = ("answers", "answer_scores", "answer", "answer_text", "response", "target", "label", "a")
"""The same for its answer or answers."""

SYNONYMS = {"question": QUESTION_COLUMNS, "answer": ANSWER_COLUMNS, "caption": TEXT_COLUMNS}
"""Names that stand for the one that a task asks for."""

DELIMITERS = (",", "\t", ";", "|")
"""Of a csv file, by what its header holds, best first: open_clip's recipes write tabs, Excel semicolons in half of
Europe, Flickr30k's table bars."""


def first_known(columns: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the column that has the best known name; case, spaces and hyphens do not count."""
    by_name = {column.strip().lower().replace(" ", "_").replace("-", "_"): column for column in reversed(columns)}
    return next((by_name[name] for name in known if name in by_name), None)


def image_column(row: Mapping[str, Any]) -> str | None:
    """Return the column that looks like the image's: by its name, else the first whose value ends as image files do."""
    named = first_known(list(row), IMAGE_COLUMNS)
    return named if named is not None else next((name for name, cell in row.items() if _is_path(cell)), None)


def _is_path(cell: Any) -> bool:
    suffix = PurePath(cell).suffix if isinstance(cell, str) and len(cell) < 4096 else ""
    return suffix[1:].lower() in IMAGE_EXTENSIONS - {"img"}


def delimiter(header: str, suffix: str) -> str:
    """Return what separates the cells of a table whose first line and file ending are given."""
    if suffix == ".tsv":
        return "\t"
    return next((one for one in DELIMITERS if one in header), ",")
