"""Masking of spans that the data name in their texts, whole: nodes of a scene graph, entities, phrases.

Objects, attributes and relations of a caption's scene graph are predicted from the image and the other words (Yu et al.
2021, ERNIE-ViL, arXiv 2006.16934, section 3.2).
Shapes: L length of a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from encoders.types import AttentionKind, Vocabulary
from objectives.base import View, ViewText

TokenSpan: TypeAlias = tuple[int, int, str]
"""First token, the one behind the last, and what they are."""


@dataclass(frozen=True)
class SpannedView:
    """A masked text in which a share of the spans of each kind is masked too: all of a span, or nothing.

    Of the chosen spans 80 % become [MASK], 10 % random words, 10 % stay.
    """

    masked: View
    """What masks other words."""
    shares: tuple[tuple[str, float], ...]
    """Of each kind, the share that is masked."""

    @property
    def attention(self) -> AttentionKind:
        """How the view's tokens see each other."""
        return self.masked.attention

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Mask one text [L] without spans."""
        return self.make_spanned(ids, word_starts, vocabulary, generator, ())

    def make_spanned(
        self,
        ids: np.ndarray,
        word_starts: np.ndarray,
        vocabulary: Vocabulary,
        generator: np.random.Generator,
        spans: Sequence[TokenSpan],
    ) -> ViewText:
        """Mask one text [L] with spans; those of other kinds are left alone."""
        made = self.masked.make(ids, word_starts, vocabulary, generator)
        assert made.labels is not None and vocabulary.mask is not None  # the view that masks words has seen to it
        found, labels, shares = made.ids.copy(), made.labels.copy(), dict(self.shares)
        special = np.isin(ids, list(vocabulary.special))
        inner = np.flatnonzero(special[1:])  # a second segment is none of the caption's
        stop = 1 + int(inner[0]) if len(inner) else len(ids)
        for first, end, kind in spans:
            # A fixed number of draws a span, so that masks depend on nothing else.
            level, how = generator.random(2)
            drawn = drawn_words(vocabulary, len(ids), generator)
            place = slice(first, min(end, stop))
            if level < shares.get(kind, 0.0):
                labels[place] = ids[place]
                found[place] = vocabulary.mask if how < 0.8 else drawn[place] if how < 0.9 else ids[place]
        return ViewText(found, labels)


def drawn_words(vocabulary: Vocabulary, number: int, generator: np.random.Generator) -> np.ndarray:
    """Return ids of ``number`` words, drawn evenly; none is special."""
    found = generator.integers(0, vocabulary.size - len(vocabulary.special), number)
    for skipped in sorted(vocabulary.special):  # the n-th id that is not special
        found += found >= skipped
    return found


def with_spans(masked: View, shares: Mapping[str, float]) -> View:
    """Return the view that masks also spans of these kinds; itself where there are none."""
    return SpannedView(masked, tuple(sorted(shares.items()))) if shares else masked
