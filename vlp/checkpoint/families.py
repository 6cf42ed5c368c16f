"""The families of foreign checkpoints that vlp reads: one file each, one line here. The first that knows a file wins."""

from vlp.checkpoint import albef, beit3, vilt, vlmo
from vlp.checkpoint.foreign import Family

FAMILIES: tuple[Family, ...] = (albef.FAMILY, beit3.FAMILY, vlmo.FAMILY, vilt.FAMILY)
