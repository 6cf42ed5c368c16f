"""METEOR and SPICE, which are Java programs that the package pycocoevalcap brings: computed where both are there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Literal, TypeAlias, TypeVar

from downstream.metrics.tokenize import tokenize

Key = TypeVar("Key")
JavaMetric: TypeAlias = Literal["METEOR", "SPICE"]

_PLACES = {"METEOR": ("pycocoevalcap.meteor.meteor", "Meteor"), "SPICE": ("pycocoevalcap.spice.spice", "Spice")}


def java_metrics(
    candidates: Mapping[Key, str], references: Mapping[Key, Sequence[str]], names: Sequence[JavaMetric]
) -> tuple[dict[str, float], list[str]]:
    """Score captions, tokenised as the COCO evaluation does, by pycocoevalcap's own classes.

    Args:
        candidates: for each image key its caption.
        references: for each image key its reference captions.
        names: metrics wanted.

    Returns:
        Those that could be computed, in [0, 1], and for each other one a sentence that says why not.
    """
    scores: dict[str, float] = {}
    reasons: list[str] = []
    for name in names:
        found = _score(name, candidates, references)
        if isinstance(found, float):
            scores[name] = found
        else:
            reasons.append(f"no {name}: {found}")
    return scores, reasons


def _score(name: JavaMetric, candidates: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> float | str:
    """The score, or why there is none."""
    if shutil.which("java") is None:
        return "it is a Java program and there is no `java`; install a Java runtime"
    module, scorer = _PLACES[name]
    try:
        found = getattr(import_module(module), scorer)
    except ImportError as error:
        return f"it takes the package pycocoevalcap ({error}); install it with: pip install 'vlp[caption]'"
    told = {number: [" ".join(tokenize(caption))] for number, caption in enumerate(candidates.values())}
    truth = {number: [" ".join(tokenize(one)) for one in references[key]] for number, key in enumerate(candidates)}
    try:
        score, _ = found().compute_score(truth, told)
    except Exception as error:  # whatever the Java process, its pipes or its download of models run into
        return f"pycocoevalcap failed with {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    return float(score)
