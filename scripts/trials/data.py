"""Emoji as examples for every objective; what an objective needs beside pairs is derived from the drawings.

Classes are the emoji's groups, a number is their brightness, boxes are tight around a drawing that is placed anywhere,
regions are squares of the image with their mean colour as class.
Shapes: P patches or regions of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.types import Batch, Images
from objectives.base import EDITED
from objectives.settings import ObjectiveSettings
from vlp.data.batch import Example, collate
from vlp.data.edits import EditConfig, edit
from vlp.data.pairing import FALSE_TEXT, TRUE
from vlp.data.reader import decode_sample, open_reader
from vlp.data.regions import RegionArrays
from vlp.data.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from vlp.model import Model
from vlp.train.reading import region_layout

GROUPS = ("animals-nature", "food-drink", "smileys-emotion")
TRAIN, HELD_OUT = ("noto", "twemoji"), ("fluent3d",)
"""Drawing styles."""
SIDE, PATCH = 32, 8
COLOURS = 27
"""Classes of a patch: three levels of each colour."""
CHOICES = 4

Random: TypeAlias = np.random.Generator


@dataclass(frozen=True)
class Emoji:
    """One drawing."""

    key: str
    pixels: Tensor
    """uint8 [3, SIDE, SIDE]."""
    label: str
    group: int


Maker: TypeAlias = Callable[[Emoji, list[Emoji], Random], list[Example]]
"""A drawing, all drawings -> the texts of one sample."""


@cache
def emoji(styles: tuple[str, ...]) -> list[Emoji]:
    """The drawings of three groups of the concepts to train on."""
    reader = open_reader([f"emoji:{style}" for style in styles], where={"split": "train", "group": GROUPS})
    found = []
    for index in range(len(reader)):
        sample = decode_sample(reader[index])
        small = F.interpolate(sample.images[0][None].float(), size=(SIDE, SIDE), mode="area")[0]
        group = GROUPS.index(sample.fields["group"])
        found.append(Emoji(sample.key, small.round().byte(), sample.texts[0], group))
    return found


@cache
def tokenizer(added: tuple[str, ...] = ()) -> Tokenizer:
    """Knows the words of all labels and groups, and ``added`` ones."""
    words = [*(one.label for one in emoji(TRAIN)), *GROUPS]
    return build_tokenizer(TokenizerConfig(size=1024, min_frequency=1, added_tokens=added), words)


def tokens_of(objectives: Iterable[ObjectiveSettings]) -> tuple[str, ...]:
    """Special tokens that objectives make texts with."""
    return tuple(token for one in objectives for token in one.tokens)


def augment(pixels: Tensor, random: Random) -> Tensor:
    """Shift by up to two pixels, and change the weights of the colours."""
    shift = tuple(int(number) for number in random.integers(-2, 3, 2))
    weights = torch.from_numpy(random.uniform(0.6, 1.3, (3, 1, 1)).astype(np.float32))
    return (pixels.roll(shift, (1, 2)) * weights).clamp(0, 255).byte()


def one_hot(index: int, size: int) -> npt.NDArray[np.float32]:
    return np.eye(size, dtype=np.float32)[index]


def pairs(one: Emoji, every: list[Emoji], random: Random) -> list[Example]:
    """An image and its label, with group and brightness."""
    pixels = augment(one.pixels, random)
    targets: dict[str, Any] = {
        "class": np.int64(one.group),
        "answer_scores": one_hot(one.group, len(GROUPS)),
        "value": np.float32(pixels.float().mean() / 255),
    }
    return [Example(one.key, (pixels,), one.label, targets=targets, again=(augment(one.pixels, random),))]


def edited_pairs(one: Emoji, every: list[Emoji], random: Random) -> list[Example]:
    """An image and its label, which comes again with words changed."""
    return [
        replace(found, other_texts={EDITED: edit(one.label, EditConfig(), random)})
        for found in pairs(one, every, random)
    ]


def given_pairs(one: Emoji, every: list[Emoji], random: Random) -> list[Example]:
    """An image with its own label, or another's; ``match`` says which."""
    other = every[int(random.integers(len(every)))]
    false = random.random() < 0.5 and other.label != one.label
    match: dict[str, Any] = {"match": np.int64(FALSE_TEXT if false else TRUE)}
    return [Example(one.key, (augment(one.pixels, random),), (other if false else one).label, targets=match)]


