"""The families of foreign checkpoints that vlp reads: one file each, one line here. The first that knows a file wins."""

from vlp.checkpoint import vlmo
from vlp.checkpoint.foreign import Family

FAMILIES: tuple[Family, ...] = (vlmo.FAMILY,)
