"""Instructions: what the encoder is asked and the decoder answers, made of a sample's fields (Wang et al. 2022, OFA).

One model and one loss for captioning, question answering, matching, grounding and detection: `{text}` in a template is
the sample's text, `{match}` yes or no, `{NAME}` a field, `{NAME:box}` a field's box as four location bins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator

from vlp.config import Config
from vlp.data.asking import ANSWER, count_answers
from vlp.data.batch import Example
from vlp.data.reader import BadSample, Sample
from vlp.data.transforms import STILL, moved_by

if TYPE_CHECKING:
    from vlp.data.loader import DataConfig

BOX, OBJECTS = "box", "objects"


class InstructConfig(Config):
    """What the encoder reads beside the image, and what the decoder writes."""

    ask: str
    """The encoder's text. `{text}` is the sample's text, drawn anew at each position where it has several, and `{NAME}`
    its field NAME: of a list the most frequent, of a mapping the best. `{NAME:box}` is a box of left, top, width and
    height in pixels of an image of `width` and `height`, as its corners' location bins; `{NAME:objects}` a list of
    such with a `label` each."""
    answer: str = "{text}"
    """The decoder's text, in the same way; `{match}` is whether `{text}` is the sample's own, yes or no."""
    false_text: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples whose `{text}` is another sample's."""

    @field_validator("ask", "answer")
    @classmethod
    def _is_template(cls, template: str) -> str:
        try:
            specs = [spec for _, name, spec, _ in Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise ValueError(f"{template!r} is no template: {error}; write braces around names of fields") from error
        if unknown := [spec for spec in specs if spec not in ("", BOX, OBJECTS)]:
            raise ValueError(f"{template!r} asks for {unknown[0]!r}; behind a field's name stand :{BOX} or :{OBJECTS}")
        return template

    @property
    def boxes(self) -> bool:
        """Whether it writes places in the image."""
        return any(spec for template in (self.ask, self.answer) for _, _, spec, _ in Formatter().parse(template))


def check_instructions(data: DataConfig) -> None:
    """Refuse boxes that would be no places in the image that the model gets, and texts that are made in two ways.

    Raises:
        ValueError: there are no location bins, images are moved under their boxes, or a source asks otherwise too.
    """
    every = {"data": data.instruct, **{f"data.sources.{name}": one.instruct for name, one in data.sources.items()}}
    for name, config in every.items():
        if config is None:
            continue
        own = data if name == "data" else data.sources[name.removeprefix("data.sources.")]
        if other := [each for each in ("prefix", "answer", "pairing") if getattr(own, each) is not None]:
            raise ValueError(f"{name}.instruct and {name}.{other[0]} both say what is asked; leave the second one out")
        if not config.boxes:
            continue
        if not data.tokenizer.bins:
            raise ValueError(f"{name}.instruct writes boxes as location bins; set data.tokenizer.bins (OFA 1000)")
        if moving := moved_by(data.transform):
            raise ValueError(
                f"{name}.instruct writes boxes, which do not follow images that data.transform moves; set "
                + ", ".join(f"{each} to {'none' if STILL[each] is None else STILL[each]}" for each in moving)
            )


def instructed(
    config: InstructConfig, sample: Sample, other: Callable[[], Sample], generator: np.random.Generator, bins: int
) -> Example:
    """Make an example of a sample.

    Args:
        config: how.
        sample: with transformed images.
        other: reads another sample of the data.
        generator: keyed by the sample's position.
        bins: places along each side of an image.

    Raises:
        BadSample: it lacks what the templates name.
    """
    number, level = generator.random(), generator.random()
    false = level < config.false_text

    def value(name: str, spec: str) -> str:
        if name == "text":
            return _drawn(other() if false else sample, number)
        if name == "match":
            return "no" if false else "yes"
        if (found := sample.fields.get(name)) in (None, "", [], {}):
            raise BadSample(sample.key, f"no {name}, which data.instruct wants")
        found = _parsed(found) if spec else found
        if spec == OBJECTS:
            objects = found if isinstance(found, list) and all(isinstance(one, Mapping) for one in found) else []
            return " ".join(f"{_bins(sample, one.get('box'), bins)} {one.get('label', '')}".strip() for one in objects)
        return _bins(sample, found, bins) if spec == BOX else _best(found)

    texts = [
        "".join(said + ("" if name is None else value(name, spec or "")) for said, name, spec, _ in parts)
        for parts in (Formatter().parse(template) for template in (config.ask, config.answer))
    ]
    return Example(sample.key, sample.images, texts[0], {ANSWER: texts[1]})


def _drawn(sample: Sample, number: float) -> str:
    """One of a sample's texts; ``number`` in 0..1 chooses."""
    texts = [text for text in sample.texts if text.strip()]
    if not texts:
        raise BadSample(sample.key, "no caption, or an empty one")
    return texts[int(number * len(texts))]


def _parsed(value: Any) -> Any:
    """What a table's cell holds as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None


def _best(value: Any) -> str:
    """The best of a mapping to scores, the most frequent of a list, or what there is."""
    if isinstance(value, Mapping):
        value = max(value, key=lambda one: value[one])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        value = count_answers(value).most_common(1)[0][0]
    return str(value)


def _bins(sample: Sample, box: Any, bins: int) -> str:
    """Left, top, right and bottom of a box, as the words for their shares of the image's sides."""
    try:
        left, top, width, height = (float(one) for one in box)
        sides = float(sample.fields["width"]), float(sample.fields["height"])
        corners = [left / sides[0], top / sides[1], (left + width) / sides[0], (top + height) / sides[1]]
        places = [round(min(max(one, 0.0), 1.0) * (bins - 1)) for one in corners]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadSample(sample.key, f"no box of four numbers with width and height of its image: {box!r}") from error
    return " ".join(f"<bin_{place}>" for place in places)
