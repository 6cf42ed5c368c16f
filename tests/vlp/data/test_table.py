import csv
import io
import json
import logging
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlp.data.reader import decode_sample, decode_texts, open_reader
from vlp.data.records import BadSample, Blobs, ReadsWords, read_words
from vlp.data.shards import ShardReader, write_shards
from vlp.data.split import split_by_image
from vlp.data.table import FolderReader, TableReader

CAPTIONS = ['a "red" cat, sitting', "ein grüner Hund", "two\nlines", "left arrow"]


def png(value):
    stream = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 2 * value, 3)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i, caption in enumerate(CAPTIONS):
        (images / f"{i}.png").write_bytes(png(10 * i))
        (images / f"{i}.txt").write_text(caption, encoding="utf-8")
    return tmp_path


def rows():
    return [
        {"image": f"images/{i}.png", "caption": caption, "split": "ab"[i % 2]} for i, caption in enumerate(CAPTIONS)
    ]


def write_csv(path, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "caption", "split"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows())


def make(form, folder):
    path = folder / f"data.{form}"
    if form in ("csv", "tsv"):
        write_csv(path, "\t" if form == "tsv" else ",")
    elif form == "json":
        path.write_text(json.dumps(rows()))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()) + "\n")
    elif form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows()), path)
    elif form == "tar":
        samples = [
            {"__key__": str(i), "png": png(10 * i), "txt": row["caption"], "json": row} for i, row in enumerate(rows())
        ]
        write_shards(samples, str(folder / "data-%d.tar"))
        return str(folder / "data-*.tar")
    elif form == "folder":
        return str(folder / "images")
    return str(path)


def same(sample, i):
    pixels = sample.images[0]
    return (
        sample.texts == (CAPTIONS[i],)
        and pixels.shape == (3, 5, 6)
        and pixels.flatten(1).unique(dim=1).flatten().tolist() == [10 * i, 20 * i, 3]
    )


@pytest.mark.parametrize("form", ["csv", "tsv", "json", "jsonl", "parquet", "tar", "folder"])
def test_every_format_gives_the_same_samples(folder, form):
    reader = open_reader(make(form, folder))
    assert len(reader) == 4
    assert all(same(decode_sample(reader[i]), i) for i in range(4))
    copy = pickle.loads(pickle.dumps(reader))
    assert copy[2] == reader[2]
    assert copy.fingerprint == reader.fingerprint
    with pytest.raises(IndexError):
        reader[4]
    if form != "folder":
        assert decode_sample(reader[1]).fields == rows()[1]


@pytest.mark.parametrize("form", ["csv", "parquet", "tar", "folder", "list", "split"])
def test_words_are_read_without_images(folder, form, monkeypatch):
    """A tokenizer is trained on all captions: to read 200,000 images on each rank for it would take hours."""
    if form == "list":
        reader = open_reader([make("csv", folder), make("jsonl", folder)])
    elif form == "split":
        whole = open_reader(make("csv", folder))
        reader = split_by_image(whole, 0.25).of(whole, "train")
    else:
        reader = open_reader(make(form, folder))
    whole = [decode_sample(reader[i]) for i in range(len(reader))]
    json_and_text = [reader[i].files[name] for i in range(len(reader)) for name in ("json", "txt") if form == "tar"]
    read, sizes = ShardReader._read, []
    monkeypatch.setattr(ShardReader, "_read", lambda self, *at: sizes.append(at[2] - at[1]) or read(self, *at))
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read"))
    assert isinstance(reader, ReadsWords)
    for i, sample in enumerate(whole):
        words = read_words(reader, i)
        assert decode_texts(words) == sample.texts and words.key == sample.key
        assert decode_sample(words, need_image=False).fields == sample.fields
    assert sum(sizes) == sum(map(len, json_and_text)) if form == "tar" else not sizes
    with pytest.raises(IndexError):
        read_words(reader, len(reader))


def test_words_of_a_row_without_its_image_are_none(folder):
    """So that they are left out as the sample is: vocabulary and groups are those of what can be read."""
    reader = open_reader(make("csv", folder))
    (folder / "images" / "1.png").unlink()
    with pytest.raises(BadSample, match=r"cannot read image 'images/1\.png'"):
        read_words(reader, 1)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "tar"])
