"""Regions of an image: their boxes in the data, cut out, and matched with texts by a model of whole images.

Shapes: S texts, C regions, E embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from downstream.task import evaluating
from encoders import RegionConfig
from encoders.types import Batch, Images
from encoders.types import Regions as Detected
from objectives.base import Embed, Fuse, Rows, ViewText
from objectives.itm import Itm
from objectives.rank import Rank
from vlp.data.batch import pad_texts
from vlp.data.reader import BadSample, Sample
from vlp.data.regions import RegionArrays, RegionLayout, geometry, read_regions
from vlp.data.transforms import EvalTransform
from vlp.model import Model

if TYPE_CHECKING:
    from vlp.run import Parts

Head: TypeAlias = Itm | Rank | Literal["itc"]
"""What scores a pair: a matching head over the fusion, or the embeddings' inner product."""

_PAIRS = Fuse(rows="pairs")


@dataclass(frozen=True)
class Truth:
    """What an expression means, and the image's size in pixels."""

    box: tuple[float, ...] | None
    """None where the data have no labels."""
    boxes: tuple[tuple[float, ...], ...]
    """Regions to choose from; empty where none are given."""
    width: float
    height: float

    def relative(self) -> tuple[float, float, float, float]:
        """Return the box as centre x, centre y, width, height in shares of the image's sides."""
        assert self.box is not None
        left, top, width, height = self.box
        return (
            (left + width / 2) / self.width,
            (top + height / 2) / self.height,
            width / self.width,
            height / self.height,
        )

    def absolute(self, relative: Sequence[float]) -> tuple[float, ...]:
        """Return centre x, centre y, width, height in shares as left, top, width, height in pixels."""
        x, y, width, height = relative
        return (
            (x - width / 2) * self.width,
            (y - height / 2) * self.height,
            width * self.width,
            height * self.height,
        )


def read_box(key: str, name: str, value: Any) -> tuple[float, ...]:
    """Return left, top, width, height from a field, which may hold JSON.

    Raises:
        BadSample: it holds something else.
    """
    try:
        numbers = json.loads(value) if isinstance(value, str) else value
        left, top, width, height = (float(number) for number in numbers)
    except (TypeError, ValueError) as error:
        raise BadSample(key, f"{name} {str(value)[:40]!r} is not left, top, width and height in pixels") from error
    if not (width > 0 and height > 0 and np.isfinite([left, top]).all()):
        raise BadSample(key, f"{name} {str(value)[:40]!r} has no area")
    return left, top, width, height


def read_truth(sample: Sample, box: str = "box", boxes: str = "boxes") -> Truth:
    """Return what stands beside an expression.

    Raises:
        BadSample: boxes are no boxes, or the image's size is not that of its fields (or neither is there).
    """
    fields, key = sample.fields, sample.key
    given: list[float] = []
    for name in ("width", "height"):
        try:
            given.append(float(fields[name]))
        except (KeyError, TypeError, ValueError):
            continue
    if sample.images:
        height, width = sample.images[0].shape[-2:]
        if len(given) == 2 and given != [width, height]:
            raise BadSample(key, f"its image is {width} x {height}, but its boxes are of {given[0]:g} x {given[1]:g}")
        given = [float(width), float(height)]
    if len(given) < 2 or min(given) <= 0:
        raise BadSample(key, "no width and height of the image, which its box is a share of")
    listed = fields.get(boxes)
    if isinstance(listed, str) and listed:
        try:
            listed = json.loads(listed)
        except ValueError as error:
            raise BadSample(key, f"{boxes} are not JSON: {error}") from error
    regions = tuple(dict.fromkeys(read_box(key, boxes, one) for one in listed or ()))
    true = fields.get(box)
    return Truth(None if true in (None, "") else read_box(key, box, true), regions, given[0], given[1])


@dataclass(frozen=True)
class Regions:
    """An image's regions and the texts that may mean them."""

    image: Tensor
    """uint8 [3, H, W]."""
    boxes: Sequence[Sequence[float]]
    """Left, top, width, height in pixels, C of them."""
    texts: Sequence[str]
    """S of them."""


def scorer_of(model: Model, wanted: Literal["auto", "itm", "itc"]) -> Head | None:
    """Return what matches regions with texts; None where the model does not have it."""
    heads = [one for one in model.objectives.values() if isinstance(one, Itm | Rank)]
    if wanted != "itc" and heads and model.fusion is not None:
        return heads[0]
    return "itc" if wanted != "itm" and model.space() is not None else None


