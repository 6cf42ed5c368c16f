"""The ways out to other libraries' formats; the first of a library that has no problem with a model is taken."""

from vlp.checkpoint import clip_export, open_clip_export
from vlp.checkpoint.export import Exporter

EXPORTERS: tuple[Exporter, ...] = (*clip_export.EXPORTERS, *open_clip_export.EXPORTERS)
