"""The families of foreign checkpoints: one file each, one line here; the first that knows a file wins."""

from vlp.checkpoint import (
    albef,
    beit3,
    blip,
    hf_align,
    hf_blip,
    hf_clip,
    hf_lxmert,
    hf_siglip,
    hf_vilt,
    hf_visualbert,
    meter,
    open_clip,
    tmm_albef,
    tmm_clip,
    uniter,
    vilt,
    vlmo,
    volta,
)
from vlp.checkpoint.foreign import Family

FAMILIES: tuple[Family, ...] = (
    albef.FAMILY,
    blip.FAMILY,
    hf_blip.FAMILY,
    beit3.FAMILY,
    vlmo.FAMILY,
    vilt.FAMILY,
    meter.FAMILY,
    hf_vilt.FAMILY,
    open_clip.FAMILY,
    tmm_albef.FAMILY,
    tmm_clip.FAMILY,
    *hf_clip.FAMILIES,
    hf_siglip.FAMILY,
    hf_align.FAMILY,
    uniter.FAMILY,
    volta.FAMILY,
    hf_lxmert.FAMILY,
    hf_visualbert.FAMILY,
)
