"""What a detector saw of an image, as a model that reads such regions in place of pixels takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from encoders import RegionConfig
from encoders.types import Regions
from objectives.base import Draw
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Sample
from vlp.data.regions import RegionArrays, RegionLayout, read_all_regions, region_views
from vlp.model import ModelConfig


@dataclass(frozen=True)
class Seeing:
    """Reads the regions of samples; picklable, for loader workers."""

    layout: RegionLayout
    """What the model reads of them, none of them hidden."""
    width: int
    """Of their features."""

    def __call__(self, sample: Sample) -> tuple[RegionArrays, ...]:
        """Return the regions of each of a sample's images.

        Raises:
            BadSample: the arrays are missing or broken, or of another width.
        """
        found = read_all_regions(sample.key, sample.fields, self.layout)
        for one in found:
            if (width := one.features.shape[1]) != self.width:
                raise BadSample(sample.key, f"features of its regions are {width} wide, the model reads {self.width}")
        return found

    def laid(self, found: Sequence[RegionArrays]) -> Regions:
        """Lay the regions of several images side by side."""
        return region_views(found, range(len(found)), self.layout, Draw())["clean"]


def seeing(model: ModelConfig, data: DataConfig) -> Seeing | None:
    """Return how a model reads a detector's regions; None if it reads pixels."""
    vision = model.vision
    if not isinstance(vision, RegionConfig):
        return None
    return Seeing(RegionLayout(vision.boxes, vision.number, data.whole_region), vision.features)
