"""Prefix language modelling: write the rest of a text whose beginning and image are given.

SimVLM's one objective (Wang et al. 2022, arXiv 2108.10904, eq. 3). The beginning's length is drawn evenly; within it,
and the image, all tokens see each other.
Shapes: T texts, L length, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from encoders.layers import Activation
from encoders.types import AttentionKind, Batch, Tokens, Vocabulary
from objectives.base import (
    Decode,
    Draw,
    Fuse,
    Fused,
    LossOutput,
    ModelSpec,
    Objective,
    Results,
    Side,
    ViewText,
)
from objectives.heads import WordHead, word_head
from objectives.mlm import count_labels, word_loss
from objectives.settings import ObjectiveSettings

GIVEN, REST, WHOLE_TEXT = "prefix_lm:given", "prefix_lm:rest", "prefix_lm:whole"
"""The beginning as the encoder reads it, what the decoder writes, and both in one stream."""


class PrefixLmConfig(ObjectiveSettings):
    """Predict what follows a drawn beginning."""

    kind: Literal["prefix_lm"] = "prefix_lm"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    memory: Literal["fused", "beside"] = "fused"
    """`fused`: a decoder writes the rest, reading image and beginning as the fusion encodes them (SimVLM); its memory
    is best `both`. `beside`: there is no decoder, the fusion reads image and text in one stream, the rest left to
    right."""
    head: WordHead = "bert"
    """What gives the word scores: BERT's prediction head, one linear map, or that without a bias."""
    tied: bool = True
    """The output words are the decoder's (or the text encoder's) word embedding."""
    activation: Activation = "gelu"
    """Activation inside BERT's prediction head."""
    alone: bool = False
    """Read the text without an image (SimVLM's documents)."""

    trains_embed: ClassVar[bool] = False

    @property
    def reads(self) -> frozenset[Side]:
        """Sides of the fusion that it reads."""
        return frozenset({"memory" if self.memory == "fused" else "text"})

    def build(self, spec: ModelSpec) -> PrefixLm:
        """Build the objective.

        Raises:
            ValueError: there is no fusion that it could read, or no decoder.
        """
        if spec.fusion == "none":
            raise ValueError("objective prefix_lm needs a fusion, but model.fusion.kind is none; use single_stream")
        if self.memory == "fused" and spec.decoder_width is None:
            raise ValueError(
                "objective prefix_lm needs a decoder; set model.decoder.kind causal, or its memory to beside"
            )
        if self.memory == "beside" and "prefix" not in spec.fusion_attention:
            raise ValueError(
                "objectives.prefix_lm.memory beside reads a text whose rest is written left to right, which "
                f"model.fusion.kind {spec.fusion} cannot; use single_stream with words_see none"
            )
        return PrefixLm(self, spec)


@dataclass(frozen=True)
class PrefixView:
    """A text cut at a drawn place: bos and its first words; bos, its other words and eos; or the whole of it."""

    part: Literal["given", "rest", "whole"]
    draws: str = "prefix_lm"
    """One name for all parts, so that they are cut at the same place."""

    @property
    def attention(self) -> AttentionKind:
        """Of the part."""
        kinds: dict[str, AttentionKind] = {"given": "full", "rest": "causal", "whole": "prefix"}
        return kinds[self.part]

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Make the view of one text [L] with its special ids; of n words 0 to n - 1 are given."""
        words = ids[~np.isin(ids, [vocabulary.cls, vocabulary.sep, vocabulary.pad])]
        given = int(generator.integers(max(1, len(words))))
        bos, eos = [vocabulary.bos], [vocabulary.eos]
        if self.part == "given":
            return ViewText(np.concatenate([bos, words[:given]]).astype(np.int64))
        first = given if self.part == "rest" else 0
        written = np.concatenate([bos, words[first:], eos]).astype(np.int64)
        labels = np.append(written[1:], -100)
        labels[: given - first] = -100
        return ViewText(written, labels, given + 1 if self.part == "whole" else None)


class PrefixLm(Objective):
    """Next-word prediction behind a beginning."""

    def __init__(self, config: PrefixLmConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.config, self.vocabulary_size = config, spec.vocabulary_size
        fused = config.memory == "fused"
        width, words = spec.decoder_width, spec.decoder_words
        if not fused:
            width, words = spec.text_width, spec.word_embedding
        assert width is not None
        tied = words if config.tied else None
        self.head = word_head(
            config.head, width, spec.vocabulary_size, tied, spec.text_eps, activation=config.activation
        )
        self.one_modality, image = config.alone, None if config.alone else "clean"
        self.written: Decode | Fuse = Decode(Fuse(image, GIVEN), REST) if fused else Fuse(image, WHOLE_TEXT)
        self.view = REST if fused else WHOLE_TEXT
        self.needs = frozenset({self.written})
        self.views = {WHOLE_TEXT: PrefixView("whole")}
        if fused:
            self.views = {GIVEN: PrefixView("given"), REST: PrefixView("rest")}

    def count(self, batch: Batch) -> Tensor:
        return count_labels(batch, self.view)

    def chance(self, candidates: int) -> float:
        return math.log(self.vocabulary_size)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy of the next word, mean over the words that are not given."""
        found, text = results[self.written], batch.texts[self.view]
        tokens = found.text if isinstance(found, Fused) else found
        assert isinstance(tokens, Tokens) and text.labels is not None
        return word_loss(self.head, tokens.states, text.labels, text.label_at)
