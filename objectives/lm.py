"""Language modelling (LM): write the caption of the image left to right (Li et al. 2022, BLIP, section 3.2).

Shapes: T texts, L length, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import Activation
from encoders.types import AttentionKind, Batch, Texts, Tokens, Vocabulary
from objectives.base import (
    Decode,
    Draw,
    Encode,
    Fuse,
    Fused,
    LossOutput,
    ModelSpec,
    Objective,
    Pass,
    Results,
    Side,
    ViewText,
)
from objectives.distill import DistillConfig, Taught, soft_cross_entropy
from objectives.heads import WordHead, labelled, word_head
from objectives.mlm import word_loss


class LmConfig(DistillConfig):
    """Caption (or answer) the image with the decoder."""

    kind: Literal["lm"] = "lm"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    label_smoothing: float = 0.0
    """Share of the target spread over the vocabulary (BLIP 0.1)."""
    memory: Literal["image", "fused", "beside"] = "image"
    """What the decoder reads: the image tokens (captioning), or the fused question (generative VQA). `beside`: there is
    no decoder, the text that is written is itself fused with the image, left to right (GIT, SimVLM)."""
    view: str = "causal"
    """Text that is written: the caption; `lm:answer` for the answers of generative VQA; or `clean`, as the text encoder
    reads it, whose first and last ids are then bos and eos (CoCa: one pass for contrast and caption)."""
    head: WordHead = "bert"
    """What gives the word scores: BERT's prediction head, one linear map (GIT), or that without a bias (CoCa)."""
    tied: bool = True
    """The output words are the decoder's word embedding."""
    activation: Activation = "gelu"
    """Activation inside the head."""
    prompt: tuple[int, ...] = ()
    """Ids that every text begins with after bos: given, not predicted (BLIP's captions: "a picture of")."""
    mean: Literal["words", "texts"] = "words"
    """`words`: over all words. `texts`: a text's words are summed and times its weight, over what the texts belong to:
    questions, or images (ALBEF's and BLIP's VQA)."""
    first_word: Literal["once", "twice"] = "once"
    """How often a candidate's first word counts where given answers are ranked (ALBEF, X-VLM: twice)."""

    trains_embed: ClassVar[bool] = False

    @property
    def reads(self) -> frozenset[Side]:
        """Sides of the fusion that it reads: the decoder's memory, where that is fused."""
        return frozenset({"memory"} if self.memory == "fused" else {"text"} if self.memory == "beside" else ())

    def build(self, spec: ModelSpec) -> Lm:
        """Build the objective.

        Raises:
            ValueError: there is no decoder, or no fusion for the decoder to read.
        """
        if self.memory == "beside":
            if "causal" not in spec.fusion_attention:
                raise ValueError(
                    "objectives.lm.memory beside writes with the fusion, which must read texts left to right, but "
                    f"model.fusion.kind {spec.fusion} does not; use single_stream with words_see none, or a "
                    "decoder and memory image"
                )
        elif spec.decoder_width is None:
            raise ValueError("objective lm needs a decoder; set model.decoder.kind causal or remove lm")
        if self.memory == "fused" and spec.fusion == "none":
            raise ValueError(
                "objectives.lm.memory fused needs a fusion, but model.fusion.kind is none; use memory image"
            )
        return Lm(self, spec)


