"""Masked language modelling (MLM), with the image where there is a fusion (Devlin et al. 2019, section 3.1).

A share of the target may be what the momentum teacher believes (Li et al. 2021, ALBEF, eq. 7).
Shapes: T texts, L length, K labelled positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import Activation
from encoders.types import AttentionKind, Batch, Tokens, Vocabulary
from objectives.base import Draw, Encode, Fuse, Fused, LossOutput, ModelSpec, Objective, Results, Side, ViewText
from objectives.distill import DistillConfig, Taught, soft_cross_entropy
from objectives.heads import WordHead, labelled, word_head
from objectives.pairs import matched
from objectives.spans import drawn_words, with_spans

Share: TypeAlias = Annotated[float, Field(gt=0, le=1)]


class MlmConfig(DistillConfig):
    """Predict masked words."""

    kind: Literal["mlm"] = "mlm"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    mask_probability: float = Field(0.15, gt=0, lt=1)
    """Share of words that are to be predicted."""
    whole_word: bool = False
    """Mask all pieces of a word together."""
    segment: bool = False
    """Mask a segment, tokens that follow each other, in place of words here and there: it begins at any of the text's
    tokens and ends at any, drawn evenly (InterBERT); `mask_probability` is not read then."""
    spans: dict[str, Share] = Field(default_factory=dict)
    """Share of the spans of each kind, which `data.spans` names in the captions, that are masked whole beside other
    words (ERNIE-ViL: objects, attributes and relations of a scene graph)."""
    tied: bool = True
    """The output words are the text encoder's word embedding."""
    head: WordHead = "bert"
    """What gives the word scores: BERT's prediction head, or one linear map (BEiT-3)."""
    activation: Activation = "gelu"
    """Activation inside BERT's prediction head."""
    eps: float | None = None
    """Epsilon of the norm inside BERT's prediction head; none = the text encoder's."""
    alone: bool = False
    """Read the text without its image also where there is a fusion (VLMo's text stage, FLAVA's texts)."""
    unpaired: bool = False
    """Only texts without images train it, so that it is alone (FLAVA, whose pairs train MMM instead)."""
    matched: bool = False
    """Of the pairs only the true ones train it, by ``targets["match"]`` (FLAVA)."""
    image: Literal["clean", "masked"] = "clean"
    """The image beside it: the whole one, or that with hidden regions (ViLBERT, LXMERT)."""
    image_labels: bool = False
    """Labels may go on over the image's tokens, behind the text's (VisualBERT in transformers)."""

    trains_embed: ClassVar[bool] = False

    @property
    def reads(self) -> frozenset[Side]:
        """Sides of the fusion that it reads."""
        return frozenset({"text", "image"} if self.image_labels else {"text"})

    def build(self, spec: ModelSpec) -> Mlm:
        """Build the objective."""
        return Mlm(self, spec)


