"""Choosing among given answers by how likely the decoder finds them (ALBEF, section 5; BLIP's VQA).

Scoring every answer of a long list is dear: those whose first word is likeliest are scored as a whole.
Shapes: B memory rows, A answers, K of them ranked, L text length, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from encoders.types import Batch, Texts, Tokens
from objectives.base import Draw
from objectives.lm import text_losses
from vlp.data.batch import pad_texts
from vlp.data.tokenizer import Tokenizer
from vlp.generate import writer_of
from vlp.model import Model


@torch.no_grad()
def rank_answers(
    model: Model,
    memory: Tokens,
    answers: Texts,
    k: int,
    *,
    objective: str | None = None,
    first_twice: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Rank a list of answers for each row of ``memory`` with a model's decoder.

    Args:
        model: in evaluation mode; an objective of kind lm owns the head. Its label smoothing counts here too, as in
            the references.
        memory: what the decoder reads (a fused question), states [B, S, D].
        answers: [A, L] a causal view with labels: each begins with bos.
        k: answers whose first word is likeliest, which are scored as a whole.
        objective: name of the objective whose head scores; needed where there are several of kind lm.
        first_twice: count the first word's log-probability once more, as ALBEF's ranking does; None: as the objective's
            `first_word` says.

    Returns:
        The rows of ``answers`` [B, K], best first, and their scores [B, K]: minus the sum of their words' losses.

    Raises:
        ValueError: the model cannot score texts, or there are fewer answers than ``k``.
    """
    decoder, writer = writer_of(model, objective)
    if decoder is None:
        raise ValueError("answers are ranked by a decoder, but model.decoder is none; let the model write them instead")
    number, rows = answers.ids.shape[0], memory.states.shape[0]
    if not 1 <= k <= number:
        raise ValueError(f"k {k} of {number} answers cannot be ranked; choose 1 to {number}")
    assert answers.labels is not None
    begin = Texts(answers.ids[:1, :1].expand(rows, -1), answers.keep[:1, :1].expand(rows, -1), "causal")
    first = writer.head(decoder(begin, memory).states[:, 0]).float().log_softmax(1)  # [B, V]
    first_scores, chosen = first.index_select(1, answers.ids[:, 1]).topk(k)  # [B, K]
    taken = chosen.flatten()
    texts = replace(
        answers, ids=answers.ids[taken], keep=answers.keep[taken], labels=answers.labels[taken], label_at=None
    )
    index = torch.arange(rows, device=taken.device).repeat_interleave(k)
    states = decoder(texts, memory, index).states  # [B x K, L, D]
    scores = -text_losses(writer.head, states, texts, writer.config.label_smoothing).unflatten(0, (rows, k))
    if first_twice or (first_twice is None and writer.config.first_word == "twice"):
        scores = scores + first_scores
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order), scores


def answer_texts(
    model: Model, tokenizer: Tokenizer, answers: Sequence[str], length: int, *, objective: str | None = None
) -> Texts:
    """Return answers as an objective of kind lm writes them, labels included, on the model's device: what is ranked.

    Args:
        model: whose objective it is.
        tokenizer: of the model.
        answers: texts.
        length: most ids of one, the special ones included.
        objective: name of the objective; needed where there are several of kind lm.

    Raises:
        ValueError: there are no answers, or the model cannot write.
    """
    if not answers:
        raise ValueError("answers is empty; give at least one")
    _, writer = writer_of(model, objective)
    view, generator = writer.views[writer.config.view], Draw().sample("", 0)  # which this view does not draw from
    made = [view.make(*tokenizer.encode(text, length), tokenizer.vocabulary, generator) for text in answers]
    texts = pad_texts(made, "causal", tokenizer.vocabulary.pad)
    return Batch(texts={"": texts}).to(model.device).texts[""]


def share_probability(scores: Tensor) -> Tensor:
    """Scores [B, K] of ranked answers -> their probabilities among these K, [B, K]."""
    return scores.softmax(1)
