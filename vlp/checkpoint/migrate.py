"""Config trees of older formats, lifted one format at a time, and weights under older names.

Whoever renames or removes a config field raises `vlp.recipes.FORMAT` and adds the function that lifts a tree from the
format before; `tests/vlp/checkpoint/` keeps a checkpoint of every format and loads it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from objectives.base import MAIN
from vlp import recipes

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From format n to the function that makes a tree of format n + 1; format 1 is the first and the present one."""

OLD_NAMES = {
    "image_embed.": f"embed.{MAIN}.image.",
    "text_embed.": f"embed.{MAIN}.text.",
    "logit_scale": f"embed.{MAIN}.logit_scale",
}
"""How names of weights began before, and how they begin now."""


def lift_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names that they have now."""
    found = {}
    for name, tensor in state.items():
        old = next((old for old in OLD_NAMES if name.startswith(old)), None)
        found[name if old is None else OLD_NAMES[old] + name.removeprefix(old)] = tensor
    return found


def migrate(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree in the present format; the given one stays as it is.

    Raises:
        ConfigError: its format is older than any that can be lifted.
    """
    version = tree.get("format", recipes.FORMAT)
    tree = copy.deepcopy(tree)
    while version < recipes.FORMAT:
        if version not in MIGRATIONS:
            known = f"the oldest that can be lifted is {min(MIGRATIONS)}" if MIGRATIONS else "1 was the first"
            raise recipes.ConfigError(f"format = {version}: no such format; {known}")
        tree = MIGRATIONS[version](tree)
        version += 1
        tree["format"] = version
    return tree