@dataclass(frozen=True)
class MaskedView:
    """BERT's corruption: of the chosen positions 80 % become [MASK], 10 % a random word, 10 % stay."""

    probability: float
    whole_word: bool
    attention: AttentionKind = "full"
    segment: bool = False
    """The chosen positions follow each other."""

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Mask one text [L]; special ids are never masked and never drawn."""
        if vocabulary.mask is None:
            raise ValueError(
                "objective mlm needs a tokenizer with a mask token; this one has none, use another or remove mlm"
            )
        length = len(ids)
        # A fixed number of draws per position, so that masks depend on nothing else.
        choose, how = generator.random(length), generator.random(length)
        words = drawn_words(vocabulary, length, generator)
        special = np.isin(ids, list(vocabulary.special))
        if self.segment:
            choose = _outside(np.flatnonzero(~special), length, *generator.random(2))
        if self.whole_word:
            first = np.maximum.accumulate(np.where(word_starts, np.arange(length), 0))
            choose = choose[first]
        chosen = (choose < self.probability) & ~special
        masked = np.where(how < 0.8, vocabulary.mask, np.where(how < 0.9, words, ids))
        return ViewText(np.where(chosen, masked, ids), np.where(chosen, ids, -100))


def _outside(words: np.ndarray, length: int, begin: float, size: float) -> np.ndarray:
    """0 in a segment of the positions ``words`` [W], 1 elsewhere -> [L]; texts of less than four words have none.

    It begins before any of them or behind the last, ``begin`` in 0..1 says where, has ``size`` of W + 1, at least one,
    and stops with the text (as InterBERT's code draws it).
    """
    found = np.ones(length)
    if len(words) >= 4:
        first = int(begin * (len(words) + 1))
        found[words[first : first + 1 + int(size * len(words))]] = 0
    return found


class Mlm(Objective):
    """Word prediction at masked positions only."""

    def __init__(self, config: MlmConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.config, self.vocabulary_size = config, spec.vocabulary_size
        self.one_modality, self.unpaired = config.alone or config.unpaired, config.unpaired
        self.fused = spec.fusion != "none" and not self.one_modality
        tied = spec.word_embedding if config.tied else None
        eps = spec.text_eps if config.eps is None else config.eps
        self.head = word_head(
            config.head, spec.text_width, spec.vocabulary_size, tied, eps, activation=config.activation
        )
        self.states: Fuse | Encode = Fuse(config.image, "masked") if self.fused else Encode("text", "masked")
        self.taught = replace(self.states, teacher=True) if config.distill else None
        self.teaches_head = self.taught is not None
        self.needs = frozenset({one for one in (self.states, self.taught) if one is not None})
        masked = MaskedView(config.mask_probability, config.whole_word, segment=config.segment)
        self.views = {"masked": with_spans(masked, config.spans)}

    def count(self, batch: Batch) -> Tensor:
        return (self._labels(batch) != -100).sum()

    def _labels(self, batch: Batch) -> Tensor:
        """[T, L], without those of false pairs where they do not count."""
        labels = batch.texts["masked"].labels
        assert labels is not None
        return torch.where(matched(batch)[:, None], labels, -100) if self.config.matched and self.fused else labels

    def chance(self, candidates: int) -> float:
        return math.log(self.vocabulary_size)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy over the vocabulary, mean over the masked positions."""
        text, taught = batch.texts["masked"], None
        if self.taught is not None and (share := self.config.share(batch.seen)):
            taught = Taught(results.teacher_head(self.name), self._read(results[self.taught]), share)
        labels = self._labels(batch)
        return word_loss(self.head, self._read(results[self.states]), labels, text.label_at, taught=taught)

    def _read(self, found: Fused | Tokens) -> Tensor:
        """States that the labels are of, [T, L, D]."""
        if isinstance(found, Tokens):
            return found.states
        assert found.text is not None
        if not self.config.image_labels or found.image is None:
            return found.text.states
        return torch.cat([found.text.states, found.image.states], 1)


def count_labels(batch: Batch, view: str) -> Tensor:
    """Return the number of labels of a view, a scalar on the device."""
    labels = batch.texts[view].labels
    assert labels is not None
    return (labels != -100).sum()


def word_loss(
    head: nn.Module,
    states: Tensor,
    labels: Tensor,
    label_at: Tensor | None,
    smoothing: float = 0.0,
    taught: Taught | None = None,
) -> LossOutput:
    """Cross-entropy of words at labelled positions, mean over the labels (0 if there is none)."""
    own, targets = labelled(states, labels, label_at)
    logits = head(own).float()
    total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    count = (targets != -100).sum().clamp(min=1)
    right = (logits.detach().argmax(1) == targets).sum()
    if taught is not None:
        with torch.no_grad():
            believed = taught.head(labelled(taught.states, labels, label_at)[0])
        soft = (soft_cross_entropy(logits, believed) * (targets != -100)).sum()
        total = total + taught.share * (soft - total)
    return LossOutput(total / count, {"accuracy": right / count})
