"""Verdicts on a text and its images: accuracy, and NLVR2's consistency over the images of one sentence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence


def label_accuracy(right: Sequence[bool], labels: Sequence[str]) -> dict[str, float]:
    """Return the share of right verdicts: "accuracy" of all, and "accuracy/label/NAME" of those with a label.

    Raises:
        ValueError: there are none.
    """
    if not right:
        raise ValueError("verdicts: none given, so there is no accuracy; give at least one sample")
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for one, label in zip(right, labels, strict=True):
        groups[f"accuracy/label/{label}"].append(one)
    overall = {"accuracy": sum(right) / len(right)}
    return overall | {name: sum(values) / len(values) for name, values in sorted(groups.items())}


def consistency(right: Sequence[bool], sentences: Sequence[Hashable]) -> float:
    """Return the share of sentences of which every verdict is right (Suhr et al. 2019, NLVR2, section 5).

    Args:
        right: of each sample.
        sentences: equal for samples of one sentence, see :func:`sentence_of`.

    Raises:
        ValueError: there are none.
    """
    if not right:
        raise ValueError("verdicts: none given, so there is no consistency; give at least one sample")
    found: dict[Hashable, bool] = {}
    for one, sentence in zip(right, sentences, strict=True):
        found[sentence] = found.get(sentence, True) and one
    return sum(found.values()) / len(found)


def sentence_of(identifier: str) -> str:
    """Return what of an NLVR2 identifier names the sentence: all but its third part, which counts the image pairs.

    So the published evaluation groups ("dev-850-0-0" and "dev-850-3-0" are one sentence): by identifier, not by words,
    which some sentences share.
    """
    parts = identifier.split("-")
    return "-".join([*parts[:2], "", *parts[3:]])
