"""Examples to a batch: text views made from each sample's position, padding, ids of images and captions.

What becomes of a sample depends on its position alone, not on the batch, rank or worker that it falls into.
Shapes: S samples, B images, T texts, I images per text, L text length, K labelled positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from encoders.types import AttentionKind, Batch, Images, Regions, Texts
from objectives.base import AGAIN, Draw, ImageView, View, ViewText, draws_of
from objectives.spans import SpannedView
from vlp.data.asking import prefix_ids, put_before
from vlp.data.boxes import NamedBox, with_boxes
from vlp.data.pairing import encode_segments
from vlp.data.regions import RegionArrays, RegionLayout, region_views
from vlp.data.spans import CharSpan, token_spans
from vlp.data.tokenizer import Tokenizer

_MULTIPLE = 8  # lengths are rounded up to it: few shapes for the compiler, and sizes that tensor cores like


@dataclass(frozen=True)
class Example:
    """What a task makes of one sample, or of one text of a sample that has several."""

    key: str
    """Name of the sample, for errors."""
    images: tuple[Tensor, ...]
    """uint8 [3, H, W] each; the same number in all examples of a task."""
    text: str | None
    """Text of the view "clean" and of every other view that ``other_texts`` does not name; None in all examples of a
    batch: images alone."""
    other_texts: Mapping[str, str] = field(default_factory=dict)
    """By view, text of views that are made of something else, as "lm:answer"; views that no objective has are left."""
    second: str | None = None
    """What follows the text as its second segment."""
    prefix: str | None = None
    """Words before the text wherever it is read and not written; no view hides or predicts them."""
    spans: tuple[CharSpan, ...] = ()
    """Spans of the text that views may mask."""
    named: tuple[NamedBox, ...] | None = None
    """Spans of the text that name boxes of the image; None in all examples of a batch: boxes are not read."""
    regions: RegionArrays | None = None
    """What a detector saw of the image, in place of it."""
    more_regions: tuple[RegionArrays, ...] = ()
    """What it saw of further images, the same number in all examples of a task."""
    targets: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """By name, what the task needs beside; stacked over the examples of the batch."""
    image_id: int | None = None
    """Equal ids mark the same image; None = the loader's own, see ``fetch.image_identity``."""
    again: tuple[Tensor, ...] = ()
    """The images with another augmentation, for the view "again"; none where nobody reads it."""


