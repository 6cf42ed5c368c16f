"""Config trees of older formats, lifted one format at a time.

Whoever renames or removes a config field raises `vlp.recipes.FORMAT` and adds the function that lifts a tree from the
format before; `tests/vlp/checkpoint/` keeps a checkpoint of every format and loads it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from vlp import recipes

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From format n to the function that makes a tree of format n + 1; format 1 is the first and the present one."""


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
