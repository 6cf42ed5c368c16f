"""What every objective may be told in a recipe, whatever its kind."""

from __future__ import annotations

from typing import ClassVar

from vlp.config import Config


class ObjectiveSettings(Config):
    """Where an objective's data come from, and whose head it uses."""

    source: str | None = None
    """Source of the data that trains it: one of `data.sources`, or `main` for data.train; none = each that has what the
    objective reads."""
    head_of: str | None = None
    """Objective of the same kind whose head this one uses too (BEiT-3's words, with an image and without); none = a
    head of its own."""

    tokens: ClassVar[tuple[str, ...]] = ()
    """Special tokens that its texts are made with, which a tokenizer trained on captions has where they are added."""
