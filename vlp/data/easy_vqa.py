"""easy-vqa: questions about one coloured shape, in its official split; from the package of that name (extra "demo")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlp.data.records import BadSample, RawSample, digest, matches, nothing_left

SCHEME = "easy-vqa:"
"""Data sets are called ``easy-vqa:train`` and ``easy-vqa:test``."""


class EasyVqaReader:
    """Questions with their image; fields question, answer and image_id.

    Args:
        split: "train" (38,575 questions) or "test" (9,673).
        where: keep samples whose fields have these values.

    Raises:
        ValueError: there is no such split, the package is not installed, or nothing is left.
    """

    def __init__(self, split: str, where: Mapping[str, Any] | None = None) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"data: '{SCHEME}{split}' is not a split of easy-vqa; use {SCHEME}train or {SCHEME}test")
        try:
            import easy_vqa
        except ImportError as error:
            raise ValueError(
                f"data: '{SCHEME}{split}' needs easy-vqa; install it with: pip install 'vlp[demo]'"
            ) from error
        train = split == "train"
        questions = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
        paths = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
        self.name = f"{SCHEME}{split}"
        self._paths: dict[int, str] = dict(paths)
        rows = [{"question": q, "answer": a, "image_id": i} for q, a, i in zip(*questions, strict=True)]
        self._rows = [(number, row) for number, row in enumerate(rows) if matches(row, where or {})]
        if not self._rows:
            raise nothing_left(self.name, where or {}, rows[0])

    @property
    def fingerprint(self) -> str:
        """Hash of the rows."""
        return digest(repr(self._rows))

    def paths(self) -> Iterator[str]:
        """Yield the files of the images."""
        return iter(self._paths.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RawSample:
        """Read question ``index``; its key is its number in the split.

        Raises:
            BadSample: if the image cannot be read.
        """
        raw = self.words(index)
        path = Path(self._paths[raw.fields["image_id"]])
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadSample(raw.key, f"cannot read image {path.name}: {error}") from error
        return replace(raw, files={"png": content})

    def words(self, index: int) -> RawSample:
        """Read question ``index`` without its image."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, row = self._rows[index]
        return RawSample(str(number), self.name, {}, dict(row), (row["question"],))