@dataclass(frozen=True)
class CausalView:
    """The text as a generator sees it: bos, prompt, words, eos; the label is the next token, none within the prompt."""

    attention: AttentionKind = "causal"
    prompt: tuple[int, ...] = ()

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Make the view of one text [L] that begins with cls and ends with sep."""
        inner = ids[~np.isin(ids, [vocabulary.cls, vocabulary.sep, vocabulary.pad])]
        written = np.concatenate([[vocabulary.bos], self.prompt, inner, [vocabulary.eos]]).astype(np.int64)
        labels = np.append(written[1:], -100)
        labels[: len(self.prompt)] = -100
        return ViewText(written, labels)


class Lm(Objective):
    """Next-word prediction by the decoder."""

    def __init__(self, config: LmConfig, spec: ModelSpec) -> None:
        super().__init__()
        beside = config.memory == "beside"
        width, words = spec.decoder_width, spec.decoder_words
        if beside:
            width, words = spec.text_width, spec.word_embedding
        assert width is not None
        self.config, self.vocabulary_size = config, spec.vocabulary_size
        tied = words if config.tied else None
        self.head = word_head(
            config.head, width, spec.vocabulary_size, tied, spec.text_eps, activation=config.activation
        )
        self.memory: Encode | Fuse = Encode("image") if config.memory == "image" else Fuse()
        self.written: Decode | Fuse = Fuse(text=config.view) if beside else Decode(self.memory, config.view)
        self.taught = replace(self.written, teacher=True)
        self.teaches_head = config.distill > 0
        self.needs: frozenset[Pass] = frozenset({self.written, self.taught} if self.teaches_head else {self.written})
        if config.view != "clean":
            self.views = {config.view: CausalView(prompt=config.prompt)}

    def count(self, batch: Batch) -> Tensor | float:
        if self.config.mean == "texts":
            return self._owners(batch)
        labels = self._text(batch).labels
        assert labels is not None
        return (labels != -100).sum()

    def _text(self, batch: Batch) -> Texts:
        """The text that is written, with its labels."""
        text = batch.texts[self.config.view]
        if self.config.view != "clean" or text.labels is not None:
            return text
        following = torch.where(text.keep[:, 1:], text.ids[:, 1:], -100)
        return replace(text, labels=F.pad(following, (0, 1), value=-100))

    @staticmethod
    def _states(found: Tokens | Fused) -> Tensor:
        """States of the written text, [T, L, D]."""
        tokens = found.text if isinstance(found, Fused) else found
        assert tokens is not None
        return tokens.states

    def _owners(self, batch: Batch) -> float:
        """How many images or questions the texts belong to."""
        text = batch.texts[self.config.view]
        if text.owner is None:
            return float(text.ids.shape[0])
        return float(batch.texts["clean"].ids.shape[0] if self.config.memory == "fused" else batch.num_images)

    def chance(self, candidates: int) -> float:
        return math.log(self.vocabulary_size)

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """Cross-entropy of the next word, mean over the words or over what the texts belong to."""
        if self.config.mean == "texts":
            losses, weight = self.losses(results, batch), batch.texts[self.config.view].weight
            return LossOutput((losses if weight is None else losses * weight).sum() / self._owners(batch))
        text, states = self._text(batch), self._states(results[self.written])
        assert text.labels is not None
        smoothing, taught = self.config.label_smoothing, self._taught(results, batch)
        return word_loss(self.head, states, text.labels, text.label_at, smoothing, taught)

    def losses(self, results: Results, batch: Batch) -> Tensor:
        """Return each text's loss before its weight, summed over its words, [T]."""
        text, states = self._text(batch), self._states(results[self.written])
        return text_losses(self.head, states, text, self.config.label_smoothing, self._taught(results, batch))

    def _taught(self, results: Results, batch: Batch) -> Taught | None:
        if share := self.config.share(batch.seen):
            return Taught(results.teacher_head(self.name), self._states(results[self.taught]), share)
        return None


def text_losses(
    head: nn.Module, states: Tensor, text: Texts, smoothing: float = 0.0, taught: Taught | None = None
) -> Tensor:
    """Return each text's cross-entropy, summed over its labelled words, [T].

    Args:
        head: states [..., D] -> logits [..., V].
        states: [T, L, D].
        text: with labels [T, L].
        smoothing: share of the target spread over the vocabulary.
        taught: what the momentum teacher says, if anything.
    """
    assert text.labels is not None
    picked, targets = labelled(states, text.labels, text.label_at)  # [K, D], [K]
    logits = head(picked).float()
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    if taught is not None:
        with torch.no_grad():
            believed = taught.head(labelled(taught.states, text.labels, text.label_at)[0])
        losses = losses.lerp(soft_cross_entropy(logits, believed) * (targets != -100), taught.share)
    number, length = text.labels.shape
    if text.label_at is None:
        return losses.unflatten(0, (number, length)).sum(1)
    rows = text.label_at.clamp(min=0) // length  # padding has no loss
    return losses.new_zeros(number).index_add(0, rows, losses)
