"""The families of foreign checkpoints that vlp reads: one file each, one line here; the first that knows a file wins."""

from vlp.checkpoint import (
    albef,
    beit3,
    hf_align,
    hf_clip,
    hf_siglip,
    open_clip,
    tmm_clip,
    vilt,
    vlmo,
)
from vlp.checkpoint.foreign import Family

FAMILIES: tuple[Family, ...] = (
    albef.FAMILY,
    beit3.FAMILY,
    vlmo.FAMILY,
    vilt.FAMILY,
    open_clip.FAMILY,
    tmm_clip.FAMILY,
    *hf_clip.FAMILIES,
    hf_siglip.FAMILY,
    hf_align.FAMILY,
)
