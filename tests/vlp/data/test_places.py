"""A bad sample is named with the file and line, or the shard and member, where it stands."""

from __future__ import annotations

import io
import json
import logging
import pickle
from pathlib import Path

import pytest
from PIL import Image

from vlp.data.fetch import pair_example
from vlp.data.loader import DataConfig, Loader
from vlp.data.reader import BadSample, decode_sample, open_reader
from vlp.data.records import Key, place_of
from vlp.data.shards import write_shards
from vlp.data.tokenizer import TokenizerConfig, build_tokenizer
from vlp.data.transforms import ImageTransformConfig


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(b"broken")
    return tmp_path


def said(data: Path | str, index: int) -> str:
    with pytest.raises(BadSample) as caught:
        decode_sample(open_reader(str(data))[index])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # on its way out of a worker
    return str(caught.value)


def test_lines_of_tables(folder: Path) -> None:
    """Cells of several lines and empty lines count; rows that are left out do too."""
    table = folder / "data.csv"
    table.write_text('image,caption\ngood.png,"one\ntwo"\n\nbad.png,three\ngone.png,four\n')
    assert said(table, 1) == f"1 ({table} line 5): not an image that can be read (6 bytes)"
    assert said(table, 2).startswith(f"2 ({table} line 6): cannot read image 'gone.png'")
    rows = [{"image": name, "caption": "a thing"} for name in ("good.png", "bad.png")]
    table = folder / "data.jsonl"
    table.write_text("\n" + "\n\n".join(map(json.dumps, rows)) + "\n")
    assert said(table, 1).startswith(f"1 ({table} line 4): not an image")
    with pytest.raises(BadSample, match=r"data\.jsonl line 4\): not an image"):
        decode_sample(open_reader(str(table), where={"image": "bad.png"})[0])
    table = folder / "data.json"
    table.write_text(json.dumps(rows))
    assert said(table, 1).startswith(f"1 ({table} row 1, counted from 0): not an image")
    lines = folder / "lines.txt"
    lines.write_bytes(b"one\n\n\xff\n")
    assert said(lines, 1).startswith(f"3 ({lines} line 3): line is not UTF-8")


def test_members_of_shards(tmp_path: Path) -> None:
    samples = [{"__key__": "a/1", "0.png": png(), "1.png": b"broken", "txt": "x"}, {"__key__": "2", "png": png()}]
    (shard,) = write_shards(samples, str(tmp_path / "%d.tar"))
    assert said(shard, 0) == f"a/1 ({shard} member a/1.1.png): not an image that can be read (6 bytes)"
    assert said(shard, 1) == f"2 ({shard}): no text; it has png"


def test_equal_row_numbers_of_two_tables_are_two_samples(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = [folder / f"{name}.csv" for name in "ab"]
    for table in tables:
        table.write_text("image,caption\n" + "".join(f"{name}.png,a thing\n" for name in ("bad", "good", "good")))
    config = DataConfig(workers=0, bad_samples=0.9, transform=ImageTransformConfig(image_size=4))
    words = build_tokenizer(TokenizerConfig(size=100), ["a thing"] * 4)
    reader = open_reader([str(table) for table in tables])
    loader = Loader(reader, pair_example, words, {}, config, seed=0, global_batch=2)
    with caplog.at_level(logging.WARNING):
        assert len(list(loader.steps(0, 6))) == 3
    assert set(loader.bad) == {f"'0' ({table} line 2)" for table in tables}
    assert all(f"bad sample '0' ({table} line 2): not an image" in caplog.text for table in tables)


def test_a_key_is_its_name() -> None:
    key = Key("7", "data.csv line 9")
    assert key == "7" and {key: 1} == {"7": 1} and json.dumps({"key": key}) == '{"key": "7"}'
    assert place_of(pickle.loads(pickle.dumps(key))) == " (data.csv line 9)"
    assert place_of("7") == place_of(Key("7")) == ""
