"""Boxes of the image that words of its caption name: from a field of the data to `Images.boxes` and `Texts.boxes`.

The field holds, for each caption, what it names: ``[[2, 7, [0.1, 0.2, 0.5, 0.9]]]`` says that the characters 2 to 6
name the box with these left, top, right and bottom, shares of the image's width and height; of a sample with several
captions it is a list of such lists. Characters are counted in the caption without space around it (VCR's people,
Flickr30k Entities' phrases; Alberti et al. 2019, B2T2).
Shapes: B images, R boxes, T texts, L length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from encoders.types import Batch, Images
from vlp.data.reader import BadSample, Sample
from vlp.data.spans import per_caption, token_spans
from vlp.data.tokenizer import Tokenizer
from vlp.data.transforms import moved_by

if TYPE_CHECKING:
    from vlp.data.batch import Example
    from vlp.data.loader import DataConfig

Corners: TypeAlias = tuple[float, float, float, float]
NamedBox: TypeAlias = tuple[int, int, Corners]
"""First character, the one behind the last, and the box that they name."""


def check_boxes(config: DataConfig) -> None:
    """Refuse what would move the boxes or the words under them.

    Raises:
        ValueError: there is such a setting.
    """
    if config.boxes is None:
        return
    given, images = config.transform, "data.transform"
    moves = {
        **{f"{images}.{name} {getattr(given, name)}": True for name in moved_by(given)},
        f"{images}.crop_share {given.crop_share}": given.crop_share < 1,
        "data.pairing": config.pairing is not None,
        "data.prefix": config.prefix is not None,
        "data.alternates": config.alternates is not None,
        "data.texts_per_image": config.texts_per_image > 1,
        "data.group": config.group is not None,
    }
    if found := [name for name, moved in moves.items() if moved]:
        raise ValueError(
            f"data.boxes {config.boxes!r}: {', '.join(found)} would move boxes, or the words that name them; use "
            "resize squash, flip never and no other change of images, and leave the others out"
        )


def boxes_of(sample: Sample, field: str, text: str | None) -> tuple[NamedBox, ...]:
    """Return what one of a sample's captions names; a text that is none of them names nothing.

    Raises:
        BadSample: the sample has no such field, or not a list of [first, end, box] for each caption.
    """
    value = per_caption(sample, field, _is_named, "data.boxes")
    if text is None or text not in sample.texts:
        return ()
    return tuple(_checked(sample.key, field, text, one) for one in value[sample.texts.index(text)])


def _is_named(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and isinstance(value[0], int) and isinstance(value[2], list)


def _checked(key: str, field: str, text: str, value: Any) -> NamedBox:
    if _is_named(value) and isinstance(value[1], int) and 0 <= value[0] < value[1] <= len(text):
        corners = [float(x) for x in value[2] if isinstance(x, int | float)]
        if (
            len(corners) == len(value[2]) == 4
            and 0 <= corners[0] < corners[2] <= 1
            and 0 <= corners[1] < corners[3] <= 1
        ):
            return value[0], value[1], (corners[0], corners[1], corners[2], corners[3])
    raise BadSample(
        key,
        f"{field}: {value!r} is no [first, end, [left, top, right, bottom]] within a caption of {len(text)} "
        "characters, with corners as shares of the image's sides",
    )


def with_boxes(batch: Batch, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Batch:
    """Give a batch of one text an image the boxes of its images [B, R, 4], and those that each word names [T, L].

    Text views of other words than the clean one name nothing.
    """
    if not batch.texts or all(example.named is None for example in examples):
        return batch
    clean = batch.texts["clean"]
    named = torch.full(clean.ids.shape, -1, dtype=torch.int64)
    every: list[list[Corners]] = []
    for row, example in enumerate(examples):
        found = example.named or ()
        every.append(list(dict.fromkeys(box for _, _, box in found)))
        spans = [(first, end, str(every[-1].index(box))) for first, end, box in found]
        for begin, stop, number in token_spans(tokenizer, example.text or "", spans, max_length):
            named[row, begin:stop] = int(number)
    boxes = torch.zeros(len(every), max(1, *map(len, every), 1), 4)
    for row, own in enumerate(every):
        boxes[row, : len(own)] = torch.tensor(own).view(-1, 4)
    images = {name: replace(one, boxes=boxes) if isinstance(one, Images) else one for name, one in batch.images.items()}
    texts = {
        name: replace(one, boxes=named) if torch.equal(one.keep, clean.keep) and one.attention == "full" else one
        for name, one in batch.texts.items()
    }
    return replace(batch, images=images, texts=texts)
