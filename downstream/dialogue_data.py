"""A question of a dialogue as the data have it, and the texts that a model reads of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from downstream.task import only_text
from vlp.data.reader import BadSample, Sample

CARRIED = ("image_id", "round_id", "split")
"""Fields that predictions carry on."""


@dataclass(frozen=True)
class Round:
    """One question of a dialogue."""

    question: str
    caption: str
    history: tuple[tuple[str, str], ...]
    """Questions and answers before it, oldest first."""
    options: tuple[str, ...]
    """Candidate answers; empty where none are given."""
    answer: int | None
    """Which of them was given; None where unknown."""
    relevance: tuple[float, ...] | None
    """Of each candidate, where there are dense annotations."""


def read_round(sample: Sample) -> Round:
    """Return the question of a sample; list fields may be JSON, as in a csv.

    Raises:
        BadSample: a field holds something else than it should.
    """
    key, fields = sample.key, sample.fields
    options, history, relevance = (_list(key, fields, name) for name in ("options", "history", "relevance"))
    if not all(isinstance(option, str) for option in options):
        raise BadSample(key, "options are not texts")
    if not all(isinstance(one, list | tuple) and len(one) == 2 for one in history):
        raise BadSample(key, "history is not a list of pairs, question and answer")
    if relevance and len(relevance) != len(options):
        raise BadSample(key, f"{len(options)} options have {len(relevance)} relevances")
    answer = fields.get("answer_index")
    try:
        chosen = None if answer in (None, "") else int(answer)
        dense = tuple(float(one) for one in relevance) or None
    except (TypeError, ValueError) as error:
        raise BadSample(key, f"answer_index and relevance should be numbers: {error}") from error
    if chosen is not None and not 0 <= chosen < len(options):
        raise BadSample(key, f"answer_index {chosen} is none of its {len(options)} options")
    pairs = tuple((str(question), str(reply)) for question, reply in history)
    return Round(only_text(sample), str(fields.get("caption") or ""), pairs, tuple(options), chosen, dense)


def _list(key: str, fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadSample(key, f"{name} {value[:40]!r} is not JSON: {error}") from error
    if value in (None, ""):
        return []
    if not isinstance(value, list | tuple):
        raise BadSample(key, f"{name} is not a list")
    return list(value)


def context(one: Round, rounds: int) -> str:
    """Return the question and, newest first, what was said before; the caption of the image last."""
    return " ".join([_ended(one.question, "?"), *_before(one, rounds)])


def with_candidate(one: Round, option: str, rounds: int) -> str:
    """Return the same with a candidate answer behind the question, where no cut reaches it."""
    return " ".join([_ended(one.question, "?"), _ended(option, "."), *_before(one, rounds)])


def _before(one: Round, rounds: int) -> list[str]:
    newest = one.history[len(one.history) - min(rounds, len(one.history)) :][::-1]
    said = [part for question, reply in newest for part in (_ended(question, "?"), _ended(reply, "."))]
    return [*said, *([_ended(one.caption, ".")] if one.caption.strip() else [])]


def _ended(text: str, mark: str) -> str:
    text = text.strip()
    return text if text[-1:] in ("?", ".", "!") else text + mark
