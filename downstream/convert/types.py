"""What a converter is: official files of a data set -> rows of ours, in the format of the task that they are for.

A converter is a generator, registered by one line in ``downstream.convert``. Its parameters are the files and settings
that it takes, each an option of `vlp data convert NAME` (``question_files`` is `--question-files`): ``Path`` or
``Sequence[Path]``, ``str`` or ``Sequence[str]``, ``int``, ``bool``; ``| None`` or a default makes one optional. It
raises ValueError, in one line, for a file that is not of its format, and yields a :class:`Bad` for an entry of it that
cannot be used. The first line of its docstring is its help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
"""One line of the table that is written. Image fields are paths relative to the data set's folder of images; a field
``split`` names the official split."""

IMAGE_FIELDS = ("image", "left", "right")
"""Fields of a row that hold an image's path."""


@dataclass(frozen=True)
class Bad:
    """An entry that cannot be used."""

    key: str
    """What the data set calls it: question_id, image_id, ..."""
    reason: str
    """Why, without the key, so that equal reasons are counted together."""


Converter: TypeAlias = Callable[..., Iterator[Row | Bad]]
