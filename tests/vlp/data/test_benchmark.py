"""The embedded emoji benchmark is whole, and its split is the frozen one."""

import io
import json
import tarfile
import zlib
from collections import Counter
from functools import cache

import pytest
from PIL import Image

from vlp.data.benchmark import STYLES, emoji_path, emoji_split, emoji_split_hash

FROZEN = "57e99ba2d0f38a9b886a7c38ce61233392a3dd73dad76a1eaf3a2a676f0e97bb"


@cache
def samples(style: str) -> dict[str, dict[str, bytes]]:
    """Members by extension, by key, in stored order."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(emoji_path(style), "r:") as tar:
        for member in tar:
            key, extension = member.name.split(".")
            found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def test_split_is_frozen():
    split = emoji_split()
    assert emoji_split_hash() == FROZEN
    assert json.loads((emoji_path("noto").parent / "split.json").read_text())["sha256"] == FROZEN
    assert FROZEN in (emoji_path("noto").parent / "README.md").read_text()
    assert Counter(concept["split"] for concept in split.values()) == {"train": 1106, "val": 147, "test": 328}


def test_no_family_spans_two_splits():
    families = {(concept["family"], concept["split"]) for concept in emoji_split().values()}
    assert len(families) == len({family for family, _ in families}) == 1369


@pytest.mark.parametrize("style", STYLES)
def test_samples_agree_with_the_split(style):
    split = emoji_split()
    stored = samples(style)
    assert len(stored) == 1581
    assert list(stored) == list(split)
    for key, files in stored.items():
        fields = json.loads(files["json"])
        assert list(files) == ["webp", "txt", "json"]
        assert {"family": fields["family"], "split": fields["split"]} == split[key]
        assert (fields["style"], fields["label"]) == (style, files["txt"].decode())
        assert fields["tags"] and fields["group"] != "flags"
    assert len({files["txt"] for files in stored.values()}) == 1581


def test_styles_share_labels_and_no_image():
    labels = [[files["txt"] for files in samples(style).values()] for style in STYLES]
    assert labels[0] == labels[1] == labels[2]
    images = [{files["webp"] for files in samples(style).values()} for style in STYLES]
    assert len(set.union(*images)) == sum(map(len, images))


@pytest.mark.parametrize("style", STYLES)
def test_images_are_small_rgb_on_white(style):
    corners = Counter()
    for key, files in samples(style).items():
        with Image.open(io.BytesIO(files["webp"])) as image:
            image.load()
        assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB"), key
        low, high = zip(*image.getextrema())
        assert max(high) - min(low) > 20, f"{key} is blank"  # fog is pale
        corners[min(image.getpixel((0, 0))) > 240] += 1
    # Transparent pixels turned black would show here. Square art (buttons, Zodiac signs) may fill its corner.
    assert corners[True] > 0.9 * 1581


def test_headers_hold_nothing_of_the_machine_that_built_them():
    with tarfile.open(emoji_path("noto"), "r:") as tar:
        member = tar.next()
        assert member is not None
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_size_in_wheel_and_repository():
    folder = emoji_path("noto").parent
    # Both compress files with zlib: two thirds of a shard are tar headers and padding.
    size = sum(len(zlib.compress(path.read_bytes())) for path in folder.rglob("*") if path.is_file())
    assert size < 5e6
    assert sum(len(files["webp"]) for style in STYLES for files in samples(style).values()) < 4e6


def test_notices_lie_beside_the_art():
    folder = emoji_path("noto").parent
    notice = (folder / "NOTICE").read_text()
    for style in STYLES:
        assert f"{style}.tar" in notice
    licences = [path for path in (folder / "licences").iterdir() if f"licences/{path.name}" in notice]
    assert len(licences) == 5 == len(list((folder / "licences").iterdir()))


def test_unknown_style_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'apple'.*noto, twemoji, fluent3d"):
        emoji_path("apple")
