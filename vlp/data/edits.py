"""Captions with words changed: the text view "edited".

Wei and Zou 2019 ("EDA: easy data augmentation techniques for boosting performance on text classification tasks", arXiv
1901.11196), of which DeCLIP (arXiv 2110.05208, section 3.2) draws one operation a caption.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from pydantic import Field

from vlp.config import Config


class EditConfig(Config):
    """What is done to captions of the text view "edited": synonyms, places changed or words left out, drawn anew."""

    number: int = Field(default=1, ge=1)
    """Words that synonyms replace, and pairs of words that change places."""
    delete: float = Field(default=0.1, ge=0, lt=1)
    """Share of the words that are left out; one always stays."""
    synonyms: str | None = None
    """File of synonyms: in each line a word and its synonyms, with tabs between; none = no word is replaced."""


def edit(text: str, config: EditConfig, generator: np.random.Generator) -> str:
    """Change some of a caption's words; a lone word has only synonyms.

    Raises:
        ValueError: the file of synonyms cannot be read, or holds none.
    """
    words = text.split()
    operation = int(generator.integers(2 if config.synonyms is None else 3))
    if operation == 2 and config.synonyms is not None:
        return " ".join(replaced(words, read_synonyms(config.synonyms), config.number, generator))
    if len(words) < 2:
        return text
    return " ".join(
        swapped(words, config.number, generator) if operation == 0 else shortened(words, config.delete, generator)
    )


def swapped(words: list[str], number: int, generator: np.random.Generator) -> list[str]:
    """Let two words change places, ``number`` times."""
    found = list(words)
    for _ in range(number):
        first, second = (int(place) for place in generator.choice(len(found), 2, replace=False))
        found[first], found[second] = found[second], found[first]
    return found


def shortened(words: list[str], share: float, generator: np.random.Generator) -> list[str]:
    """Leave each word out with probability ``share``; where none would stay, one drawn word does."""
    level, lone = generator.random(len(words)), int(generator.integers(len(words)))
    return [word for word, one in zip(words, level, strict=True) if one >= share] or [words[lone]]


def replaced(
    words: list[str], synonyms: Mapping[str, tuple[str, ...]], number: int, generator: np.random.Generator
) -> list[str]:
    """Replace up to ``number`` different words by one of their synonyms, everywhere they stand."""
    cores = [word.strip(string.punctuation) for word in words]
    known = sorted({core.lower() for core in cores} & synonyms.keys())
    chosen = [known[i] for i in generator.permutation(len(known))[:number]]
    new = {word: synonyms[word][int(generator.integers(len(synonyms[word])))] for word in chosen}
    return [
        word.replace(core, new[core.lower()]) if core.lower() in new else word
        for word, core in zip(words, cores, strict=True)
    ]


@cache
def read_synonyms(path: str) -> dict[str, tuple[str, ...]]:
    """Read a file of synonyms, by word in lower case.

    Raises:
        ValueError: it cannot be read, or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.edits.synonyms {path}: cannot be read: {error}; check the path") from error
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines]
    found = {row[0].lower(): tuple(cell for cell in row[1:] if cell) for row in rows if row[0] and any(row[1:])}
    if not found:
        raise ValueError(f"data.edits.synonyms {path}: no line has a word, a tab and a synonym; write such lines")
    return found
