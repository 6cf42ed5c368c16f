"""Text infilling: spans of words become one mask each, and the decoder writes the whole text.

How BART is pretrained (Lewis et al. 2020, arXiv 1910.13461, section 2.2), and OFA on texts alone.
Shapes: T texts, L length, V vocabulary, W words of a text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from encoders.layers import Activation
from encoders.types import AttentionKind, Batch, Tokens, Vocabulary
from objectives.base import Decode, Draw, Fuse, LossOutput, ModelSpec, Objective, Results, Side, ViewText
from objectives.heads import WordHead, word_head
from objectives.lm import CausalView
from objectives.mlm import count_labels, word_loss
from objectives.settings import ObjectiveSettings

GIVEN, WHOLE_TEXT = "infill:given", "infill:whole"
"""The text with its gaps as the encoder reads it, and as the decoder writes it."""


class InfillConfig(ObjectiveSettings):
    """Write a text of which spans are missing."""

    kind: Literal["infill"] = "infill"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    mask_probability: float = Field(0.3, gt=0, lt=1)
    """Share of the words that are missing."""
    mean_length: float = Field(3.0, ge=2)
    """Mean of a span's number of words, which follows a Poisson distribution; one of none is a mask too many, so that
    shorter spans would make texts longer."""
    head: WordHead = "bert"
    """What gives the word scores: BERT's prediction head, one linear map, or that without a bias (BART, OFA)."""
    tied: bool = True
    """The output words are the decoder's word embedding."""
    activation: Activation = "gelu"
    """Activation inside BERT's prediction head."""
    alone: bool = False
    """Read the text without an image."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"memory"})

    def build(self, spec: ModelSpec) -> Infill:
        """Build the objective.

        Raises:
            ValueError: there is no fusion that it could read, or no decoder.
        """
        if spec.fusion == "none":
            raise ValueError("objective infill needs a fusion, but model.fusion.kind is none; use single_stream")
        if spec.decoder_width is None:
            raise ValueError("objective infill needs a decoder; set model.decoder.kind causal, or use mlm")
        return Infill(self, spec)


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


class Infill(Objective):
    """Next-word prediction of a text whose gaps the decoder must fill."""

    def __init__(self, config: InfillConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.config, self.vocabulary_size = config, spec.vocabulary_size
        assert spec.decoder_width is not None
        tied = spec.decoder_words if config.tied else None
        self.head = word_head(
            config.head,
            spec.decoder_width,
            spec.vocabulary_size,
            tied,
            spec.text_eps,
            activation=config.activation,
        )
        self.one_modality = config.alone
        self.written = Decode(Fuse(None if config.alone else "clean", GIVEN), WHOLE_TEXT)
        self.needs = frozenset({self.written})
        self.views = {GIVEN: InfillView(config.mask_probability, config.mean_length), WHOLE_TEXT: CausalView()}

    def count(self, batch: Batch) -> Tensor:
        return count_labels(batch, WHOLE_TEXT)

    def chance(self, candidates: int) -> float:
        return math.log(self.vocabulary_size)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy of the next word, mean over all words."""
        tokens, text = results[self.written], batch.texts[WHOLE_TEXT]
        assert isinstance(tokens, Tokens) and text.labels is not None
        return word_loss(self.head, tokens.states, text.labels, text.label_at)
