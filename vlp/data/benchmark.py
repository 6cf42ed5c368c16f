"""The embedded emoji benchmark: tar shards in three drawing styles and the frozen concept split.

Train on some styles, test on one never seen, on concepts seen or not: ``vlp/data/emoji/README.md`` describes the data,
``scripts/build_emoji.py`` builds it. Each sample's .json holds ``split``, so readers select by
``where={"split": "train"}``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypedDict

Split = Literal["train", "val", "test"]

STYLES = ("noto", "twemoji", "fluent3d")
"""Drawing styles, one shard each; every style holds the same concepts in the same order."""


class Concept(TypedDict):
    """What an emoji stands for, however it is drawn."""

    family: str
    """Concepts that differ in gender, time or number only share a family; a family lies in one split."""
    split: Split


def emoji_path(style: str) -> Path:
    """Tar shard of one drawing style.

    Args:
        style: One of ``STYLES``.

    Raises:
        ValueError: If there is no such style.
    """
    if style not in STYLES:
        raise ValueError(f"style: '{style}' is not in the emoji benchmark; take one of {', '.join(STYLES)}")
    return _folder() / f"{style}.tar"


def emoji_split() -> dict[str, Concept]:
    """Concepts in stored order: hexcode (the samples' key, as in ``1F468-200D-1F33E``) to family and split."""
    concepts: dict[str, Concept] = json.loads((_folder() / "split.json").read_text(encoding="utf-8"))["concepts"]
    return concepts


def emoji_split_hash() -> str:
    """Sha256 of the split that the samples are in, to be printed beside every score."""
    return split_hash(emoji_split())


def split_hash(concepts: Mapping[str, Any]) -> str:
    """Sha256 (hex) of the canonical JSON of a split: keys sorted, no spaces, ASCII."""
    text = json.dumps(concepts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _folder() -> Path:
    return Path(str(files("vlp.data").joinpath("emoji")))
