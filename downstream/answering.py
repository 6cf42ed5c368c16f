"""How a model answers a batch of questions: by its answer list, in its own words, or by ranking given answers.

Shapes: B questions, A answers, K of them ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from downstream.writing import fused_writer
from encoders.types import Batch, Tokens
from objectives.answer import Answer
from objectives.base import Fuse
from vlp.generate import GenerationConfig, generate_text, room_of
from vlp.model import Model
from vlp.passes import memory_of
from vlp.rank import answer_texts, rank_answers, share_probability

if TYPE_CHECKING:
    from vlp.run import Parts

Head: TypeAlias = Literal["closed", "open", "ranked"]
"""An answer list (ViLT, METER), the decoder's own words, or the best of given answers by the decoder (ALBEF, BLIP)."""

PAIRS = 4096
"""Most pairs of question and answer that the decoder reads at once."""


def answer_head(model: Model) -> Answer | None:
    """Return the objective with the answer list."""
    return next((one for one in model.objectives.values() if isinstance(one, Answer)), None)


class Answerer:
    """Answers batches of questions.

    Args:
        parts: the model, which has what ``head`` takes, and its tokenizer.
        head: how it answers; None: from its list, where it has one, else in its own words.
        generation: how answers are written (open).
        answers: to rank (ranked).
        k: of them, those whose first word is likeliest, which are scored as a whole.
    """

    def __init__(
        self,
        parts: Parts,
        head: Head | None,
        generation: GenerationConfig,
        answers: Sequence[str] = (),
        k: int = 128,
    ) -> None:
        self.model, self.tokenizer, self.head, self.generation = parts.model, parts.tokenizer, head, generation
        self.answers, self.k = answers, min(k, len(answers))
        if head == "ranked":
            length = parts.run.data.max_length
            self.texts = answer_texts(self.model, parts.tokenizer, answers, length, objective=fused_writer(self.model))

    def __call__(self, batch: Batch) -> list[tuple[str, float]]:
        """Return an answer to each question and how probable it is, among the list's or the K, or by its words."""
        fused = self.model.run([Fuse()], batch)[Fuse()]
        listed = answer_head(self.model)
        if listed is not None and self.head in ("closed", None):
            best = listed.scores(fused.pooled).max(1)
            chosen = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            return [(listed.config.answers[number], share) for number, share in chosen]
        assert self.model.decoder is not None
        memory = memory_of(fused, self.model.decoder.config.memory)
        return self._ranked(memory) if self.head == "ranked" else self._written(memory)

    def _written(self, memory: Tokens) -> list[tuple[str, float]]:
        length = min(self.generation.max_length, room_of(self.model))
        ids, scores = generate_text(
            self.model,
            memory,
            self.tokenizer.vocabulary,
            self.generation.model_copy(update={"max_length": length}),
            objective=fused_writer(self.model),
        )
        return [(self.tokenizer.decode(each), s) for each, s in zip(ids, scores.exp().tolist(), strict=True)]

    def _ranked(self, memory: Tokens) -> list[tuple[str, float]]:
        """Some questions at a time: each is read with K answers."""
        found: list[tuple[str, float]] = []
        size = max(1, PAIRS // self.k)
        for start in range(0, memory.states.shape[0], size):
            rows = slice(start, start + size)
            keep = None if memory.keep is None else memory.keep[rows]
            some = Tokens(memory.states[rows], keep, memory.pooled[rows], positions=memory.positions)
            best, scores = rank_answers(self.model, some, self.texts, self.k, objective=fused_writer(self.model))
            shares = share_probability(scores)[:, 0].tolist()
            found += [(self.answers[n], share) for n, share in zip(best[:, 0].tolist(), shares, strict=True)]
        return found
