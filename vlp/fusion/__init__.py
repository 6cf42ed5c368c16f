"""Fusions: where image and text tokens meet, switched by `model.fusion.kind`. One file a kind, one line here."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from vlp.config import Config
from vlp.fusion.bridge import Bridge, BridgeConfig
from vlp.fusion.dual import DualStream, DualStreamConfig
from vlp.fusion.multiway import Multiway, MultiwayConfig
from vlp.fusion.single import SingleStream, SingleStreamConfig
from vlp.fusion.sublayers import Sublayers, SublayersConfig


class NoFusionConfig(Config):
    """Two towers that meet only in the contrastive loss (CLIP, ALIGN)."""

    kind: Literal["none"] = "none"


FusionConfig: TypeAlias = Annotated[
    NoFusionConfig | SingleStreamConfig | DualStreamConfig | BridgeConfig | MultiwayConfig | SublayersConfig,
    Field(discriminator="kind"),
]
Fusion: TypeAlias = SingleStream | DualStream | Bridge | Multiway | Sublayers
