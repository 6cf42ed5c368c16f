"""Spans of a caption that the data name: from characters to tokens.

A field holds, for each caption, its spans: ``[[2, 7, "attribute"], [8, 11, "object"]]`` says of "a brown dog" that the
characters 2 to 6 are an attribute and 8 to 10 an object; of a sample with several captions it is a list of such lists.
Characters are counted in the caption without space around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from objectives.spans import TokenSpan
from vlp.data.reader import BadSample, Sample
from vlp.data.tokenizer import Tokenizer

CharSpan: TypeAlias = tuple[int, int, str]
"""First character, the one behind the last, and what they are."""


def spans_of(sample: Sample, field: str, text: str | None) -> tuple[CharSpan, ...]:
    """Return the spans of one of a sample's captions; a text that is none of them has none.

    Raises:
        BadSample: the sample has no such field, or not a list of [first, end, kind] for each caption.
    """
    every = per_caption(sample, field, _is_span, "data.spans")
    if text is None or text not in sample.texts:
        return ()
    return tuple(_checked(sample.key, field, text, one) for one in every[sample.texts.index(text)])


def one_caption(sample: Sample, number: int, field: str | None) -> Sample:
    """Return the sample with one of its captions alone, and the spans of that one where ``field`` has them."""
    text = sample.texts[number]
    if field is None:
        return replace(sample, texts=(text,))
    return replace(
        sample,
        texts=(text,),
        fields={**sample.fields, field: [per_caption(sample, field, _is_span, "data.spans")[number]]},
    )


def token_spans(tokenizer: Tokenizer, text: str, spans: Sequence[CharSpan], max_length: int) -> list[TokenSpan]:
    """Return where the spans stand among the ids of a text; those that are cut off are left out."""
    found = []
    for first, end, kind in spans:
        begin, stop = (_tokens_before(tokenizer, text[:place].rstrip(), max_length) for place in (first, end))
        if begin < stop:
            found.append((begin, stop, kind))
    return found


def _tokens_before(tokenizer: Tokenizer, text: str, max_length: int) -> int:
    """Number of ids of a text, with the one that begins it, without the one that ends it."""
    ids, _ = tokenizer.encode(text, max_length)
    first = int(tokenizer.begins)
    return first + int(np.argmax(ids[first:] == tokenizer.vocabulary.sep))


def per_caption(sample: Sample, field: str, is_one: Callable[[Any], bool], setting: str) -> list[Any]:
    """Return a field's list for each caption of a sample.

    Args:
        sample: with its captions.
        field: its name.
        is_one: whether a value is an entry of such a list; where the sample has one caption, the field may be its list.
        setting: that names the field, for the message.

    Raises:
        BadSample: the sample has no such field, or not as many lists as captions.
    """
    value = sample.fields.get(field)
    if isinstance(value, str):  # a cell of a csv file
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise BadSample(sample.key, f"no list in {field}, which {setting} names")
    if len(sample.texts) == 1 and (not value or is_one(value[0])):
        value = [value]
    if len(value) != len(sample.texts) or not all(isinstance(one, list) for one in value):
        raise BadSample(sample.key, f"{field} has not a list for each of its {len(sample.texts)} captions")
    return value


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and list(map(type, value)) == [int, int, str]


def _checked(key: str, field: str, text: str, value: Any) -> CharSpan:
    if not _is_span(value) or not 0 <= value[0] < value[1] <= len(text):
        raise BadSample(key, f"{field}: {value!r} is no [first, end, kind] within a caption of {len(text)} characters")
    return value[0], value[1], value[2]
