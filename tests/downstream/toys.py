"""Toy data for downstream tasks: coloured squares, questions about them, and a tiny checkpoint that knows the words."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from helpers import SIZES
from PIL import Image

from vlp.checkpoint.native import save_checkpoint
from vlp.config import build
from vlp.run import RunConfig, assemble

COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 60, 220), "yellow": (230, 220, 40)}
FILLINGS = {"plain": 1, "striped": 2}
PIXELS = 16
TRAIN = {
    "samples": 9600,
    "global_batch": 32,
    "log_every": 50,
    "optim": {"lr": 3e-3, "warmup": 320, "weight_decay": 0.0},
}


def picture(path: Path, color: str, filling: str = "plain", seed: int = 0) -> str:
    """Write a square of a colour, plain or with white stripes, slightly noisy; return its name."""
    pixels = np.full((PIXELS, PIXELS, 3), COLORS[color], dtype=np.int64)
    if filling == "striped":
        pixels[:, ::4] = pixels[:, 1::4] = 255
    noise = np.random.default_rng(seed).integers(-10, 11, pixels.shape)
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path.name


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as csv or jsonl."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def vqa_table(folder: Path, name: str, number: int, seed: int, kinds: int = 2) -> Path:
    """Questions "what color is it" and (unless ``kinds`` is 1) "is it red", of each colour, about random squares."""
    draw, rows = np.random.default_rng(seed), []
    for i in range(number):
        color, asked = (list(COLORS)[int(k)] for k in draw.integers(0, len(COLORS), 2))
        image = picture(folder / f"{name}{i}.png", color, seed=seed * 1000 + i)
        if kinds == 1 or i % 2:
            rows.append({"image": image, "question": "What color is it?", "answer": color, "question_type": "what"})
        else:
            answer = "yes" if asked == color else "no"
            rows.append({"image": image, "question": f"Is it {asked}?", "answer": answer, "question_type": "is"})
    return write_table(folder / f"{name}.csv", rows)


def caption_table(folder: Path) -> Path:
    """Eight images with a caption each."""
    rows = [
        {"image": picture(folder / f"{color}_{filling}.png", color, filling), "caption": f"a {filling} {color} square"}
        for color in COLORS
        for filling in FILLINGS
    ]
    return write_table(folder / "captions.csv", rows)


def checkpoint(
    folder: Path,
    objectives: Iterable[str] | Mapping[str, Any] = ("itc", "itm", "mlm"),
    sentences: Iterable[str] = (),
    **model: Any,
) -> Path:
    """Write a tiny untrained checkpoint whose tokenizer knows all words here; with a decoder if an objective is lm.

    Its tokenizer knows those of ``sentences`` too.
    """
    image = picture(folder / "words.png", "red")
    words = write_table(
        folder / "words.csv",
        [
            {"image": image, "caption": caption}
            for color in COLORS
            for caption in (
                f"is it {color} yes no what color is it?",
                f"a plain {color} square",
                f"a striped {color} square",
            )
        ]
        + [{"image": image, "caption": sentence} for sentence in sentences],
    )
    objectives = dict(objectives) if isinstance(objectives, Mapping) else {name: {} for name in objectives}
    tree = {
        "model": {
            "vision": {
                "model": "vit_tiny_patch16_224",
                "image_size": PIXELS,
                "patch_size": 4,
                "width": 32,
                "depth": 2,
                "heads": 4,
            },
            "text": {**SIZES, "max_length": 24},
            "fusion": {**SIZES},
            "embed": {"width": 16},
            **({"decoder": {"kind": "causal", **SIZES}} if "lm" in objectives else {}),
            **model,
        },
        "objectives": objectives,
        "data": {"train": str(words), "max_length": 16, "workers": 0, "tokenizer": {"size": 256, "min_frequency": 1}},
    }
    parts = assemble(build(RunConfig, tree), pretrained=False)
    save_checkpoint(folder / "checkpoint", parts.model, parts.run, parts.tokenizer, "# toy")
    return folder / "checkpoint"
