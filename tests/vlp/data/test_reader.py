import io

import pytest
from PIL import Image

from vlp.data.reader import decode_sample
from vlp.data.records import BadSample, RawSample


def png(value=0):
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def raw(**files):
    return RawSample("k", "s.tar", {name.replace("__", "."): data for name, data in files.items()})


def reds(sample):
    return [int(image[0, 0, 0]) for image in sample.images]


def test_text_from_txt_before_json():
    files = {"json": b'{"caption": "from json", "id": 3}', "png": png()}
    assert decode_sample(raw(**files)).texts == ("from json",)
    assert decode_sample(raw(**files, txt=b" from txt\n")).texts == ("from txt",)
    sample = decode_sample(raw(**files, txt=b"from txt"), text="caption")
    assert sample.texts == ("from json",) and sample.fields["id"] == 3


def test_several_images_and_texts_in_stored_order():
    sample = decode_sample(raw(left__png=png(7), right__png=png(9), json=b'{"captions": ["one", "two"]}'))
    assert reds(sample) == [7, 9] and sample.texts == ("one", "two")
    sample = decode_sample(raw(a__txt=b"1", b__png=png(1), c__txt=b"2", a__png=png(3)), image=["a.png", "b.png"])
    assert reds(sample) == [3, 1] and sample.texts == ("1", "2")


def test_other_members_become_fields():
    sample = decode_sample(raw(png=png(), txt=b"a", cls=b"7", boxes__json=b"[[0, 1]]", json=b'{"url": "u"}'))
    assert sample.fields == {"cls": b"7", "boxes.json": [[0, 1]], "url": "u"}


@pytest.mark.parametrize(
    "files, options, words",
    [
        ({"txt": b"a"}, {}, "no image; it has txt"),
        ({"png": b"", "txt": b"a"}, {}, "not an image"),
        ({"png": png(), "json": b"{}"}, {}, "no text; it has png, json"),
        ({"png": png(), "json": b'{"caption": null}'}, {}, "no text"),
        ({"png": png(), "txt": b" \n"}, {}, "empty caption"),
        ({"png": png(), "json": b'{"captions": ["a", ""]}'}, {}, "empty caption"),
        ({"png": png(), "txt": b"\xff\xfe"}, {}, "not UTF-8"),
        ({"png": png(), "json": b"{"}, {}, "not json"),
        ({"png": png(), "txt": b"a"}, {"text": "caption"}, "no text; it has png, txt"),
        ({"png": png(), "txt": b"a"}, {"image": "left.png"}, r"no member \.left\.png"),
    ],
)
def test_bad_samples(files, options, words):
    with pytest.raises(BadSample, match=words) as caught:
        decode_sample(raw(**files), **options)
    assert caught.value.key == "k"


def test_parts_that_are_not_needed():
    assert decode_sample(raw(txt=b"a"), need_image=False).images == ()
    assert decode_sample(raw(png=png()), need_text=False).texts == ()
    assert decode_sample(raw(png=png(), json=b'{"captions": ["a", ""]}'), need_text=False).texts == ("a",)