def cut(image: Tensor, box: Sequence[float]) -> Tensor:
    """Return the pixels [3, h, w] of a box (left, top, width, height), at least one, within the image [3, H, W]."""
    height, width = image.shape[-2:]
    left, top = (min(max(math.floor(low), 0), side - 1) for low, side in zip(box[:2], (width, height), strict=True))
    right = min(max(math.ceil(box[0] + box[2]), left + 1), width)
    bottom = min(max(math.ceil(box[1] + box[3]), top + 1), height)
    return image[:, top:bottom, left:right]


def score_regions(parts: Parts, regions: Regions, head: Head, pairs: int) -> Tensor:
    """Match every region with every text, each region cut out of the image and encoded once.

    Args:
        parts: the model and how it sees images.
        regions: of one image.
        head: as ``scorer_of`` gives it.
        pairs: most pairs at once.

    Returns:
        [S, C] float32 on the CPU, larger = better.
    """
    side = parts.model.config.vision.image_size
    resize = EvalTransform(parts.run.data.transform.model_copy(update={"image_size": side}))
    size, found = max(1, pairs // len(regions.texts)), []
    for first in range(0, len(regions.boxes), size):
        pixels = [resize(cut(regions.image, box)) for box in regions.boxes[first : first + size]]
        found.append(_match(parts, Images(torch.stack(pixels)), regions.texts, head))
    return torch.cat(found, 1)


def read_detected(sample: Sample, model: Model) -> RegionArrays:
    """Return what a detector found in a sample's image, for a model that reads such regions.

    Raises:
        BadSample: the arrays are missing or cannot be read.
    """
    config = model.config.vision
    assert isinstance(config, RegionConfig)
    return read_regions(sample.key, sample.fields, RegionLayout(config.boxes, config.number))


def detected_boxes(arrays: RegionArrays, truth: Truth) -> tuple[tuple[float, ...], ...]:
    """Return a detector's boxes as left, top, width, height in pixels."""
    low, high = arrays.boxes[:, :2], arrays.boxes[:, 2:]
    scale = np.array([truth.width, truth.height])
    return tuple(map(tuple, np.concatenate([low * scale, (high - low) * scale], 1).tolist()))


def score_detected(parts: Parts, arrays: RegionArrays, texts: Sequence[str], head: Head, pairs: int) -> Tensor:
    """Match every region that a detector found, alone, with every text -> [S, C] float32 on the CPU.

    Args:
        parts: a model that reads a detector's regions.
        arrays: of one image.
        texts: S of them.
        head: as ``scorer_of`` gives it.
        pairs: most pairs at once.
    """
    config = parts.model.config.vision
    assert isinstance(config, RegionConfig)
    features, boxes = torch.from_numpy(arrays.features), torch.from_numpy(geometry(arrays.boxes, config.boxes))
    size, found = max(1, pairs // len(texts)), []
    for first in range(0, len(features), size):
        part = slice(first, first + size)
        alone = Detected(features[part, None], boxes[part, None], torch.ones(len(features[part]), 1, dtype=torch.bool))
        found.append(_match(parts, alone, texts, head))
    return torch.cat(found, 1)


def _match(parts: Parts, vision: Images | Detected, texts: Sequence[str], head: Head) -> Tensor:
    """Scores of all pairs of text and image, [S, C]."""
    model, data, words = parts.model, parts.run.data, parts.tokenizer
    ids = [ViewText(words.encode(text, data.max_length)[0]) for text in texts]
    view = pad_texts(ids, "full", words.vocabulary.pad, data.max_length)
    batch = Batch(images={"clean": vision}, texts={"clean": view}).to(model.device)
    number, images = len(ids), batch.num_images
    with evaluating(model):
        if head == "itc":
            run = model.run([Embed("image"), Embed("text")], batch)
            return (run[Embed("text")].float() @ run[Embed("image")].float().T).cpu()
        text = torch.arange(number, device=model.device).repeat_interleave(images)
        image = torch.arange(images, device=model.device).repeat(number)
        fused = model.run([_PAIRS], batch, rows={"pairs": Rows(image, text)})[_PAIRS]
        return head.score(fused.pooled).float().unflatten(0, (number, images)).cpu()
