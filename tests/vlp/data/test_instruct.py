"""Instructions: templates filled from a sample's fields, location bins, and the way of both into a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from objectives.lm import CausalView
from vlp.config import Layer, build
from vlp.data.batch import Example
from vlp.data.fetch import Fetch, pair_example
from vlp.data.instruct import ANSWER, InstructConfig, check_instructions, instructed
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Sample, open_reader
from vlp.data.tokenizer import TokenizerConfig, build_tokenizer, load_tokenizer
from vlp.data.transforms import TrainTransform

FIELDS = {
    "width": 200,
    "height": 100,
    "box": [20, 10, 100, 90],
    "answers": ["red", "blue", "red"],
    "scores": {"two": 0.3, "three": 0.9},
    "objects": [{"box": [0, 0, 200, 50], "label": "sky"}, {"box": "bad", "label": "sea"}],
}


def sample(**fields: Any) -> Sample:
    return Sample("one", (), ("a red bus",), {**FIELDS, **fields})


def example(ask: str, answer: str, *, false_text: float = 0.0, position: int = 0, **fields: Any) -> Example:
    other = Sample("two", (), ("a blue car",), {})
    config = InstructConfig(ask=ask, answer=answer, false_text=false_text)
    return instructed(config, sample(**fields), lambda: other, np.random.default_rng(position), 11)


@pytest.mark.parametrize(
    ("ask", "answer", "asked", "answered"),
    [
        ("what does the image describe?", "{text}", "what does the image describe?", "a red bus"),
        ('where is "{text}"?', "{box:box}", 'where is "a red bus"?', "<bin_1> <bin_1> <bin_6> <bin_10>"),
        ("what is in {box:box}?", "{text}", "what is in <bin_1> <bin_1> <bin_6> <bin_10>?", "a red bus"),
        ("which colour?", "{answers}", "which colour?", "red"),
        ("how many?", "{scores}", "how many?", "three"),
        ('is it "{text}"? {{yes}}', "{match}", 'is it "a red bus"? {yes}', "yes"),
    ],
)
def test_templates(ask: str, answer: str, asked: str, answered: str) -> None:
    found = example(ask, answer)
    assert (found.text, found.other_texts) == (asked, {ANSWER: answered})


def test_objects_and_cells_of_tables_that_hold_json() -> None:
    objects = json.dumps(FIELDS["objects"][:1])
    found = example("{objects:objects}", "{box:box}", objects=objects, box="[0, 0, 400, 50]")
    assert (found.text, found.other_texts[ANSWER]) == (
        "<bin_0> <bin_0> <bin_10> <bin_5> sky",
        "<bin_0> <bin_0> <bin_10> <bin_5>",
    )


def test_another_samples_text_makes_it_false_for_its_share() -> None:
    found = [example('is it "{text}"?', "{match}", false_text=0.5, position=position) for position in range(200)]
    false = [one for one in found if one.other_texts[ANSWER] == "no"]
    assert {one.text for one in false} == {'is it "a blue car"?'} and 70 < len(false) < 130
    assert {one.text for one in found if one not in false} == {'is it "a red bus"?'}


@pytest.mark.parametrize(
    ("answer", "fields", "said"),
    [
        ("{name}", {}, "no name, which data.instruct wants"),
        ("{box:box}", {"width": 0}, "no box of four numbers"),
        ("{box:box}", {"box": [1, 2, 3]}, "no box of four numbers"),
        ("{objects:objects}", {}, "no box of four numbers .*: 'bad'"),
    ],
)
def test_samples_that_lack_what_is_asked_are_bad(answer: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSample, match=said):
        example("", answer, **fields)


def test_templates_that_are_none_are_refused() -> None:
    for template, said in (("{text", "is no template"), ("{box:bins}", "asks for 'bins'")):
        with pytest.raises(ValidationError, match=said):
            InstructConfig(ask=template)


def test_boxes_want_bins_and_images_that_stay_where_they_are() -> None:
    def data(**settings: Any) -> DataConfig:
        given = {"train": "x", "sources": {"boxes": {"instruct": {"ask": "{text}", "answer": "{box:box}"}}}}
        return build(DataConfig, Layer({**given, **settings}, "a test"))

    with pytest.raises(ValueError, match=r"data.sources.boxes.instruct writes boxes as location bins; set data.token"):
        check_instructions(data())
    with pytest.raises(ValueError, match=r"that data.transform moves; set crop_scale to none, flip to never$"):
        check_instructions(data(tokenizer={"bins": 10}, transform={"crop_scale": [0.5, 1.0]}))
    check_instructions(data(tokenizer={"bins": 10}, transform={"flip": "never"}))
    with pytest.raises(ValueError, match=r"data.instruct and data.prefix both say what is asked"):
        check_instructions(data(instruct={"ask": "{text}"}, prefix="caption:"))


def test_words_for_codes_and_places_and_the_way_into_a_batch(tmp_path: Path) -> None:
    """They stand behind all others, are one id each without spaces between, are read back, and survive saving."""
    captions = ["a red bus on the road", "a red bus", "the road"] * 3
    plain = build_tokenizer(TokenizerConfig(), captions)
    tokenizer = build_tokenizer(TokenizerConfig(codes=5, bins=11), captions)
    first = plain.vocabulary.size
    assert tokenizer.vocabulary.size == first + 16
    text = "a <bin_1> <bin_10> red<bin_0> <code_4>"
    ids = tokenizer.encode(text, 32)[0]
    own = [first + 5 + 1, first + 5 + 10, first + 5, first + 4]
    assert [i for i in ids if i >= first] == own and len(ids) == 2 + 2 + 4
    assert tokenizer.decode(ids).split() == ["a", "<bin_1>", "<bin_10>", "red", "<bin_0>", "<code_4>"]
    tokenizer.save(tmp_path / "tokenizer")
    again = build_tokenizer(TokenizerConfig(source=str(tmp_path / "tokenizer"), codes=5, bins=11), [])
    for other in (load_tokenizer(tmp_path / "tokenizer"), again):
        assert other.vocabulary == tokenizer.vocabulary and other.encode(text, 32)[0].tolist() == ids.tolist()
    with pytest.raises(ValueError, match="CLIP's BPE takes no further tokens"):
        build_tokenizer(TokenizerConfig(source="open_clip:ViT-B-32", bins=3), [])

    Image.new("RGB", (20, 10)).save(tmp_path / "one.png")
    row = {"image": "one.png", "caption": "red bus", "width": 20, "height": 10, "box": [0, 0, 10, 10]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    given = {"instruct": {"ask": "the {text}", "answer": "{box:box}"}, "tokenizer": {"bins": 11}}
    config = build(DataConfig, Layer({**given, "transform": {"image_size": 8, "flip": "never"}}, "a test"))
    fetch = Fetch(
        open_reader(str(tmp_path / "data.jsonl")),
        None,
        pair_example,
        tokenizer,
        {ANSWER: CausalView()},
        config,
        TrainTransform(config.transform),
        0,
    )
    fetched = fetch[[(0, 0)]]
    assert fetched.error is None and fetched.bad == () and fetched.batch is not None
    texts = fetched.batch.texts
    assert tokenizer.decode(texts["clean"].ids[0]) == "the red bus"
    assert tokenizer.decode(texts[ANSWER].ids[0]).split() == ["<bin_0>", "<bin_0>", "<bin_5>", "<bin_10>"]
