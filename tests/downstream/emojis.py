"""Emoji pictures as files, to make data of tasks from."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from vlp.data.reader import decode_sample, open_reader


def named(*names: str, style: str = "noto") -> dict[str, Tensor]:
    """Pictures, uint8 [3, 64, 64], of the emoji of these names; some of any without names."""
    reader, found = open_reader(f"emoji:{style}"), {}
    for index in range(len(reader)):
        sample = decode_sample(reader[index])
        if not names or sample.texts[0] in names:
            found[sample.texts[0]] = sample.images[0]
        if len(found) == (len(names) or 24):
            break
    return found


def save(path: Path, image: Tensor) -> str:
    """Write a picture as png; return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path.name