def choices(one: Emoji, every: list[Emoji], random: Random) -> list[Example]:
    """An image with its own label and three of others, in any order."""
    others = [every[int(index)].label for index in random.integers(len(every), size=CHOICES - 1)]
    texts = [one.label, *others]
    image = (augment(one.pixels, random),)
    found = []
    for index in random.permutation(CHOICES):
        chosen: dict[str, Any] = {"chosen": np.float32(texts[index] == one.label)}
        found.append(Example(one.key, image, texts[index], targets=chosen))
    return found


def placed(one: Emoji, every: list[Emoji], random: Random) -> list[Example]:
    """A drawing of half the size anywhere on white, its label, and the tight box around it."""
    small = F.interpolate(one.pixels[None].float(), size=(SIDE // 2, SIDE // 2), mode="area")[0].byte()
    top, left = (int(number) for number in random.integers(SIDE // 2 + 1, size=2))
    pixels = torch.full((3, SIDE, SIDE), 255, dtype=torch.uint8)
    pixels[:, top : top + SIDE // 2, left : left + SIDE // 2] = small
    drawn = (pixels < 240).any(0)
    rows, columns = drawn.any(1).nonzero()[:, 0], drawn.any(0).nonzero()[:, 0]
    low = np.array([columns[0].item(), rows[0].item()]) / SIDE
    high = np.array([columns[-1].item() + 1, rows[-1].item() + 1]) / SIDE
    box: dict[str, Any] = {"box": np.concatenate([(low + high) / 2, high - low]).astype(np.float32)}
    return [Example(one.key, (pixels,), one.label, targets=box)]


def two_images(one: Emoji, every: list[Emoji], random: Random) -> list[Example]:
    """Two images and a group: is the first one's it?"""
    other = every[int(random.integers(len(every)))]
    group = one.group if random.random() < 0.5 else (one.group + int(random.integers(1, len(GROUPS)))) % len(GROUPS)
    true: dict[str, Any] = {"answer_scores": one_hot(int(group == one.group), 2)}
    images = augment(one.pixels, random), augment(other.pixels, random)
    return [Example(one.key, images, GROUPS[group], targets=true)]


def regions(one: Emoji, every: list[Emoji], random: Random) -> list[Example]:
    """The image's squares as regions: their pixels at a quarter of the size, their place, and their mean colour."""
    pixels = augment(one.pixels, random)
    number = SIDE // PATCH
    squares = F.unfold(F.avg_pool2d(pixels[None].float() / 255, 2), PATCH // 2, stride=PATCH // 2)[0].T  # [P, F]
    low = np.stack(np.meshgrid(np.arange(number), np.arange(number)), -1).reshape(-1, 2) / number
    boxes = np.concatenate([low, low + 1 / number], 1).astype(np.float32)
    objects = colour_classes(pixels[None])[0].numpy()
    said = {"objects": objects, "classes": np.eye(COLOURS, dtype=np.float32)[objects] * 0.9 + 0.1 / COLOURS}
    arrays = RegionArrays(squares.numpy().astype(np.float32), boxes, said)
    return [Example(one.key, (), one.label, regions=arrays)]


def colour_classes(pixels: Tensor) -> Tensor:
    """Images uint8 [B, 3, SIDE, SIDE] -> the class of each patch's mean colour, [B, P] int64."""
    mean = F.avg_pool2d(pixels.float() / 256, PATCH).flatten(2)  # [B, 3, P]
    return ((mean * 3).long() * torch.tensor([9, 3, 1])[:, None]).sum(1)


def batches(
    model: Model, maker: Maker, styles: tuple[str, ...], size: int, number: int, seed: int = 0
) -> Iterator[Batch]:
    """Yield ``number`` batches of ``size`` samples with the views that the model's objectives read."""
    drawings = emoji(styles)
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(len(drawings)) for _ in range(size * number // len(drawings) + 1)])
    layout, words = region_layout(model, whole=False), tokenizer(tokens_of(model.objective_configs.values()))
    for step in range(number):
        made: list[Example] = []
        places: list[int] = []
        for place in range(step * size, (step + 1) * size):
            found = maker(drawings[order[place]], drawings, random)
            made += found
            places += [place] * len(found)
        batch = collate(made, places, words, model.text_views(), 16, seed, model.image_views(), layout)
        yield with_codes(replace(batch, seen=step * size))


def with_codes(batch: Batch) -> Batch:
    """Give images with hidden patches the classes of their colours as codes."""
    hidden = batch.images.get("masked")
    if not isinstance(hidden, Images):
        return batch
    codes = replace(hidden, targets={"codes": colour_classes(hidden.pixels)})
    return replace(batch, images={**batch.images, "masked": codes})
