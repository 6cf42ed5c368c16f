"""Multiple choice in steps: VCR's three accuracies (Zellers et al. 2019, section 2)."""

from __future__ import annotations

from collections.abc import Mapping


def vcr_metrics(answers: Mapping[str, bool], rationales: Mapping[str, bool]) -> dict[str, float]:
    """Return the shares of questions whose answer, rationale and both are right; those without any sample are left out.

    Args:
        answers: question -> whether the right answer was chosen.
        rationales: question -> whether the right rationale was chosen, given the right answer.

    Returns:
        "Q->A", "QA->R", and "Q->AR" over the questions that have both.
    """
    both = [answers[key] and rationales[key] for key in answers if key in rationales]
    found = {"Q->A": list(answers.values()), "QA->R": list(rationales.values()), "Q->AR": both}
    return {name: sum(values) / len(values) for name, values in found.items() if values}
