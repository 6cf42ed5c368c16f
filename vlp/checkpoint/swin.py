"""Swin as its authors' code stores it (Liu et al. 2021), which X-VLM and METER carry: names and sizes for timm's."""

from __future__ import annotations

import math
import re
from typing import Any

from vlp.checkpoint.foreign import Shapes, count_layers
from vlp.checkpoint.names import Names, Pair, blocks
from vlp.data.presets import Preset

_BLOCK: dict[Names, Names] = {name: name for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


def swin_buffers(prefix: str) -> dict[str, str]:
    """Return the patterns of what is stored and not read, with the reason."""
    return {rf"{re.escape(prefix)}layers\..*\.(relative_position_index|attn_mask)": "made anew from the sizes"}


def swin_side(shapes: Shapes, prefix: str, side: int | None) -> tuple[int, tuple[str, ...]]:
    """Return the side of the images in pixels, and what was assumed.

    Args:
        shapes: of the stored weights.
        prefix: what stands before the tower's names.
        side: what the authors' config says; None = nothing.
    """
    window, patch = _window(shapes, prefix), shapes[f"{prefix}patch_embed.proj.weight"][2]
    shifted = shapes.get(f"{prefix}layers.0.blocks.1.attn_mask")
    if side is None and shifted is not None:  # one mask a window of the first stage
        side = math.isqrt(shifted[0]) * window * patch
    if side is not None:
        return side, ()
    return 32 * window, (f"images of {32 * window} pixels (windows of {window} cells)",)


def swin_tower(shapes: Shapes, prefix: str, side: int, preset: Preset) -> dict[str, Any]:
    """Return `model.vision` of a tower for images of ``side`` pixels."""
    layers = f"{prefix}layers."
    stages = _stages(shapes, prefix)
    tables = [shapes[f"{layers}{n}.blocks.0.attn.relative_position_bias_table"] for n in range(stages)]
    patch = shapes[f"{prefix}patch_embed.proj.weight"]
    return {
        "kind": "grid",
        "model": "swin_base_patch4_window7_224",
        "image_size": side,
        "mean": preset.mean,
        "std": preset.std,
        "arguments": {
            "img_size": side,
            "patch_size": patch[2],
            "embed_dim": patch[0],
            "depths": [count_layers(shapes, re.escape(f"{layers}{n}.blocks.") + r"(\d+)\.") for n in range(stages)],
            "num_heads": [table[1] for table in tables],
            "window_size": _window(shapes, prefix),
            "mlp_ratio": shapes[f"{layers}0.blocks.0.mlp.fc1.weight"][0] / patch[0],
        },
    }


def swin_pairs(shapes: Shapes, prefix: str) -> tuple[Pair, ...]:
    """Return the names of a tower's weights there and here."""
    ends = ("patch_embed.proj", "patch_embed.norm", "norm")
    pairs = [Pair(f"{prefix}{name}.{{p}}", f"vision.body.{name}.{{p}}") for name in ends]
    for stage in range(_stages(shapes, prefix)):
        theirs, ours = f"{prefix}layers.{stage}.", f"vision.body.layers.{stage}."
        pairs += blocks(f"{theirs}blocks.{{n}}.", f"{ours}blocks.{{n}}.", _BLOCK)
        relative = "blocks.{n}.attn.relative_position_bias_table"
        pairs.append(Pair(theirs + relative, ours + relative))
        # The authors shrink the map at a stage's end, timm at the next one's beginning.
        shrink: dict[Names, Names] = {"norm": "norm", "reduction": "reduction"}
        pairs += blocks(f"{theirs}downsample.", f"vision.body.layers.{stage + 1}.downsample.", shrink)
    return tuple(pairs)


def _stages(shapes: Shapes, prefix: str) -> int:
    return count_layers(shapes, re.escape(f"{prefix}layers.") + r"(\d+)\.")


def _window(shapes: Shapes, prefix: str) -> int:
    """Side of the windows in cells: a table holds (2 w - 1)^2 distances."""
    table = shapes[f"{prefix}layers.0.blocks.0.attn.relative_position_bias_table"]
    return (math.isqrt(table[0]) + 1) // 2
