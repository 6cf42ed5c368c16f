"""What infill, span_corruption and denoise share: of a text with gaps the decoder writes what is hidden, or all of it.

Shapes: T texts, L length, V vocabulary.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from encoders.layers import Activation
from encoders.types import Batch, Tokens
from objectives.base import Decode, Draw, Fuse, LossOutput, ModelSpec, Objective, Results, Side, View
from objectives.heads import WordHead, word_head
from objectives.mlm import count_labels, word_loss
from objectives.settings import ObjectiveSettings


class ReconstructSettings(ObjectiveSettings):
    """How the words are scored, and what is read beside the text."""

    head: WordHead = "bert"
    """What gives the word scores: BERT's prediction head, one linear map, that without a bias (BART, OFA), or T5's."""
    tied: bool = True
    """The output words are the decoder's word embedding."""
    activation: Activation = "gelu"
    """Activation inside BERT's prediction head."""
    alone: bool = False
    """Read the text without an image (T5, MASS)."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"memory"})

    def check(self, spec: ModelSpec, kind: str) -> None:
        """Raise ValueError if there is no fusion that reads the text, or no decoder that writes."""
        if spec.fusion == "none" or spec.decoder_width is None:
            raise ValueError(
                f"objective {kind} needs a fusion that reads the text and a decoder that writes; set "
                "model.fusion.kind single_stream and model.decoder {kind: causal, memory: both}"
            )


class Reconstruct(Objective):
    """Next-word prediction of what is written, given the text with gaps.

    Args:
        config: the objective's.
        spec: of a model with a fusion and a decoder.
        given: name and view of the text with gaps.
        written: name and view of what the decoder writes.
    """

    def __init__(
        self, config: ReconstructSettings, spec: ModelSpec, given: tuple[str, View], written: tuple[str, View]
    ) -> None:
        super().__init__()
        assert spec.decoder_width is not None
        self.vocabulary_size, self.one_modality = spec.vocabulary_size, config.alone
        tied, width = spec.decoder_words if config.tied else None, spec.decoder_width
        self.head = word_head(
            config.head, width, spec.vocabulary_size, tied, spec.text_eps, activation=config.activation
        )
        self.view = written[0]
        self.written = Decode(Fuse(None if config.alone else "clean", given[0]), self.view)
        self.needs = frozenset({self.written})
        self.views = dict([given, written])

    def count(self, batch: Batch) -> Tensor:
        return count_labels(batch, self.view)

    def chance(self, candidates: int) -> float:
        return math.log(self.vocabulary_size)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy of the next word, mean over the words that are written."""
        found, text = results[self.written], batch.texts[self.view]
        assert isinstance(found, Tokens) and text.labels is not None
        return word_loss(self.head, found.states, text.labels, text.label_at)
