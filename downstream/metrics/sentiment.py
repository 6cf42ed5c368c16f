"""Sentiment as a number (CMU-MOSI, -3 to 3): mean absolute error, Pearson's correlation, and accuracies after binning.

The published evaluation codes (Tsai et al. 2019, MulT; Mao et al. 2022, MMSA) report two binary accuracies, which are
not comparable: negative against the rest ("has0") and negative against positive, neutral samples left out ("non0").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BOUND = 3.0
"""Largest score of MOSI and MOSEI."""


def sentiment_metrics(predictions: Sequence[float], truths: Sequence[float]) -> dict[str, float]:
    """Return the official metrics; those that are undefined here (no sample that is not neutral) are left out.

    "MAE"; "Pearson" (0 where one side is constant); "Acc-7": both rounded to an integer (halves to the even one, as
    NumPy does) after clipping to -3..3; "Acc-2 has0": sign >= 0; "Acc-2 non0": sign > 0 of the samples that are not 0;
    "F1 has0", "F1 non0": F1 of either sign, averaged by how many samples have it.

    Raises:
        ValueError: there are no samples, or a number is not finite.
    """
    if not truths or len(predictions) != len(truths):
        raise ValueError(f"sentiment: {len(predictions)} predictions of {len(truths)} samples; give one of each")
    if not all(map(math.isfinite, [*predictions, *truths])):
        raise ValueError("sentiment: a number is not finite; leave the sample out")
    pairs = list(zip(predictions, truths, strict=True))
    found = {
        "MAE": sum(abs(a - b) for a, b in pairs) / len(pairs),
        "Pearson": pearson(predictions, truths),
        "Acc-7": sum(seven(a) == seven(b) for a, b in pairs) / len(pairs),
    }
    binary = {"has0": [(a >= 0, b >= 0) for a, b in pairs], "non0": [(a > 0, b > 0) for a, b in pairs if b != 0]}
    for name, signs in binary.items():
        if signs:
            found[f"Acc-2 {name}"] = sum(a == b for a, b in signs) / len(signs)
            found[f"F1 {name}"] = weighted_f1([a for a, _ in signs], [b for _, b in signs])
    return found


def seven(value: float) -> int:
    """Return the class of a score among -3..3."""
    return round(min(max(value, -BOUND), BOUND))


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the correlation of two series; 0 where one of them is constant."""
    means = sum(first) / len(first), sum(second) / len(second)
    moved = [(a - means[0], b - means[1]) for a, b in zip(first, second, strict=True)]
    spread = math.sqrt(sum(a * a for a, _ in moved)) * math.sqrt(sum(b * b for _, b in moved))
    return sum(a * b for a, b in moved) / spread if spread else 0.0


def weighted_f1(predictions: Sequence[bool], truths: Sequence[bool]) -> float:
    """Return the mean of both classes' F1, weighted by how often the class is true."""
    total = 0.0
    for value in (False, True):
        hits = sum(a == b == value for a, b in zip(predictions, truths, strict=True))
        said, true = sum(a == value for a in predictions), sum(b == value for b in truths)
        total += true * (2 * hits / (said + true) if said + true else 0.0)
    return total / len(truths)
