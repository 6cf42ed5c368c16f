"""Says in words what a run shows: chance levels at the start, a loss that stays there, a loader that is slow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from objectives.base import Objective

AT_CHANCE = 0.97
"""A loss above this share of its chance level counts as not learned."""
SLOW_LOADER = 0.85
"""Below this share of the model's own rate the loader is named."""


def chance_levels(objectives: Mapping[str, Objective], candidates: int) -> dict[str, float]:
    """Return what each objective's loss is before anything is learned, where its label prior tells.

    Args:
        objectives: by name.
        candidates: pairs of one step over all ranks.
    """
    found = {name: objective.chance(candidates) for name, objective in objectives.items()}
    return {name: level for name, level in found.items() if level is not None}


@dataclass
class Watch:
    """Watches the losses of a run and speaks once about each thing.

    Args:
        chances: by objective.
        patience: samples after which a loss should have left its chance level.
    """

    chances: Mapping[str, float]
    patience: int
    _said: set[str] = field(default_factory=set)

    def look(self, seen: int, losses: Mapping[str, float], wait_share: float) -> list[str]:
        """Return what is worth saying now.

        Args:
            seen: samples so far.
            losses: mean since the last look, by objective.
            wait_share: share of the time since then in which the step waited for data.
        """
        found = []
        for name, loss in losses.items():
            chance = self.chances.get(name)
            if chance is not None and seen >= self.patience and loss > AT_CHANCE * chance and name not in self._said:
                self._said.add(name)
                found.append(
                    f"{name.upper()} is still at chance after {seen:,} samples ({loss:.3f}, chance {chance:.3f}); "
                    "check the captions, the learning rate and the initial weights"
                )
        if 1 - wait_share < SLOW_LOADER and "loader" not in self._said:
            self._said.add("loader")
            found.append(
                f"the loader delivers {100 * (1 - wait_share):.0f} % of what the model could eat; "
                "raise data.workers, or store smaller images"
            )
        return found
