"""Where published weights lie: folders, hub ids, and files that installed packages ship."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PACKAGE = "package:"


def local_source(source: str) -> str:
    """``package:NAME/path/in/it`` -> that path on this machine; any other source as it is.

    Raises:
        ValueError: the package is not installed, or holds no such file or folder.
    """
    if not source.startswith(PACKAGE):
        return source
    name, _, inside = source.removeprefix(PACKAGE).partition("/")
    found = find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"{source}: there is no package {name!r} here; install it with pip")
    path = Path(next(iter(found.submodule_search_locations))) / inside
    if not path.exists():
        raise ValueError(f"{source}: package {name} holds no {inside}; look at what is in {path.parent.name}/")
    return str(path)
