"""vlp: vision-language pretraining with fused models.

`vlp.load(source)` gives a ready model; the other names here are what scripts and notebooks start from. Importing the
package loads none of them: each is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encoders.types import Batch, Images, Texts, Tokens
    from objectives.base import Decode, Draw, Embed, Encode, Fuse, Replay
    from vlp.checkpoint.load import load
    from vlp.checkpoint.native import LoadReport, find_checkpoint, save_checkpoint
    from vlp.generate import GenerationConfig
    from vlp.loaded import Loaded
    from vlp.model import Model, ModelConfig, build_model
    from vlp.run import RunConfig

_NAMES = {
    "encoders.types": ("Batch", "Images", "Texts", "Tokens"),
    "objectives.base": ("Decode", "Draw", "Embed", "Encode", "Fuse", "Replay"),
    "vlp.checkpoint.load": ("load",),
    "vlp.checkpoint.native": ("LoadReport", "find_checkpoint", "save_checkpoint"),
    "vlp.generate": ("GenerationConfig",),
    "vlp.loaded": ("Loaded",),
    "vlp.model": ("Model", "ModelConfig", "build_model"),
    "vlp.run": ("RunConfig",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Batch",
    "Decode",
    "Draw",
    "Embed",
    "Encode",
    "Fuse",
    "GenerationConfig",
    "Images",
    "LoadReport",
    "Loaded",
    "Model",
    "ModelConfig",
    "Replay",
    "RunConfig",
    "Texts",
    "Tokens",
    "build_model",
    "find_checkpoint",
    "load",
    "save_checkpoint",
]


def _check_neighbours() -> None:
    """Refuse to run with another project's `encoders`, `objectives` or `downstream` in place of ours.

    Raises:
        ImportError: one of them is missing, or comes from elsewhere.
    """
    ours = Path(__file__).resolve().parent.parent
    for name in ("encoders", "objectives", "downstream"):
        spec = find_spec(name)  # finds it without importing it
        places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
        found = [Path(place).resolve() for place in places if place]
        if not found:
            raise ImportError(f"vlp: package {name!r} is missing beside {ours / 'vlp'}; install vlp again")
        if not found[0].is_relative_to(ours / name):
            culprit = found[0].parent if found[0].name == "__init__.py" else found[0]
            raise ImportError(
                f"vlp: {culprit} hides vlp's own package {name!r} ({ours / name}); rename it, "
                "or start with the command `vlp` instead of `python -m`, which looks into the working directory first"
            )


_check_neighbours()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlp' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *(name for name in __all__ if name not in globals())]
