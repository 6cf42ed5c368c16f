"""Denoising: of a text with a hidden fragment, beside its image, the decoder writes the whole, or the fragment.

XGPT's image-conditioned denoising autoencoding, where one mask stands for a fragment whose length is not known, and
its image-conditioned masked language modelling, where each word has its mask (Xia et al. 2020, arXiv 2003.01473; of
texts alone Song et al. 2019, MASS).
Shapes: T texts, L length, V vocabulary.
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
from objectives.mlm import count_labels, word_loss
from objectives.settings import ObjectiveSettings


class DenoiseConfig(ObjectiveSettings):
    """Write a text, or its hidden fragment."""

    kind: Literal["denoise"] = "denoise"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    fragment: float = Field(0.5, gt=0, le=1)
    """Length of the fragment, of the text's; one token at least, beginning anywhere."""
    masks: Literal["one", "each"] = "one"
    """What stands for it: one mask, whatever its length, or a mask for each token."""
    write: Literal["text", "fragment"] = "text"
    """What the decoder writes."""
    head: WordHead = "bert"
    """What gives the word scores: BERT's prediction head, one linear map, or that without a bias."""
    tied: bool = True
    """The output words are the decoder's word embedding."""
    activation: Activation = "gelu"
    """Activation inside BERT's prediction head."""
    alone: bool = False
    """Read the text without an image (MASS)."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"memory"})

    def build(self, spec: ModelSpec) -> Denoise:
        """Build the objective.

        Raises:
            ValueError: there is no fusion that reads the text, or no decoder that writes.
        """
        if spec.fusion == "none" or spec.decoder_width is None:
            raise ValueError(
                "objective denoise needs a fusion that reads the text and a decoder that writes; set "
                "model.fusion.kind single_stream and model.decoder {kind: causal, memory: both}"
            )
        return Denoise(self, spec)


@dataclass(frozen=True)
class FragmentView:
    """A text whose fragment is hidden by one mask or by one each; or what is written: all of it, or the fragment."""

    part: Literal["one", "each", "text", "fragment"]
    share: float
    draws: str = "denoise"
    """One name for all parts, so that they hide the same."""

    @property
    def attention(self) -> AttentionKind:
        """Of the part."""
        return "full" if self.part in ("one", "each") else "causal"

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Make the view of one text [L] with its special ids."""
        if vocabulary.mask is None:
            raise ValueError(
                "objective denoise needs a tokenizer with a mask token; this one has none, use another, or set "
                "data.tokenizer.add_mask true"
            )
        words = np.flatnonzero(~np.isin(ids, [vocabulary.cls, vocabulary.sep, vocabulary.pad]))
        length = max(1, round(self.share * len(words)))
        first = int(generator.integers(max(1, len(words) - length + 1)))
        hidden = words[first : first + length]
        if self.part in ("one", "each"):
            given = ids.copy()
            given[hidden] = vocabulary.mask
            return ViewText(np.delete(given, hidden[1:]) if self.part == "one" else given)
        inner = ids[words if self.part == "text" else hidden]
        written = np.concatenate([[vocabulary.bos], inner, [vocabulary.eos]]).astype(np.int64)
        return ViewText(written, np.append(written[1:], -100))


class Denoise(Objective):
    """Next-word prediction of what is hidden in the text that the decoder reads."""

    def __init__(self, config: DenoiseConfig, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.decoder_width is not None
        self.vocabulary_size, self.one_modality = spec.vocabulary_size, config.alone
        tied = spec.decoder_words if config.tied else None
        width, words = spec.decoder_width, spec.vocabulary_size
        self.head = word_head(config.head, width, words, tied, spec.text_eps, activation=config.activation)
        # Views of other lengths of fragments are others.
        given, self.view = (f"denoise:{part}/{config.fragment:g}" for part in (config.masks, config.write))
        self.written = Decode(Fuse(None if config.alone else "clean", given), self.view)
        self.needs = frozenset({self.written})
        self.views = {
            given: FragmentView(config.masks, config.fragment),
            self.view: FragmentView(config.write, config.fragment),
        }

    def count(self, batch: Batch) -> Tensor:
        return count_labels(batch, self.view)

    def chance(self, candidates: int) -> float:
        return math.log(self.vocabulary_size)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy of the next word, mean over the words that are written."""
        found, text = results[self.written], batch.texts[self.view]
        assert isinstance(found, Tokens) and text.labels is not None
        return word_loss(self.head, found.states, text.labels, text.label_at)
