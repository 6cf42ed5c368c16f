"""Shapes in four colours as three styles of emoji draw them, and tiny checkpoints that know the words about them."""

from __future__ import annotations

import io
import tarfile
from functools import cache
from pathlib import Path

from PIL import Image

from vlp.data.benchmark import STYLES, emoji_path

PIXELS = 16
TRAIN_STYLES, TEST_STYLE = STYLES[:2], STYLES[2]
EMOJI = {
    "circle": {"red": "1F534", "green": "1F7E2", "blue": "1F535", "yellow": "1F7E1"},
    "square": {"red": "1F7E5", "green": "1F7E9", "blue": "1F7E6", "yellow": "1F7E8"},
    "heart": {"red": "2764", "green": "1F49A", "blue": "1F499", "yellow": "1F49B"},
}
COLORS, SHAPES = tuple(EMOJI["circle"]), tuple(EMOJI)
SIZES = {"width": 32, "heads": 4}
VILT = {
    "vision": {"model": "vit_tiny_patch16_224", "image_size": PIXELS, "patch_size": 8, **SIZES, "depth": 0},
    "text": {**SIZES, "layers": 0, "max_length": 24},
    "fusion": {**SIZES, "layers": 2, "kind": "single_stream"},
}
"""A model that learns in a second or two."""


@cache
def _drawn(style: str, code: str) -> Image.Image:
    with tarfile.open(emoji_path(style)) as shard:
        member = shard.extractfile(f"{code}.webp")
        assert member is not None
        return Image.open(io.BytesIO(member.read())).convert("RGB").resize((PIXELS, PIXELS))


def picture(folder: Path, style: str, shape: str, color: str) -> str:
    """Write an emoji as PNG unless it is there; return its name."""
    path = folder / f"{style}_{shape}_{color}.png"
    if not path.is_file():
        _drawn(style, EMOJI[shape][color]).save(path)
    return path.name


def styles(test: bool) -> tuple[str, ...]:
    """Training pictures are of two styles, test pictures of the third."""
    return (TEST_STYLE,) if test else TRAIN_STYLES
