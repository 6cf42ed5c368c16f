"""Encoders: pixels, boxes, frames, ids -> tokens. One file a kind; adding one takes that file and a line here."""

from typing import Annotated, TypeAlias

from pydantic import Field

from encoders.grid import GridConfig
from encoders.hf_text import HfTextConfig
from encoders.hf_vision import HfVisionConfig
from encoders.patch import PatchConfig
from encoders.region import RegionConfig
from encoders.text import TextConfig

VisionConfig: TypeAlias = Annotated[
    PatchConfig | GridConfig | RegionConfig | HfVisionConfig, Field(discriminator="kind")
]
AnyTextConfig: TypeAlias = Annotated[TextConfig | HfTextConfig, Field(discriminator="kind")]
