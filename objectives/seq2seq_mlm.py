"""Sequence-to-sequence MLM: predict masked words of a caption from the image and the words before them.

How a masked model learns to write without a decoder (Dong et al. 2019, UniLM, section 2.3; OSCAR's and BEiT-3's
captioning): image tokens see the image, words see the image and the words up to themselves.
Shapes: T texts, L length, K labelled positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from encoders.precision import finest
from encoders.types import AttentionKind, Batch, Vocabulary
from objectives.base import Draw, Fuse, LossOutput, ModelSpec, Objective, Results, Side, ViewText
from objectives.heads import WordHead, labelled, word_head
from objectives.mlm import count_labels
from objectives.settings import ObjectiveSettings

VIEW = "seq2seq_mlm:caption"
"""The masked caption."""


class Seq2SeqMlmConfig(ObjectiveSettings):
    """Predict masked words left to right."""

    kind: Literal["seq2seq_mlm"] = "seq2seq_mlm"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    mask_probability: float = Field(0.7, gt=0, lt=1)
    """Share of the words, and the end, that are to be predicted (BEiT-3 0.7, OSCAR 0.15)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread over the other words (BEiT-3, OSCAR 0.1)."""
    drop_worst: float = Field(0.0, ge=0, lt=1)
    """Share of the words with the largest losses that is left out: captions that do not fit (BEiT-3 0.2)."""
    drop_worst_after: int = 0
    """Samples after which they are left out."""
    head: WordHead = "bert"
    """What gives the word scores: BERT's prediction head, or one linear map (BEiT-3)."""
    tied: bool = True
    """The output words are the text encoder's word embedding."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"text"})

    def build(self, spec: ModelSpec) -> Seq2SeqMlm:
        """Build the objective.

        Raises:
            ValueError: there is no fusion that reads the image.
        """
        if spec.fusion == "none":
            raise ValueError(
                "objective seq2seq_mlm needs a fusion, but model.fusion.kind is none; use single_stream or multiway"
            )
        return Seq2SeqMlm(self, spec)


@dataclass(frozen=True)
class Seq2SeqView:
    """BERT's corruption of a fixed share of the tokens behind the first, the end included; it is read left to right."""

    probability: float
    attention: AttentionKind = "causal"

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Mask one text [L], at least one token of it."""
        if vocabulary.mask is None:
            raise ValueError(
                "objective seq2seq_mlm needs a tokenizer with a mask token; this one has none, use another or lm"
            )
        length = len(ids)
        number = max(1, min(int(length * self.probability + 0.5), length - 1))
        order, how = generator.random(length), generator.random(length)
        words = generator.integers(0, vocabulary.size - len(vocabulary.special), length)
        for skipped in sorted(vocabulary.special):  # the n-th id that is not special
            words += words >= skipped
        order[0] = np.inf
        chosen = np.zeros(length, dtype=bool)
        chosen[np.argsort(order, kind="stable")[:number]] = True
        masked = np.where(how < 0.8, vocabulary.mask, np.where(how < 0.9, ids, words))
        return ViewText(np.where(chosen, masked, ids), np.where(chosen, ids, -100))


class Seq2SeqMlm(Objective):
    """Word prediction at masked positions that see the image and the words before them."""

    def __init__(self, config: Seq2SeqMlmConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.config, self.vocabulary_size = config, spec.vocabulary_size
        tied = spec.word_embedding if config.tied else None
        self.head = word_head(config.head, spec.text_width, spec.vocabulary_size, tied, spec.text_eps)
        self.states = Fuse(text=VIEW)
        self.needs = frozenset({self.states})
        self.views = {VIEW: Seq2SeqView(config.mask_probability)}

    def count(self, batch: Batch) -> Tensor:
        return count_labels(batch, VIEW)

    def chance(self, candidates: int) -> float:
        return math.log(self.vocabulary_size) - smoothed_entropy(self.config.label_smoothing, self.vocabulary_size)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Divergence from the smoothed targets, mean over the masked positions that count."""
        text = batch.texts[VIEW]
        assert text.labels is not None
        states, targets = labelled(results[self.states].text.states, text.labels, text.label_at)
        logits = self.head(states).float()
        losses = smoothed_divergence(logits, targets, self.config.label_smoothing)
        drop = self.config.drop_worst if batch.seen > self.config.drop_worst_after else 0.0
        real = targets != -100
        right = (logits.detach().argmax(1) == targets).sum()
        return LossOutput(mean_of_best(losses, real, drop), {"accuracy": right / real.sum().clamp(min=1)})


def smoothed_entropy(smoothing: float, words: int) -> float:
    """Entropy of a target that gives ``smoothing`` evenly to all words but the right one."""
    if smoothing == 0:
        return 0.0
    return -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing / (words - 1))


def smoothed_divergence(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Kullback-Leibler divergence [K] of predictions [K, V] from smoothed targets [K]; 0 where a target is -100."""
    words = logits.shape[1]
    logp = logits.log_softmax(1)
    right = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    other = (logp.sum(1) - right) / (words - 1)
    cross = -(1 - smoothing) * right - smoothing * other
    return (cross - smoothed_entropy(smoothing, words)).masked_fill(targets == -100, 0.0)


def mean_of_best(losses: Tensor, real: Tensor, drop: float) -> Tensor:
    """Mean of the ``real`` [K] losses [K] without the largest share ``drop`` of them; 0 if none is left.

    Their number is rounded down; it stays on the device.
    """
    count = real.sum()
    if drop > 0:
        kept = (count.to(finest(count.device)) * (1 - drop)).floor()
        losses = losses.masked_fill(~real, torch.inf).sort().values
        real = torch.arange(len(losses), device=losses.device) < kept
        count = kept
    return losses.masked_fill(~real, 0.0).sum() / count.clamp(min=1).to(losses.dtype)