def test_where_in_every_format(folder, form):
    name = make(form, folder)
    reader = open_reader(name, where={"split": "b"})
    assert [decode_sample(reader[i]).texts[0] for i in range(len(reader))] == CAPTIONS[1::2]
    assert reader[1].key == "3"
    assert reader.fingerprint != open_reader(name).fingerprint
    with pytest.raises(ValueError, match=r"where.*matches no sample.*fields there: caption, image, split"):
        open_reader(name, where={"split": "z"})


def test_columns_are_guessed_and_the_guess_is_logged(folder, caplog):
    (folder / "clip.csv").write_text("filepath\ttitle\tid\nimages/0.png\tA Title\t9\n")
    with caplog.at_level(logging.INFO, "vlp.data.table"):
        reader = open_reader(str(folder / "clip.csv"))
    assert "'filepath'" in caplog.text and "'title'" in caplog.text
    sample = decode_sample(reader[0])
    assert sample.texts == ("A Title",) and sample.fields["id"] == "9"


def test_named_columns_root_and_several_images_and_texts(folder):
    row = {"l": "0.png", "r": "1.png", "both": ["2.png", "0.png"], "said": ["one", "two"], "caption": "no"}
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    reader = TableReader(folder / "pairs.jsonl", ["l", "r"], "said", root=folder / "images")
    sample = decode_sample(reader[0])
    assert [int(image[0, 0, 0]) for image in sample.images] == [0, 10]
    assert sample.texts == ("one", "two")
    sample = decode_sample(TableReader(folder / "pairs.jsonl", "both", root=folder / "images")[0])
    assert [int(image[0, 0, 0]) for image in sample.images] == [20, 0]
    assert sample.texts == ("no",)
    text_only = decode_sample(TableReader(folder / "pairs.jsonl", ())[0], need_image=False)
    assert text_only.images == () and text_only.texts == ("no",)


def test_images_inside_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = [
        {"image": {"bytes": png(10), "path": None}, "raw": png(20), "caption": "x", "n": 1},
        {"image": {"bytes": None, "path": "images/3.png"}, "raw": png(20), "caption": "y", "n": 2},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(content), folder / "in.parquet")
    reader = TableReader(folder / "in.parquet")
    assert [int(decode_sample(reader[i]).images[0][0, 0, 0]) for i in range(2)] == [10, 30]
    raw = TableReader(folder / "in.parquet", "raw")[1]
    assert int(decode_sample(raw).images[0][0, 0, 0]) == 20
    assert "raw" not in raw.fields and raw.fields["n"] == 2


def test_metadata_folder_and_lists(folder):
    (folder / "images" / "metadata.csv").write_text("file_name,text\n1.png,one\n")
    reader = open_reader([str(folder / "images"), make("csv", folder), make("tar", folder)])
    assert len(reader) == 9
    assert decode_sample(reader[0]).texts == ("one",)
    assert all(same(decode_sample(reader[1 + i]), i) and same(decode_sample(reader[5 + i]), i) for i in range(4))


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_columns_are_guessed_by_the_names_that_people_give_them(folder, separator, caplog):
    path = folder / "own.csv"
    path.write_text(
        separator.join(["image_name", " Comment"]) + "\n" + separator.join(["images/0.png", " a cat"]) + "\n"
    )
    with caplog.at_level(logging.INFO):
        found = decode_sample(open_reader(str(path))[0])
    assert found.texts == ("a cat",) and found.images[0].shape == (3, 5, 6)
    assert "images from column 'image_name'" in caplog.text and "texts from column 'Comment'" in caplog.text


def test_an_image_column_is_known_by_its_values(folder):
    path = folder / "own.jsonl"
    path.write_text(json.dumps({"n": 1, "bild": "images/1.png", "Alt-Text": "x"}) + "\n")
    assert decode_sample(open_reader(str(path))[0]).texts == ("x",)
    assert len(open_reader(str(path), image=(), text="")[0].files) == 0


