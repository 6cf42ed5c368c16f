"""Which adapter reads which cases: the first pattern that matches a case's whole name."""

from __future__ import annotations

from scripts.goldens import vlmo
from scripts.goldens.base import Adapter

ADAPTERS: dict[str, Adapter] = {**vlmo.ADAPTERS}
