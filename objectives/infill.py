"""Text infilling: spans of words become one mask each, and the decoder writes the whole text.

How BART is pretrained (Lewis et al. 2020, arXiv 1910.13461, section 2.2), and OFA on texts alone.
Shapes: T texts, L length, V vocabulary, W words of a text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from encoders.types import AttentionKind, Vocabulary
from objectives.base import ModelSpec, ViewText
from objectives.lm import CausalView
from objectives.reconstruct import Reconstruct, ReconstructSettings

GIVEN, WHOLE_TEXT = "infill:given", "infill:whole"
"""The text with its gaps as the encoder reads it, and as the decoder writes it."""


class InfillConfig(ReconstructSettings):
    """Write a text of which spans are missing."""

    kind: Literal["infill"] = "infill"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    mask_probability: float = Field(0.3, gt=0, lt=1)
    """Share of the words that are missing."""
    mean_length: float = Field(3.0, ge=2)
    """Mean of a span's number of words, which follows a Poisson distribution; one of none is a mask too many, so that
    shorter spans would make texts longer."""

    def build(self, spec: ModelSpec) -> Reconstruct:
        """Build the objective.

        Raises:
            ValueError: there is no fusion that it could read, or no decoder.
        """
        if spec.fusion == "none":
            raise ValueError("objective infill needs a fusion, but model.fusion.kind is none; use single_stream")
        if spec.decoder_width is None:
            raise ValueError("objective infill needs a decoder; set model.decoder.kind causal, or use mlm")
        given = InfillView(self.mask_probability, self.mean_length)
        return Reconstruct(self, spec, (GIVEN, given), (WHOLE_TEXT, CausalView()))


@dataclass(frozen=True)
class InfillView:
    """A text in which drawn spans of whole words are one mask each."""

    probability: float
    mean_length: float
    attention: AttentionKind = "full"

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Make the view of one text [L]; the ids before its first word and the last one stay."""
        if vocabulary.mask is None:
            raise ValueError(
                "objective infill needs a tokenizer with a mask token; this one has none, use another or prefix_lm"
            )
        begins = np.flatnonzero(word_starts)
        if not len(begins):
            return ViewText(ids)
        end = len(ids) - int(ids[-1] == vocabulary.sep)
        words = np.split(ids[begins[0] : end], begins[1:] - begins[0])
        spans = self._spans(len(words), generator)
        # What remains and the spans take turns in a drawn order.
        is_span = np.arange(len(words) - sum(spans) + len(spans)) < len(spans)
        found, at, number = [ids[: begins[0]]], 0, 0
        for span in generator.permutation(is_span):
            found.append(np.array([vocabulary.mask]) if span else words[at])
            at += spans[number] if span else 1
            number += int(span)
        return ViewText(np.concatenate([*found, ids[end:]]).astype(np.int64))

    def _spans(self, words: int, generator: np.random.Generator) -> list[int]:
        """Lengths of the spans, which sum to the share of the words, rounded up."""
        left, spans = math.ceil(words * self.probability), []
        while left:
            spans.append(min(int(generator.poisson(self.mean_length)), left))
            left -= spans[-1]
        return spans
