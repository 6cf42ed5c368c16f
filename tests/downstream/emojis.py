"""Emoji pictures as files, to make data of tasks from, and tiny checkpoints that know given words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import toys
from emoji_pictures import VILT, picture
from PIL import Image
from torch import Tensor

import vlp
from vlp.checkpoint.native import save_checkpoint
from vlp.config import build
from vlp.data.reader import decode_sample, open_reader
from vlp.loaded import Loaded
from vlp.run import RunConfig, assemble

TRAIN = {"global_batch": 16, "log_every": 50, "optim": {"lr": 3e-3, "warmup": 160, "weight_decay": 0.0}}
QUIET = {"tune": {"probe": None}}
"""Finetuning without the look at what is forgotten, which these checkpoints know nothing of."""


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


def side_by_side(folder: Path, style: str, *things: tuple[str, str]) -> str:
    """Write a picture of several emoji (shape, colour) in a row; return its name."""
    parts = [Image.open(folder / picture(folder, style, *thing)) for thing in things]
    whole = Image.new("RGB", (sum(part.width for part in parts), parts[0].height))
    for number, part in enumerate(parts):
        whole.paste(part, (number * part.width, 0))
    name = f"{style}-{'-'.join('_'.join(thing) for thing in things)}.png"
    whole.save(folder / name)
    return name


def checkpoint(
    folder: Path, sentences: Iterable[str], objectives: Iterable[str] | Mapping[str, Any], **model: Any
) -> Loaded:
    """Write and load a tiny untrained checkpoint whose tokenizer knows the sentences."""
    image = toys.picture(folder / "words.png", "red")
    words = toys.write_table(folder / "words.jsonl", [{"image": image, "caption": each} for each in sentences])
    named = dict(objectives) if isinstance(objectives, Mapping) else {name: {} for name in objectives}
    data = {"train": str(words), "max_length": 24, "workers": 0, "tokenizer": {"size": 256, "min_frequency": 1}}
    parts = assemble(
        build(RunConfig, {"model": {**VILT, **model}, "objectives": named, "data": data}), pretrained=False
    )
    save_checkpoint(folder / "checkpoint", parts.model, parts.run, parts.tokenizer, "# toy")
    return vlp.load(folder / "checkpoint")
