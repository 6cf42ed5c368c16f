"""Scenes of two emoji, "camel left of onion": retrieval in which the words must be bound to places.

Scenes are drawn from the embedded emoji as they are read, nothing is stored. For each two of 36 concepts there are
four, A left of B, B left of A, A above B and B above A: the words of a text, without their order, fit two of them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

from PIL import Image

from vlp.data.benchmark import Split, emoji_path
from vlp.data.records import RawSample, digest, matches, nothing_left
from vlp.data.shards import ShardReader

SCHEME = "emoji-scenes:"
"""Data sets are called ``emoji-scenes:STYLE,...``."""
RELATIONS = {"left of": ((0, 16), (32, 16)), "above": ((16, 0), (16, 32))}
"""Upper left corners (x, y) of the first and the second emoji, of half the scene's side each."""
_SIDE, _CONCEPTS = 64, 36


class ScenesReader:
    """Scenes with their captions; fields first, second, relation, style and split.

    Two concepts' four scenes lie in one split, so that the pairs of test are never seen together in training; each of
    the concepts by itself is.

    Args:
        styles: drawing styles, separated by commas; each draws all scenes.
        where: keep samples whose fields have these values.

    Raises:
        ValueError: there is no such style, or nothing is left.
    """

    def __init__(self, styles: str, where: Mapping[str, Any] | None = None) -> None:
        self.name = f"{SCHEME}{styles}"
        drawn = {style.strip(): _emoji(style.strip()) for style in styles.split(",")}
        self._emoji = {(style, label): image for style, art in drawn.items() for label, image in art.items()}
        rows = [row for style, art in drawn.items() for row in _rows(style, list(art))]
        self._rows = [row for row in rows if matches(row, where or {})]
        if not self._rows:
            raise nothing_left(self.name, where or {}, rows[0])

    @property
    def fingerprint(self) -> str:
        """Hash of the rows."""
        return digest(repr(self._rows))

    def paths(self) -> Iterator[str]:
        """Yield the shards of the emoji."""
        return iter(sorted({str(emoji_path(style)) for style, _ in self._emoji}))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RawSample:
        """Draw scene ``index``."""
        raw = self.words(index)
        row = raw.fields
        scene = Image.new("RGB", (_SIDE, _SIDE), "white")
        for corner, name in zip(RELATIONS[row["relation"]], ("first", "second"), strict=True):
            scene.paste(self._emoji[row["style"], row[name]], corner)
        content = io.BytesIO()
        scene.save(content, "PNG", compress_level=1)
        return replace(raw, files={"png": content.getvalue()})

    def words(self, index: int) -> RawSample:
        """Read scene ``index`` without drawing it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._rows[index]
        caption = f"{row['first']} {row['relation']} {row['second']}"
        return RawSample(f"{row['style']}/{caption}", self.name, {}, dict(row), (caption,))


def _emoji(style: str) -> dict[str, Image.Image]:
    """The first 36 train concepts with a name of one word, in the order of its md5, as they stand in scenes."""
    shard = ShardReader([str(emoji_path(style))], {"split": "train"})
    named = {raw.files["txt"].decode(): raw.files["webp"] for raw in map(shard.__getitem__, range(len(shard)))}
    labels = sorted((label for label in named if label.isalpha()), key=_hash)[:_CONCEPTS]
    half = (_SIDE // 2, _SIDE // 2)
    return {label: Image.open(io.BytesIO(named[label])).convert("RGB").resize(half) for label in labels}


def _rows(style: str, labels: list[str]) -> Iterator[dict[str, str]]:
    for first, second in permutations(labels, 2):
        for relation in RELATIONS:
            row = {"first": first, "second": second, "relation": relation, "style": style}
            yield row | {"split": _split(first, second)}


def _split(first: str, second: str) -> Split:
    """A fifth of the pairs to test, a tenth to val, the rest to train."""
    number = _hash("+".join(sorted((first, second)))) % 10
    return "test" if number < 2 else "val" if number == 2 else "train"


def _hash(text: str) -> int:
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16)