def test_folder_order_and_missing_caption(folder):
    deep = folder / "images" / "a"
    deep.mkdir()
    (deep / "z.PNG").write_bytes(png(1))
    (folder / "images" / ".hidden.png").write_bytes(b"")
    reader = FolderReader(folder / "images")
    assert [reader[i].key for i in range(len(reader))] == ["0.png", "1.png", "2.png", "3.png", "a/z.PNG"]
    assert decode_sample(reader[4], need_text=False).texts == ()
    with pytest.raises(BadSample, match=r"a/z\.PNG \(.*images\): no text"):
        decode_sample(reader[4])


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("missing.csv", None, "there is no file '.*missing.csv'"),
        ("empty.csv", "", "no rows"),
        ("head.csv", "image,caption\n", "no rows"),
        ("wide.csv", "image,caption\na.png,one, two\n", "line 2 has 3 cells for 2 columns"),
        ("cols.csv", "a,b\n1,2\n", "data.image: no column.*columns: a, b"),
        ("torn.jsonl", '{"image": "a"}\n{"image"', "line 2 is not json"),
        ("list.jsonl", "[1]\n", "line 1 is not an object"),
        ("dict.json", '{"image": "a"}', "must be a list"),
        ("torn.json", "[{", "is not json"),
        ("latin.csv", "image,caption\na.png,gr\xfcn\n".encode("latin-1"), "not UTF-8"),
        ("torn.parquet", "PAR1", "not a readable parquet"),
        ("data.xlsx", "x", "neither a folder nor a file ending in .tar"),
        ("nowhere", None, "there is no file or folder"),
    ],
)
def test_user_errors_take_one_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as caught:
        open_reader(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_more_user_errors(folder, monkeypatch):
    path = make("csv", folder)
    with pytest.raises(ValueError, match=r"data\.image: .* no column 'pic'; .*columns: image, caption, split"):
        open_reader(path, image="pic")
    with pytest.raises(ValueError, match=r"data\.text: .* no column 'cap'"):
        open_reader(path, text="cap")
    with pytest.raises(ValueError, match="root: there is no folder"):
        open_reader(path, root=folder / "none")
    with pytest.raises(ValueError, match=r"root: .* shards hold their images"):
        open_reader(make("tar", folder), root=folder)
    with pytest.raises(ValueError, match=r"where: .* have no fields"):
        open_reader(str(folder / "images"), where={"a": 1})
    (folder / "bare").mkdir()
    (folder / "bare" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no images"):
        open_reader(str(folder / "bare"))
    parquet = make("parquet", folder)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"vlp\[parquet\]"):
        open_reader(parquet)


def test_bad_rows(folder):
    (folder / "bad.csv").write_text("image,caption\nimages/none.png,a\n,b\nimages/0.txt,c\nimages/0.png,  \n")
    reader = TableReader(folder / "bad.csv")
    with pytest.raises(BadSample, match=r"0 \(.*bad\.csv line 2\): cannot read image 'images/none\.png'"):
        reader[0]
    with pytest.raises(BadSample, match=r"1 .* line 3\): no image path in column 'image'$"):
        reader[1]
    with pytest.raises(BadSample, match=r"2 .*: not an image"):
        decode_sample(reader[2])
    with pytest.raises(BadSample, match=r"3 .*: empty caption"):
        decode_sample(reader[3])
    assert decode_sample(reader[3], need_text=False).texts == ()


def test_blobs():
    items = [b"", b"a", b"", bytes(range(256)), b"z" * 1000] * 30000
    blobs = Blobs.pack(items)
    assert len(blobs) == len(items)
    assert all(blobs[i] == items[i] for i in np.random.default_rng(0).integers(len(items), size=1000).tolist())
    joined = Blobs.join([Blobs.pack([b"x", b"yy"]), Blobs.pack([]), Blobs.pack([b"zzz"])])
    assert [joined[i] for i in range(3)] == [b"x", b"yy", b"zzz"]
    assert [joined.take([2, 0])[i] for i in range(2)] == [b"zzz", b"x"]


def test_bad_sample_survives_a_worker():
    error = pickle.loads(pickle.dumps(BadSample("k", "why")))
    assert (error.key, error.reason, str(error)) == ("k", "why", "k: why")
