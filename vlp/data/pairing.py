"""Texts of two segments, and pairs that are made false on purpose.

Models of regions say so to matching, which then reads `targets["match"]` (itm's scheme `given`): ViLBERT and LXMERT
replace the caption, VisualBERT a second caption, Oscar the object tags behind it.
Shapes: L ids of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from vlp.config import Config
from vlp.data.reader import BadSample, Sample
from vlp.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from vlp.data.batch import Example

FALSE_TEXT, TRUE, FALSE_SECOND = 0, 1, 2
"""Values of `targets["match"]`."""


class PairingConfig(Config):
    """What stands behind a caption, and how often pairs are made false."""

    second: str | None = None
    """Field whose texts follow the caption as its second segment (Oscar's object tags); `captions`: another caption of
    the image (VisualBERT); none = texts have one segment."""
    false_text: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples whose caption is another sample's."""
    false_from: Literal["any", "alike"] = "any"
    """Whose caption that is: any sample's, or one whose captions are like the true one by the rare words that they
    share, TF-IDF (InterBERT). All captions are then read once when a run starts; 8 bytes are kept for every word."""
    alike: int = Field(default=30, ge=1)
    """Samples, the most alike, from which `alike` draws."""
    false_second: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples whose second segment is another sample's."""


def pair(
    config: PairingConfig,
    example: Example,
    sample: Sample,
    other: Callable[[], Sample],
    generator: np.random.Generator,
    alike: Callable[[str], Sample] | None = None,
) -> Example:
    """Give an example its second segment, and make it false for its share of the positions.

    Args:
        config: how.
        example: with its caption.
        sample: what it was made of.
        other: reads another sample of the data.
        generator: keyed by the sample's position.
        alike: reads a sample whose captions are like a text, for `false_from: alike`.

    Raises:
        BadSample: the sample, or the other one, has no second text.
    """
    level, number = generator.random(), generator.random()
    match = TRUE
    second = None if config.second is None else _second(config.second, sample, example.text, number)
    if level < config.false_text:
        match = FALSE_TEXT
        found = alike(example.text) if alike is not None and example.text is not None else other()
        texts = [text for text in found.texts if text.strip()]
        if not texts:
            raise BadSample(sample.key, "another sample, which was to make it false, has no caption")
        example = replace(example, text=texts[int(number * len(texts))])
    elif level < config.false_text + config.false_second and config.second is not None:
        match, second = FALSE_SECOND, _second(config.second, other(), None, number)
    targets: Mapping[str, npt.NDArray[Any]] = example.targets
    if config.false_text or config.false_second:
        targets = {**targets, "match": np.int64(match)}  # type: ignore[dict-item]
    return replace(example, second=second, targets=targets)


def _second(field: str, sample: Sample, caption: str | None, number: float) -> str:
    """The text of a sample's second segment; ``number`` in 0..1 chooses among captions other than the first segment."""
    if field == "captions":
        captions = [text for text in sample.texts if text.strip()]
        if caption in captions:
            captions.remove(caption)
        if not captions:
            raise BadSample(sample.key, "no other caption for data.pairing.second captions")
        return captions[int(number * len(captions))]
    text = " ".join(_strings(sample.fields.get(field))).strip()
    if not text:
        raise BadSample(sample.key, f"no {field}, which data.pairing.second wants")
    return text


def _strings(value: Any) -> Iterator[str]:
    """A text, or texts of a list."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def encode_segments(
    tokenizer: Tokenizer, first: str, second: str, max_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Lay a second text behind the first: [CLS] first [SEP] second [SEP]; the longer of the two is cut.

    Returns:
        ids [L] with L <= ``max_length``, where words begin [L], and segments [L], 0 and 1.
    """
    sides = [tokenizer.encode(text, max_length) for text in (first, second)]
    lengths = [len(ids) for ids, _ in sides]
    lengths[1] -= 1  # [CLS] stands once
    while sum(lengths) > max_length:
        lengths[int(lengths[1] >= lengths[0])] -= 1
    kept = []
    for (ids, starts), length, begin in zip(sides, lengths, (0, 1), strict=True):
        # The last id, [SEP], stays.
        kept.append([np.append(each[begin : begin + length - 1], each[-1]) for each in (ids, starts)])
    segments = np.repeat([0, 1], lengths)
    return np.concatenate([one[0] for one in kept]), np.concatenate([one[1] for one in kept]), segments