def stable_hash(data: str | bytes) -> int:
    """Hash to 0 .. 2**63 - 1 that is the same in every process and on every machine."""
    digest = hashlib.blake2b(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data, digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def caption_hash(text: str) -> int:
    """Hash of a caption's words, whatever their case and the space between them."""
    return stable_hash(" ".join(text.lower().split()))


def pad_texts(texts: Sequence[ViewText], attention: AttentionKind, pad: int, max_length: int | None = None) -> Texts:
    """Pad the texts of one view to the longest, rounded up to a multiple of 8.

    Args:
        texts: At least one; either all have labels or none.
        attention: The view's; "prefix" asks for every text's ``prefix``.
        pad: Id at padding.
        max_length: Most positions the encoder has; the rounding stops there.

    Returns:
        ids and keep [T, L], labels [T, L] (-100 at padding) and label_at [K] where the view has labels, prefix [T]
        where attention is "prefix".
    """
    longest = max(len(text.ids) for text in texts)
    length = _round_up(longest) if max_length is None else max(longest, min(_round_up(longest), max_length))
    ids = np.full((len(texts), length), pad, dtype=np.int64)
    keep = np.zeros((len(texts), length), dtype=np.bool_)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = text.ids
        keep[row, : len(text.ids)] = True
    prefix = None
    if attention == "prefix":
        prefix = torch.tensor([_prefix(text) for text in texts], dtype=torch.int64)
    labels, label_at = _labels(texts, length)
    return Texts(torch.from_numpy(ids), torch.from_numpy(keep), attention, prefix, labels=labels, label_at=label_at)


def _round_up(number: int) -> int:
    return -(-number // _MULTIPLE) * _MULTIPLE


def _prefix(text: ViewText) -> int:
    assert text.prefix is not None, "a view with attention prefix must say how long the prefix is"
    return text.prefix


def _labels(texts: Sequence[ViewText], length: int) -> tuple[Tensor | None, Tensor | None]:
    """Labels [T, L] and their flat positions [K], K a multiple of 8 and never 0; None, None without labels."""
    if all(text.labels is None for text in texts):
        return None, None
    labels = np.full((len(texts), length), -100, dtype=np.int64)
    for row, text in enumerate(texts):
        assert text.labels is not None and len(text.labels) == len(text.ids), (
            "labels and ids of a view differ in length"
        )
        labels[row, : len(text.labels)] = text.labels
    found = np.flatnonzero(labels != -100)
    label_at = np.full(max(_round_up(len(found)), _MULTIPLE), -1, dtype=np.int64)
    label_at[: len(found)] = found
    return torch.from_numpy(labels), torch.from_numpy(label_at)


def collate(
    examples: Sequence[Example],
    positions: Sequence[int],
    tokenizer: Tokenizer,
    views: Mapping[str, View],
    max_length: int,
    seed: int,
    image_views: Mapping[str, ImageView | None] | None = None,
    regions: RegionLayout | None = None,
) -> Batch:
    """Make a batch: the view "clean" of images and texts, and every other text view.

    Args:
        examples: One a text, at least one. Those that follow each other at the same position are texts of one sample
            and share its images: the first one's are taken.
        positions: Each one's position in the run, which keys the views' draws, together with its number among the
            texts there.
        tokenizer: Text to ids.
        views: Text views besides "clean", by name.
        max_length: Most ids of a text.
        seed: Of the run.
        image_views: Image views besides "clean" by name, and which patches they hide; None: none.
        regions: What is read of the regions that the examples have in place of images.

    Returns:
        Batch with B = S * I images. ``image_of_text`` is None with one image and one text per sample, [T] where samples
        have one image and several texts, else [T, I]; ``position`` is [S], one per sample.

    Raises:
        ValueError: If images differ in size or examples in their number of images.
    """
    assert examples and len(examples) == len(positions) and "clean" not in views
    draw, numbers = Draw(seed), text_numbers(positions)
    captions = [example.text for example in examples if example.text is not None]
    texts = _texts(examples, positions, tokenizer, views, max_length, draw) if captions else {}
    samples = [example for example, number in zip(examples, numbers, strict=True) if number == 0]
    places = [place for place, number in zip(positions, numbers, strict=True) if number == 0]
    images, image_of_text = _visions(samples, places, image_views or {}, regions, draw), None
    number = _number(samples[0])
    if images and (number > 1 or len(samples) < len(examples)):
        image_of_text = _image_of_text(numbers, number)
    batch = Batch(
        images=images,
        texts=texts,
        image_of_text=image_of_text,
        targets=_targets(examples),
        image_id=_image_ids(samples) if images else None,
        caption_id=torch.tensor([caption_hash(text) for text in captions], dtype=torch.int64) if captions else None,
        position=torch.tensor([p for p, number in zip(positions, numbers, strict=True) if number == 0]),
    )
    return with_boxes(batch, examples, tokenizer, max_length)


def _texts(
    examples: Sequence[Example],
    positions: Sequence[int],
    tokenizer: Tokenizer,
    views: Mapping[str, View],
    max_length: int,
    draw: Draw,
) -> dict[str, Texts]:
    """The view "clean" of all texts, and every other view."""
    before = [prefix_ids(tokenizer, example.prefix, max_length) for example in examples]
    joined = [_encode(example, tokenizer, max_length - len(ids)) for example, ids in zip(examples, before, strict=True)]
    encoded, segments = [one[:2] for one in joined], [one[2] for one in joined]
    vocabulary, begins = tokenizer.vocabulary, tokenizer.begins
    read = [put_before(ViewText(own[0]), ids, begins) for own, ids in zip(encoded, before, strict=True)]
    texts = {"clean": pad_texts(read, "full", vocabulary.pad, max_length)}
    for name, view in views.items():
        made = []
        for example, position, number, own in zip(examples, positions, text_numbers(positions), encoded, strict=True):
            ids, starts = (
                tokenizer.encode(example.other_texts[name], max_length) if name in example.other_texts else own
            )
            key = numbered(draws_of(name, view), number)
            given = (ids, starts, vocabulary, draw.sample(key, position))
            if isinstance(view, SpannedView):
                spans = token_spans(tokenizer, example.text or "", example.spans, max_length)
                made.append(view.make_spanned(*given, spans))
            else:
                made.append(view.make(*given))
        if view.attention != "causal":
            made = [put_before(text, ids, begins) for text, ids in zip(made, before, strict=True)]
        texts[name] = pad_texts(made, view.attention, vocabulary.pad, max_length)
    return {name: with_segments(text, segments, name) for name, text in texts.items()}


def _encode(
    example: Example, tokenizer: Tokenizer, max_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.int64] | None]:
    """Ids of an example's text, where words begin, and, where it has two segments, these."""
    assert example.text is not None, f"{example.key} has no text, but others of its batch have one"
    if example.prefix is not None and max_length < 3:
        raise ValueError(f"data.prefix {example.prefix!r} leaves no room for a text; raise data.max_length")
    if example.second is not None and example.prefix is not None:
        raise ValueError("data.prefix stands before texts of one segment; leave out data.pairing.second")
    if example.second is None:
        return (*tokenizer.encode(example.text, max_length), None)
    return encode_segments(tokenizer, example.text, example.second, max_length)


def with_segments(texts: Texts, segments: Sequence[npt.NDArray[np.int64] | None], name: str) -> Texts:
    """Give the texts of the view ``name`` their segments [L] each, where they have any.

    Raises:
        ValueError: the view has made texts of other lengths.
    """
    if all(each is None for each in segments):
        return texts
    found = np.zeros(tuple(texts.ids.shape), dtype=np.int64)
    for row, each in enumerate(segments):
        if each is None:
            continue
        if len(each) != texts.keep[row].sum():
            raise ValueError(
                f"data.pairing.second makes texts of two segments, which the text view {name!r} does not keep; "
                "leave it out, or remove the objective that writes texts"
            )
        found[row, : len(each)] = each
    return replace(texts, segments=torch.from_numpy(found))


def text_numbers(positions: Sequence[int]) -> list[int]:
    """Return each text's number, from 0, among those of its position, which follow each other."""
    numbers: list[int] = []
    for index, position in enumerate(positions):
        numbers.append(numbers[-1] + 1 if index and position == positions[index - 1] else 0)
    return numbers


def numbered(name: str, number: int) -> str:
    """Return the name of a draw for a text of a position: the first one's is that of a position with one text."""
    return name if number == 0 else f"{name}/{number}"


def _image_of_text(numbers: Sequence[int], images: int) -> Tensor:
    """Index of each text's image, [T], or of its I images, [T, I]; ``numbers`` count the texts of each sample."""
    sample = torch.tensor(numbers).eq(0).cumsum(0) - 1  # [T]
    return sample if images == 1 else sample[:, None] * images + torch.arange(images)


def _visions(
    samples: Sequence[Example],
    positions: Sequence[int],
    views: Mapping[str, ImageView | None],
    layout: RegionLayout | None,
    draw: Draw,
) -> Mapping[str, Images | Regions]:
    """The views of all images, or of what a detector saw of them."""
    if layout is not None:
        for one in samples:
            _check_number(one, samples[0], _number(one), _number(samples[0]))
        found = [each for one in samples if one.regions is not None for each in (one.regions, *one.more_regions)]
        places = [place for place, one in zip(positions, samples, strict=True) for _ in range(_number(one))]
        return region_views(found, places, layout, draw)
    images = _images(samples)
    if images and views:
        images |= hide_patches(images["clean"], views, positions, len(samples[0].images), draw)
    return images


def _number(example: Example) -> int:
    """An example's images, seen or told by a detector, at least one."""
    return max(1, len(example.images), 1 + len(example.more_regions))


def _check_number(one: Example, first: Example, number: int, wanted: int) -> None:
    if number != wanted:
        raise ValueError(
            f"data: sample '{one.key}' has {number} images, sample '{first.key}' has {wanted}; "
            "all samples of a task need the same number, name the images with data.image"
        )


def _images(examples: Sequence[Example]) -> dict[str, Images]:
    """The view "clean" of all images, sample by sample, and "again" where it is wanted."""
    first = examples[0]
    number = len(first.images)
    for example in examples:
        _check_number(example, first, len(example.images), number)
    pixels = [image for example in examples for image in example.images]
    if not pixels:
        return {}
    for example in examples:
        if wrong := [image for image in example.images if image.shape != pixels[0].shape]:
            raise ValueError(
                f"data: an image of sample '{example.key}' is {tuple(wrong[0].shape)}, one of '{first.key}' is "
                f"{tuple(pixels[0].shape)}; images of a batch need one size, use a transform that resizes to a square"
            )
    found = {"clean": Images(torch.stack([image.contiguous() for image in pixels]))}
    if again := [image.contiguous() for example in examples for image in example.again]:
        found[AGAIN] = Images(torch.stack(again))
    return found


def hide_patches(
    clean: Images, views: Mapping[str, ImageView | None], positions: Sequence[int], number: int, draw: Draw
) -> dict[str, Images]:
    """Return the views with hidden patches of ``number`` images at each position, drawn for each image."""
    found = {}
    for name, view in views.items():
        if view is None:
            found[name] = clean
            continue
        masks = np.stack(
            [view.make(draw.sample(numbered(f"image:{name}", i), place)) for place in positions for i in range(number)]
        )
        at = np.flatnonzero(masks)
        padded = np.full(max(_round_up(len(at)), _MULTIPLE), -1, dtype=np.int64)
        padded[: len(at)] = at
        found[name] = Images(clean.pixels, masked=torch.from_numpy(masks), masked_at=torch.from_numpy(padded))
    return found


def _image_ids(examples: Sequence[Example]) -> Tensor:
    """Id of each image, [B]; the images of one example are different images."""
    ids = []
    for example in examples:
        own = stable_hash(example.key) if example.image_id is None else example.image_id
        ids += [own] if _number(example) == 1 else [stable_hash(f"{own}/{i}") for i in range(_number(example))]
    return torch.tensor(ids, dtype=torch.int64)


def _targets(examples: Sequence[Example]) -> dict[str, Tensor]:
    names = set(examples[0].targets)
    for example in examples:
        assert set(example.targets) == names, (
            f"targets of {example.key}: {sorted(example.targets)}, not {sorted(names)}"
        )
    return {name: torch.from_numpy(np.stack([example.targets[name] for example in examples])) for name in sorted(names)}
