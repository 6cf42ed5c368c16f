"""Scenes of two emoji: who stands where, and which pairs are kept for test."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from vlp.data.reader import decode_sample, open_reader


@pytest.fixture(scope="module")
def scenes():
    return open_reader("emoji-scenes:noto")


def test_a_scene_shows_what_its_caption_says(scenes):
    pictures = {}
    for index in range(len(scenes)):
        sample = decode_sample(scenes[index])
        fields = sample.fields
        assert sample.texts == (f"{fields['first']} {fields['relation']} {fields['second']}",)
        if {fields["first"], fields["second"]} == {"tomato", "postbox"}:
            pictures[sample.texts[0]] = sample.images[0].numpy()
    assert len(pictures) == 4
    beside, other = pictures["tomato left of postbox"], pictures["postbox left of tomato"]
    assert beside.shape == (3, 64, 64)
    np.testing.assert_array_equal(beside[:, 16:48, :32], other[:, 16:48, 32:])  # the tomato, left and right
    np.testing.assert_array_equal(beside[:, 16:48, :32], pictures["tomato above postbox"][:, :32, 16:48])
    assert (beside[:, :16] == 255).all() and (beside[:, 48:] == 255).all()
    red, _, blue = beside[:, 24:40, 8:24].reshape(3, -1).mean(1)
    assert red > blue + 50


def test_two_concepts_are_in_one_split_in_every_style(scenes):
    splits, seen = {}, {"train": set(), "val": set(), "test": set()}
    for style in ("noto", "fluent3d"):
        for split in seen:
            reader = open_reader(f"emoji-scenes:{style}", where={"split": split})
            for row in (reader[index].fields for index in range(len(reader))):
                pair = frozenset((row["first"], row["second"]))
                assert splits.setdefault(pair, split) == split
                seen[split] |= pair
    assert len(splits) == 36 * 35 / 2
    assert seen["test"] == seen["train"]  # each concept by itself is trained
    shares = {split: sum(one == split for one in splits.values()) for split in seen}
    assert shares == {"train": 429, "val": 58, "test": 143}


def test_several_styles_and_a_copy_read_alike(scenes):
    both = open_reader("emoji-scenes:noto, twemoji")
    assert len(both) == 2 * len(scenes) == 5040
    assert both[7].files == scenes[7].files
    assert both.words(7) == replace(both[7], files={})
    assert pickle.loads(pickle.dumps(both))[2600].files == both[2600].files
    assert both.fingerprint != scenes.fingerprint
    assert [path.rsplit("/", 1)[-1] for path in both.paths()] == ["noto.tar", "twemoji.tar"]


@pytest.mark.parametrize(
    ("spec", "where", "says"),
    [
        ("emoji-scenes:crayon", None, "style: 'crayon'"),
        ("emoji-scenes:noto", {"split": "dev"}, "split"),
    ],
)
def test_what_is_not_there_is_said(spec, where, says):
    with pytest.raises(ValueError, match=says):
        open_reader(spec, where=where)
