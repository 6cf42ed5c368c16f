"""GQA's metrics as its published evaluation (eval.py of the data set) defines them (Hudson and Manning, CVPR 2019).

Shares are in [0, 1] (eval.py prints percents); the distribution is eval.py's number itself. Grounding, which asks for
attention maps and scene graphs, is not computed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COMMON = ("color", "material", "shape")
"""What questions about things in common may be answered with, whatever the file of choices says."""


@dataclass(frozen=True)
class GqaQuestion:
    """What is known of a question besides its image."""

    question: str
    answer: str
    structural: str = ""
    """verify, query, choose, logical or compare; all but query are "binary"."""
    semantic: str = ""
    """attr, cat, global, obj or rel."""
    detailed: str = ""
    steps: int | None = None
    """Reasoning steps."""
    group: str | None = None
    """Questions whose answers' distribution is compared as one; None: not compared."""
    balanced: bool = True
    """Whether it is scored; the others only show consistency."""
    entailed: tuple[str, ...] = ()
    """Ids of the questions whose answers follow from this one's."""


def gqa_metrics(
    questions: Mapping[str, GqaQuestion],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> dict[str, float]:
    """Score one answer a question, compared as it is.

    Accuracy is the share of balanced questions answered right, ``binary`` and ``open`` of those that ask for yes, no
    or one of two things, and of the others. Consistency is the mean, over the balanced questions that were answered
    right and entail others, of the share of these others answered right. Validity and plausibility are the shares of
    answers among the question's ``valid`` and ``plausible`` choices. The distribution (0 is best) is the chi-square
    statistic sum((predicted - true)^2 / true) over the true answers of each group, averaged over groups by their
    number of questions, over 100.

    Args:
        questions: by id; at least one is balanced.
        predictions: answers of all questions, by id.
        choices: by id, the lists ``valid`` and ``plausible`` (val_choices.json).

    Returns:
        accuracy, binary, open, distribution where questions have groups, consistency where all entailed questions are
        there, validity and plausibility with choices, and accuracy by structural type, semantic type, steps and words.

    Raises:
        ValueError: a question has no prediction, or none is balanced, or choices lack a question.
    """
    scored = {key: one for key, one in questions.items() if one.balanced}
    if not scored:
        raise ValueError("questions: none is balanced, so there is nothing to score; give GQA's balanced questions too")
    if missing := questions.keys() - predictions.keys():
        raise ValueError(f"predictions: {len(missing)} questions have none, as {min(missing)}; answer every question")
    right = {key: float(predictions[key] == one.answer) for key, one in questions.items()}
    means = _Means()
    for key, one in scored.items():
        means.add("accuracy", right[key])
        means.add("open" if one.structural == "query" else "binary", right[key] if one.structural else None)
        kinds = {"structural": one.structural, "semantic": one.semantic, "steps": one.steps}
        for name, kind in (kinds | {"words": len(one.question.split())}).items():
            means.add(f"accuracy/{name}/{kind}", None if kind in (None, "") else right[key])
        if choices is not None:
            for name, listed in (("validity", "valid"), ("plausibility", "plausible")):
                means.add(name, float(predictions[key] in _choices(choices, key, one, listed)))
    found = means.all()
    consistency = _consistency(scored, questions, right)
    found |= {} if consistency is None else {"consistency": consistency}
    distance = _chi_square(scored, predictions)
    return found | ({} if distance is None else {"distribution": distance / 100})


def _choices(
    choices: Mapping[str, Mapping[str, Sequence[str]]], key: str, question: GqaQuestion, listed: str
) -> Sequence[str]:
    if "Common" in question.detailed:
        return COMMON
    try:
        return choices[key][listed]
    except (KeyError, TypeError) as error:
        raise ValueError(f"choices: question {key} has no list {listed!r}; give the choices of this split") from error


def _consistency(
    scored: Mapping[str, GqaQuestion], questions: Mapping[str, GqaQuestion], right: Mapping[str, float]
) -> float | None:
    """None where no question entails others, or the others are not all there."""
    entailing = {key: [one for one in q.entailed if one != key] for key, q in scored.items()}
    if not any(entailing.values()) or not all(one in questions for others in entailing.values() for one in others):
        return None
    shares = [
        sum(right[one] for one in others) / len(others) for key, others in entailing.items() if others and right[key]
    ]
    return sum(shares) / len(shares) if shares else 0.0


def _chi_square(scored: Mapping[str, GqaQuestion], predictions: Mapping[str, str]) -> float | None:
    true: defaultdict[str, Counter[str]] = defaultdict(Counter)
    given: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for key, one in scored.items():
        if one.group is not None:
            true[one.group][one.answer] += 1
            given[one.group][predictions[key]] += 1
    total = sum(counts.total() for counts in true.values())
    if not total:
        return None
    return (
        sum(
            counts.total() * sum((given[group][answer] - count) ** 2 / count for answer, count in counts.items())
            for group, counts in true.items()
        )
        / total
    )


class _Means:
    """Means of values by name; None is no value."""

    def __init__(self) -> None:
        self.values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float | None) -> None:
        if value is not None:
            self.values[name].append(value)

    def all(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in sorted(self.values.items())}
