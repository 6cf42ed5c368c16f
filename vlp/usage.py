"""Which batches train which objectives, and what these read of the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, TypeVar

from encoders.types import Modality
from objectives.base import ImageView, Objective, View
from vlp.passes import views

V = TypeVar("V", View, ImageView)


def usable(
    objectives: Mapping[str, Objective], source: str = "", missing: Collection[Modality] = ()
) -> dict[str, Objective]:
    """Return the objectives that batches of a source train.

    Args:
        objectives: to choose from.
        source: of the batches; "" for batches of no named source, which train those of every one.
        missing: what the batches do not bring.
    """
    return {
        name: one
        for name, one in objectives.items()
        if (not source or one.source in (None, source))
        and (missing or not one.unpaired)
        and not any(views(one.needs)[modality] for modality in missing)
    }


def text_views(objectives: Mapping[str, Objective]) -> dict[str, View]:
    """Return how the text views of these objectives are made.

    Raises:
        ValueError: two objectives ask for the same name with different definitions.
    """
    return _agreed(((name, one.views) for name, one in objectives.items()), "text")


def image_views(objectives: Mapping[str, Objective]) -> dict[str, ImageView]:
    """Return how the image views of these objectives are made.

    Raises:
        ValueError: two objectives ask for the same name with different definitions.
    """
    return _agreed(((name, one.image_views) for name, one in objectives.items()), "image")


def _agreed(wanted: Iterable[tuple[str, Mapping[str, V]]], modality: Literal["text", "image"]) -> dict[str, V]:
    found: dict[str, V] = {}
    for name, given in wanted:
        for view_name, view in given.items():
            if found.setdefault(view_name, view) != view:
                raise ValueError(
                    f"objective {name} asks for another {modality} view {view_name!r} than an objective before it; "
                    "give both the same settings"
                )
    return found
