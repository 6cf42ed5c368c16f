"""Language modelling (LM): write the caption of the image left to right (Li et al. 2022, BLIP, section 3.2).

Shapes: T texts, L length, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from encoders.types import AttentionKind, Batch, Vocabulary
from objectives.base import Decode, Draw, Encode, Fuse, LossOutput, ModelSpec, Objective, Pass, Results, Side, ViewText
from objectives.heads import VocabularyHead
from objectives.mlm import count_labels, word_loss
from vlp.config import Config


class LmConfig(Config):
    """Caption (or answer) the image with the decoder."""

    kind: Literal["lm"] = "lm"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    label_smoothing: float = 0.0
    """Share of the target spread over the vocabulary (BLIP 0.1)."""
    memory: Literal["image", "fused"] = "image"
    """What the decoder reads: the image tokens (captioning), or the fused question (generative VQA)."""
    view: str = "causal"
    """Text that is written: the caption, or `lm:answer` for the answers of generative VQA."""
    tied: bool = True
    """The output words are the text encoder's word embedding."""

    trains_embed: ClassVar[bool] = False

    @property
    def reads(self) -> frozenset[Side]:
        """Sides of the fusion that it reads: the decoder's memory, where that is fused."""
        return frozenset({"memory"} if self.memory == "fused" else ())

    def build(self, spec: ModelSpec) -> Lm:
        """Build the objective.

        Raises:
            ValueError: there is no decoder, or no fusion for the decoder to read.
        """
        if spec.decoder_width is None:
            raise ValueError("objective lm needs a decoder; set model.decoder.kind causal or remove lm")
        if self.memory == "fused" and spec.fusion == "none":
            raise ValueError(
                "objectives.lm.memory fused needs a fusion, but model.fusion.kind is none; use memory image"
            )
        return Lm(self, spec)


@dataclass(frozen=True)
class CausalView:
    """The text as a generator sees it: bos, words, eos; each position's label is the next token."""

    attention: AttentionKind = "causal"

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Make the view of one text [L] that begins with cls and ends with sep."""
        inner = ids[~np.isin(ids, [vocabulary.cls, vocabulary.sep, vocabulary.pad])]
        written = np.concatenate([[vocabulary.bos], inner, [vocabulary.eos]]).astype(np.int64)
        return ViewText(written, np.append(written[1:], -100))


class Lm(Objective):
    """Next-word prediction by the decoder."""

    def __init__(self, config: LmConfig, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.decoder_width is not None
        self.config, self.vocabulary_size = config, spec.vocabulary_size
        self.head = VocabularyHead(
            spec.decoder_width, spec.vocabulary_size, spec.word_embedding if config.tied else None, eps=spec.text_eps
        )
        self.memory: Encode | Fuse = Encode("image") if config.memory == "image" else Fuse()
        self.written = Decode(self.memory, config.view)
        self.needs: frozenset[Pass] = frozenset({self.written})
        self.views = {config.view: CausalView()}

    def count(self, batch: Batch) -> Tensor:
        return count_labels(batch, self.config.view)

    def chance(self, candidates: int) -> float:
        return math.log(self.vocabulary_size)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy of the next word, mean over the words."""
        text = batch.texts[self.config.view]
        assert text.labels is not None
        return word_loss(
            self.head, results[self.written].states, text.labels, text.label_at, self.config.label_smoothing
        )
