"""Tasks as text: words before a text say what is asked of it, and what is to be written stands beside it (T5, VL-T5).

The decoder writes the answer in the text view "lm:answer" (objective lm with that view and a fused memory).
Shapes: L ids of a text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from objectives.base import ViewText
from vlp.data.pairing import TRUE
from vlp.data.reader import BadSample, Sample
from vlp.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from vlp.data.batch import Example

ANSWER, MATCH = "lm:answer", "match"
"""View of what is written; the field that says whether a pair is true."""
DESCRIBE = " what does the image describe?"
"""What OFA is asked for a caption; its texts begin with a space."""


def ask(
    example: Example, sample: Sample, prefix: str | None, answer: str | None, generator: np.random.Generator
) -> Example:
    """Put a task's words before an example's text, and what is to be written beside it.

    Args:
        example: with its text, true or false.
        sample: what it was made of.
        prefix: the words; None: none.
        answer: field of what is written, a text, a list of them or scores by text, of which one is drawn in proportion;
            "match": the words true and false, by whether the pair is true. None: nothing is.
        generator: keyed by the sample's position.

    Raises:
        BadSample: the sample has no such field.
    """
    example = replace(example, prefix=prefix)
    if answer is None:
        return example
    if answer == MATCH and MATCH in example.targets:
        written = "true" if int(example.targets[MATCH]) == TRUE else "false"
    else:
        written = _drawn(sample.key, answer, sample.fields.get(answer), generator)
    return replace(example, other_texts={**example.other_texts, ANSWER: written})


def _drawn(key: str, field: str, found: object, generator: np.random.Generator) -> str:
    """One of the texts of a field."""
    scores = {found: 1.0} if isinstance(found, str) else found
    if isinstance(scores, list | tuple):
        scores = count_answers(scores)
    if not isinstance(scores, Mapping) or not scores:
        raise BadSample(key, f"no {field}, which is to be written")
    try:
        scores = {str(text): float(score) for text, score in scores.items()}
    except (TypeError, ValueError) as error:
        raise BadSample(key, f"{field} has scores that are no numbers: {error}") from error
    if min(scores.values()) < 0 or not 0 < sum(scores.values()) < np.inf:
        raise BadSample(key, f"{field} has scores below 0, or none above")
    return draw_text(scores, generator)


def count_answers(answers: Iterable[object]) -> Counter[str]:
    """Return how many gave each answer, of a list of texts or of VQA's mappings with a text each."""
    return Counter(str(one.get("answer", "") if isinstance(one, Mapping) else one) for one in answers)


def draw_text(scores: Mapping[str, float], generator: np.random.Generator) -> str:
    """Return one of the texts, drawn in proportion to its score (>= 0, one > 0)."""
    weights = np.array(list(scores.values()))
    return list(scores)[int(generator.choice(len(weights), p=weights / weights.sum()))]


def prefix_ids(tokenizer: Tokenizer, prefix: str | None, max_length: int) -> npt.NDArray[np.int64]:
    """Ids of the words before a text, without special ones, [L]."""
    if prefix is None:
        return np.zeros(0, dtype=np.int64)
    ids, _ = tokenizer.encode(prefix, max_length)
    return ids[~np.isin(ids, list(tokenizer.vocabulary.special))]


def prefixed(tokenizer: Tokenizer, texts: Iterable[str], prefix: str | None, max_length: int) -> list[ViewText]:
    """Return texts as they are read, behind the words before them, with special ids; ``max_length`` is of both."""
    before = prefix_ids(tokenizer, prefix, max_length)
    length = max(max_length - len(before), 3)
    return [put_before(ViewText(tokenizer.encode(text, length)[0]), before, tokenizer.begins) for text in texts]


def put_before(text: ViewText, prefix: npt.NDArray[np.int64], begins: bool) -> ViewText:
    """Lay ids before a text's words, behind the id that begins texts where there is one; nothing predicts them."""
    if not len(prefix):
        return text
    at = int(begins)
    return ViewText(
        np.insert(text.ids, at, prefix),
        None if text.labels is None else np.insert(text.labels, at, np.full(len(prefix), -100)),
        None if text.prefix is None else text.prefix + len(prefix),
    )
