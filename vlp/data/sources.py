"""Several sources of training data: which of them a step reads, and where in each of them it goes on.

Beside pairs there may be texts alone and images alone (FLAVA, BEiT-3, SimVLM). Which source a step reads is a pure
function of the seed and the samples seen, the same on all ranks; each source is a line of positions of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from pydantic import Field

from encoders.types import Modality
from objectives.base import Draw
from vlp.config import Config
from vlp.data.batch import stable_hash
from vlp.data.instruct import InstructConfig
from vlp.data.order import batch_positions
from vlp.data.pairing import PairingConfig

MAIN = "main"
"""The source that data.train is."""

Only: TypeAlias = Modality | None
"""The one modality that a source brings; None: both."""


def lacking(only: Only) -> frozenset[Modality]:
    """Return what a source does not bring."""
    both: tuple[Modality, ...] = ("image", "text")
    return frozenset(one for one in both if only is not None and one != only)


class SourceConfig(Config):
    """Training data beside data.train: texts alone, images alone, or other pairs."""

    train: str | tuple[str, ...] | None = None
    """As data.train; of texts also files of one text a line (.txt)."""
    only: Literal["image", "text"] | None = None
    """What is read of it; none = pairs."""
    ratio: float = Field(default=1.0, gt=0)
    """How often it is read, relative to the other sources and `data.ratio`; see `data.mix`."""
    where: dict[str, Any] | None = None
    """Only samples whose fields have these values."""
    image: str | tuple[str, ...] | None = None
    """Column or member of the images; none = guessed."""
    text: str | None = None
    """Column, member or field of the texts; none = guessed."""
    root: str | None = None
    """Folder that the image paths of tables are relative to; none = the table's own."""
    prefix: str | None = None
    """As data.prefix, of this source alone."""
    answer: str | None = None
    """As data.answer, of this source alone."""
    pairing: PairingConfig | None = None
    """As data.pairing, of this source alone."""
    instruct: InstructConfig | None = None
    """As data.instruct."""
    hash: str | None = None
    """Fingerprint that the data must have; written when a run starts."""


def source_seed(seed: int, name: str) -> int:
    """Return the seed of a source's order, augmentation and masks: sources of equal size go different ways."""
    return seed if name == MAIN else stable_hash(f"{seed}/source/{name}")


@dataclass(frozen=True)
class Mix:
    """How the sources share the steps.

    Args:
        ratios: by source, at least one.
        joint: every step reads all sources; else each reads one, drawn by the ratios.
        seed: of the run.
        world: ranks, each of which needs a sample of a source that a step reads.
    """

    ratios: Mapping[str, float]
    joint: bool
    seed: int
    world: int = 1

    def shares(self, seen: int, samples: int) -> dict[str, int]:
        """Return how many of a step's samples each source gives; sources that give none are left out.

        Args:
            seen: samples that the run has seen.
            samples: of the step, over all ranks.
        """
        names = list(self.ratios)
        if len(names) == 1:
            return {names[0]: samples}
        if not self.joint:
            weights = torch.tensor([list(self.ratios.values())])
            return {names[int(Draw(self.seed, seen).categorical("data.sources", weights))]: samples}
        whole = sum(self.ratios.values())
        exact = {name: samples * ratio / whole for name, ratio in self.ratios.items()}
        found = {name: int(value) for name, value in exact.items()}
        by_rest = sorted(names, key=lambda name: found[name] - exact[name])  # the largest remainder first
        for name in by_rest[: samples - sum(found.values())]:
            found[name] += 1
        largest = max(names, key=found.__getitem__)
        for name in names:  # the last step may be too small for all of them
            if 0 < found[name] < self.world and name != largest:
                found[largest] += found[name]
                found[name] = 0
        return {name: number for name, number in found.items() if number}

    def check(self, global_batch: int) -> None:
        """Refuse a step that is too small for its sources.

        Raises:
            ValueError: a source gives less than a sample a rank.
        """
        if self.joint and (left := [name for name in self.ratios if name not in self.shares(0, global_batch)]):
            raise ValueError(
                f"data.mix joint: of train.global_batch {global_batch} there is less than one sample a rank for "
                f"{', '.join(left)}; raise it, or their ratio"
            )

    def steps(self, start: int, end: int, batch: int, at: Mapping[str, int]) -> Iterator[Step]:
        """Yield the steps over the samples ``start`` .. ``end - 1`` of the run.

        Args:
            start: samples that the run has seen.
            end: samples at which it stops.
            batch: samples of a step.
            at: samples that it has read of each source.
        """
        position = {name: at.get(name, 0) for name in self.ratios}
        while start < end:
            samples = len(batch_positions(start, batch, end))
            parts = {}
            for name, number in self.shares(start, samples).items():
                parts[name] = range(position[name], position[name] + number)
                position[name] += number
            yield Step(start, start + samples, parts, dict(position))
            start += samples

    def positions(self, seen: int, batch: int) -> dict[str, int]:
        """Return how many samples of each source a run of steps of ``batch`` has read after ``seen``."""
        last = dict.fromkeys(self.ratios, 0)
        for step in self.steps(0, seen, batch, {}):
            last = step.after
        return last


@dataclass(frozen=True)
class Step:
    """What one step reads."""

    begin: int
    """Samples that the run had seen before."""
    end: int
    """Samples that it has seen then."""
    parts: Mapping[str, range]
    """Positions in each source that it reads."""
    after: dict[str, int]
    """Samples read of each source then."""
