"""What of one's own table is what: columns that hold image, text and answer, and the rows of a split it may name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from downstream.task import TaskConfig
from vlp.data.columns import ANSWER_COLUMNS, SYNONYMS, first_known, image_column
from vlp.data.loader import DataConfig
from vlp.data.reader import Reader, open_reader
from vlp.data.table import TABLE_SUFFIXES, TableReader

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=TaskConfig)

SPLIT_COLUMNS = ("split", "subset", "partition", "set")
"""Columns that may say which part of the data a row belongs to."""
PARTS = {
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What they call the parts (Karpathy's restval trains)."""


def open_table(data: DataConfig, spec: str | tuple[str, ...] | None) -> TableReader | None:
    """Return the first table of a data set with all its columns as fields; None where it is no table."""
    first = next(iter(_specs(spec)), None)
    if first is None or not (Path(first).suffix in TABLE_SUFFIXES or list(Path(first).glob("metadata.*"))):
        return None  # shards are not opened only to see that they are none
    reader: Reader = open_reader(first, image=(), text="", root=data.root)
    return reader if isinstance(reader, TableReader) else None


def _specs(spec: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (spec,) if isinstance(spec, str) else spec or ()


def guess_columns(
    task: T, data: DataConfig, spec: str | tuple[str, ...] | None, *, labelled: bool = True
) -> tuple[T, DataConfig]:
    """Fill in which columns of a table hold text and answer where nobody said so, and say what is read from where.

    The names are those that people use (``vlp.data.columns``); data that are no table are left as they are.

    Args:
        task: whose ``answer`` is filled in, if it has such a setting.
        data: its ``text`` is filled in.
        spec: the data to look at.
        labelled: warn where no column looks like what the task reads.

    Raises:
        ValueError: the data cannot be opened.
    """
    if (table := open_table(data, spec)) is None:
        return task, data
    row = table[0].fields
    told = {"image": _shown(data.image) or image_column(row)}
    wanted = task.settings(data).text
    role = "caption" if wanted is None else wanted
    text = wanted if wanted in row else None
    if text is None and data.text is None:
        text = first_known(list(row), SYNONYMS.get(role, (role,)))
        if text is None and labelled:
            known = ", ".join(SYNONYMS.get(role, (role,))[:4])
            columns = ", ".join(row)
            words = "%s: no column looks like a %s (%s, ...); name it with --data.text, columns: %s"
            logger.warning(words, table.name, role, known, columns)
        if wanted is not None and text is not None:
            data = data.model_copy(update={"text": text})
    told[role] = text
    answer = getattr(task, "answer", "")
    if answer is None:
        answer = next((name for name in ANSWER_COLUMNS[:3] if name in row), None)  # these are found as they are
        if answer is None and (answer := first_known(list(row), ANSWER_COLUMNS)) is not None:
            task = task.model_copy(update={"answer": answer})
    if answer:
        told["answer"] = answer
    logger.info("%s: %s", table.name, ", ".join(f"{what} from '{name}'" for what, name in told.items() if name))
    return task, data


def _shown(image: str | tuple[str, ...] | None) -> str | None:
    return image if image is None or isinstance(image, str) else ", ".join(image)


@dataclass(frozen=True)
class NamedSplit:
    """Filters (``data.where``) of the parts that a table's own column names; None: no such part."""

    train: dict[str, Any]
    val: dict[str, Any] | None
    test: dict[str, Any] | None


def named_split(data: DataConfig) -> NamedSplit | None:
    """Return the split that a column of the training tables, which all must have it, names; None without one."""
    tables = [open_table(data, one) for one in _specs(data.train)] if data.where is None else []
    found: set[str] = set()
    column: str | None = None
    for table in tables:
        names = [] if table is None else list(table[0].fields)
        own = first_known(names, SPLIT_COLUMNS) if column is None else column
        if table is None or own is None or own not in names:
            if column is not None:
                logger.warning("a split is named by column '%s' of some tables only, and not taken", column)
            return None
        column = own
        found |= {str(table[index].fields.get(column)) for index in range(len(table))}
    if column is None:
        return None
    named = {part: [name for name in found if name.strip().lower() in known] for part, known in PARTS.items()}
    filters: Mapping[str, dict[str, Any]] = {part: {column: sorted(names)} for part, names in named.items() if names}
    if "train" not in filters or len(filters) < 2:
        return None
    return NamedSplit(filters["train"], filters.get("val"), filters.get("test"))
