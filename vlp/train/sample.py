"""Sampled objectives: a step trains one group of them, drawn by ratios (Chen et al. 2020, UNITER, section 3.3).

Which one depends on the seed and the samples seen alone, so that it is the same on all ranks and after resuming.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from objectives.base import Draw, Objective
from vlp.passes import row_givers


def check_sample(sample: Mapping[str, float], objectives: Mapping[str, Objective]) -> None:
    """Refuse ratios that leave an objective out or name one that there is not.

    Args:
        sample: ratio by group, the group's objectives joined by "+"; empty = every step trains all.
        objectives: the run's.

    Raises:
        ValueError: with what is wrong.
    """
    if not sample:
        return
    known = list(objectives)
    named = [name for group in sample for name in group.split("+")]
    if unknown := sorted(set(named) - set(known)):
        raise ValueError(f"train.sample names {unknown}, but the objectives are {known}; correct the names")
    if left := [name for name in known if name not in named]:
        raise ValueError(f"train.sample leaves {left} out, which would never be trained; add them, or remove them")
    for group in sample:
        names = group.split("+")
        if lacking := sorted({giver for name in names for giver in row_givers(objectives, name)} - set(names)):
            both = "+".join([*lacking, *names])
            raise ValueError(f"train.sample {group} reads the pairs of {', '.join(lacking)}; join them: {both}")
    if wrong := {group: ratio for group, ratio in sample.items() if ratio <= 0}:
        raise ValueError(f"train.sample {wrong}: a ratio must be above 0")


def sampled(sample: Mapping[str, float], seed: int, seen: int) -> list[str] | None:
    """Return the objectives of the step at ``seen`` samples; None: all."""
    if not sample:
        return None
    weights = torch.tensor([list(sample.values())])
    return list(sample)[int(Draw(seed, seen).categorical("train.sample", weights))].split("+")
