"""What a model is made of, as a recipe says it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from encoders import AnyTextConfig, PatchConfig, TextConfig, VisionConfig
from encoders.codebook import CodebookConfig
from vlp.config import Config
from vlp.decoder import DecoderConfig
from vlp.embed import EmbedConfig
from vlp.fusion import FusionConfig
from vlp.fusion.dual import DualStreamConfig
from vlp.multimodal import AnyDecoderConfig


class ModelConfig(Config):
    """What the model is made of."""

    vision: VisionConfig = Field(default_factory=PatchConfig)
    """Pixels -> image tokens."""
    text: AnyTextConfig = Field(default_factory=TextConfig)
    """Ids -> text tokens."""
    fusion: FusionConfig = Field(default_factory=DualStreamConfig)
    """Where they meet."""
    decoder: AnyDecoderConfig | None = None
    """Writes text; none = the model does not generate."""
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    """Common space of image and text."""
    codebook: CodebookConfig | None = None
    """Names patches by codes for mim, frozen; none = the data bring the codes, or there is no need."""
    keep_unread: bool = False
    """Build also what no objective reads, which then gets no gradient: a fusion, poolers (a published model that comes
    without heads)."""
    momentum: float = Field(0.995, ge=0, le=1)
    """Share of the momentum teacher's weights that a step keeps, where an objective has a teacher (ALBEF, BLIP)."""
    teacher_view: Literal["clean", "again"] = "clean"
    """Images that the teacher sees: the student's, or another augmentation of each (TCL)."""

    @property
    def answers_instructions(self) -> bool:
        """Whether all that the decoder writes answers what the encoder is asked beside the image (OFA).

        It reads the places of image and text apart from their content, so that it can read nothing but both.
        """
        return isinstance(self.decoder, DecoderConfig) and self.decoder.untied is not None
