"""Span corruption: write the spans of words that are hidden in a text, each behind the sentinel that stands for it.

T5's objective (Raffel et al. 2020, section 3.1.4), beside an image VL-T5's (Cho et al. 2021, arXiv 2102.02779, section
4.1): of "a man jumping over a hydrant" the encoder reads "a <0> over <1> hydrant", and the decoder writes "<0> man
jumping <1> a".
Shapes: T texts, L length, V vocabulary, U units (words, or pieces of words).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from encoders.types import AttentionKind, Vocabulary
from objectives.base import ModelSpec, ViewText
from objectives.reconstruct import Reconstruct, ReconstructSettings

GIVEN, WRITTEN = "span_corruption:given", "span_corruption:written"
"""The text with sentinels as the encoder reads it, and what the decoder writes."""

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class SpanCorruptionConfig(ReconstructSettings):
    """Write hidden spans of the text."""

    kind: Literal["span_corruption"] = "span_corruption"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    mask_probability: float = Field(0.15, gt=0, le=0.5)
    """Share of the words that are hidden, at least one."""
    span_length: float | None = Field(3.0, ge=1)
    """Mean number of words in a span; none = the words are drawn one by one, and neighbours are one span (VL-T5)."""
    whole_word: bool = False
    """Count and hide whole words (VL-T5), else their pieces (T5)."""
    tokens: ClassVar[tuple[str, ...]] = tuple(f"<extra_id_{number}>" for number in range(16))

    def build(self, spec: ModelSpec) -> Reconstruct:
        """Build the objective.

        Raises:
            ValueError: there is no fusion that reads the text, or no decoder that writes.
        """
        self.check(spec, self.kind)
        settings = self.mask_probability, self.span_length, self.whole_word
        given, written = SpanView("given", *settings), SpanView("written", *settings)
        return Reconstruct(self, spec, (GIVEN, given), (WRITTEN, written))


@dataclass(frozen=True)
class SpanView:
    """A text with hidden spans, each a sentinel; or these spans behind their sentinels, bos before them, eos behind."""

    part: Literal["given", "written"]
    probability: float
    span_length: float | None
    whole_word: bool
    draws: str = "span_corruption"
    """One name for both parts, so that they hide the same."""

    @property
    def attention(self) -> AttentionKind:
        """Of the part."""
        return "full" if self.part == "given" else "causal"

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Make the view of one text [L]; what has no sentinel any more stays."""
        if not vocabulary.sentinels:
            raise ValueError(
                "objective span_corruption needs a tokenizer with sentinels, which this one has not; use T5's, or add "
                "<extra_id_0>, <extra_id_1> and so on to data.tokenizer.added_tokens"
            )
        words = ~np.isin(ids, [vocabulary.cls, vocabulary.sep, vocabulary.pad])
        units = np.cumsum(word_starts[words]) if self.whole_word else np.arange(words.sum())
        units = units - units[:1]  # a first piece that goes on a word is a word of its own
        number = int(units[-1]) + 1 if len(units) else 0
        hidden = np.zeros(len(ids), dtype=np.bool_)
        hidden[words] = self._hide(number, generator)[units]
        first = hidden & ~np.insert(hidden[:-1], 0, False)  # where spans begin
        span = np.where(hidden, np.cumsum(first) - 1, -1)
        hidden &= span < len(vocabulary.sentinels)
        first &= hidden
        sentinel = np.array(vocabulary.sentinels, dtype=np.int64)[np.where(first, span, 0)]
        if self.part == "given":
            return ViewText(np.where(first, sentinel, ids)[first | ~hidden].astype(np.int64))
        both = np.stack([sentinel, ids], 1)  # each span's sentinel stands before its first id
        spans = both[np.stack([first, hidden], 1)]
        written = np.concatenate([[vocabulary.bos], spans, [vocabulary.eos]]).astype(np.int64)
        return ViewText(written, np.append(written[1:], -100))

    def _hide(self, number: int, generator: np.random.Generator) -> Flags:
        """Which of ``number`` units are hidden, [U], one at least; with spans, the last unit is (as in T5)."""
        hidden = np.zeros(number, dtype=np.bool_)
        if number == 0:
            return hidden
        if self.span_length is None:
            count = max(1, int(self.probability * number))
            hidden[np.argsort(generator.random(number), kind="stable")[:count]] = True
            return hidden
        count = min(max(1, round(self.probability * number)), max(1, number - 1))
        spans = min(max(1, round(count / self.span_length)), max(1, number - count))
        lengths = np.stack([_parts(number - count, spans, generator), _parts(count, spans, generator)], 1).flatten()
        return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _parts(whole: int, number: int, generator: np.random.Generator) -> Ids:
    """Cut ``whole`` at drawn places in ``number`` parts of at least one each (T5's random segments)."""
    if whole < number:  # a text of one word has nothing before its only span
        return np.array([whole], dtype=np.int64)
    cuts = np.sort(generator.permutation(whole - 1)[: number - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [whole]])).astype(np.int64)
