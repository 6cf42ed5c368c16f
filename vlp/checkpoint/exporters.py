"""The ways out to other libraries' formats; the first of a library that has no problem with a model is taken."""

from vlp.checkpoint import albef_export, clip_export, hf_blip_export, hf_vilt_export, open_clip_export
from vlp.checkpoint.export import Exporter

EXPORTERS: tuple[Exporter, ...] = (
    *clip_export.EXPORTERS,
    *open_clip_export.EXPORTERS,
    albef_export.EXPORTER,
    hf_blip_export.EXPORTER,
    hf_vilt_export.EXPORTER,
)
