"""What models were trained to read: how each family's own code cleans a text before its tokenizer sees it."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Literal

CleanKind = Literal[
    "none",
    "albef",
    "albef_question",
    "blip",
    "blip_question",
    "siglip",
    "whitespace",
    "lower",
    "canonicalize",
]
"""ALBEF's captions (X-VLM's too) and questions, BLIP's, SigLIP's tokenizer in transformers, and open_clip's three:
all of those mend broken Unicode and HTML entities, `canonicalize` drops case and punctuation, as SigLIP does there."""

_ALBEF = re.compile(r"[,.'!?\"()*#:;~]")
_BLIP = re.compile(r"[.!\"()*#:;~]")
_GAPS = re.compile(r"\s{2,}")
_SPACE = re.compile(r"\s+")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_text(text: str, kind: CleanKind, max_words: int | None = None) -> str:
    """Clean one text.

    Args:
        text: The text.
        kind: Whose rules.
        max_words: Words after which it is cut, a word being what stands between single spaces.
    """
    text = _CLEAN[kind](text)
    words = text.split(" ") if max_words is not None else []
    return " ".join(words[:max_words]) if max_words is not None and len(words) > max_words else text


def _albef_question(text: str) -> str:
    return _ALBEF.sub("", text.lower()).replace("-", " ").replace("/", " ").rstrip(" ")


def _albef(text: str) -> str:
    text = _ALBEF.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return _trim(text)


def _blip_question(text: str) -> str:
    return _BLIP.sub("", text.lower()).rstrip(" ")


def _blip(text: str) -> str:
    return _trim(_BLIP.sub(" ", text.lower()))


def _trim(text: str) -> str:
    return _GAPS.sub(" ", text).rstrip("\n").strip(" ")


def _siglip(text: str) -> str:
    return _SPACE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).strip()


def _open_clip(kind: str) -> Callable[[str], str]:
    def clean(text: str) -> str:
        from open_clip.tokenizer import get_clean_fn  # takes seconds, and is only needed here

        return str(get_clean_fn(kind)(text))

    return clean


_CLEAN: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "albef": _albef,
    "albef_question": _albef_question,
    "blip": _blip,
    "blip_question": _blip_question,
    "siglip": _siglip,
    "whitespace": _open_clip("whitespace"),
    "lower": _open_clip("lower"),
    "canonicalize": _open_clip("canonicalize"),
}
