"""Which adapter reads which cases: the first pattern that matches a case's whole name."""

from __future__ import annotations

from scripts.goldens import (
    albef,
    beit3,
    blip,
    bridgetower,
    clip,
    coca,
    flava,
    git,
    meter,
    region,
    uniter,
    vilt,
    vlmo,
    xvlm,
)
from scripts.goldens.base import Adapter

ADAPTERS: dict[str, Adapter] = {
    **albef.ADAPTERS,
    **xvlm.ADAPTERS,
    **blip.ADAPTERS,
    **beit3.ADAPTERS,
    **vlmo.ADAPTERS,
    **vilt.ADAPTERS,
    **meter.ADAPTERS,
    **bridgetower.ADAPTERS,
    **uniter.ADAPTERS,
    **clip.ADAPTERS,
    **coca.ADAPTERS,
    **flava.ADAPTERS,
    **git.ADAPTERS,
    **region.ADAPTERS,
}
