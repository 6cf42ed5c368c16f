import io
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from vlp.data import tar_index
from vlp.data.reader import decode_sample, open_reader
from vlp.data.records import BadSample
from vlp.data.shards import ShardReader, write_shards
from vlp.data.tar_index import expand_shards


def png(value=0, size=(5, 4)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Three shards of 4, 4 and 2 samples, as img2dataset lays them out (.jpg here holding png bytes)."""
    samples = [
        {"__key__": f"{i:05d}", "jpg": png(i), "txt": f"number {i}", "json": {"split": "ab"[i % 2], "fold": i % 3}}
        for i in range(10)
    ]
    written = write_shards(samples, str(tmp_path / "part-%03d.tar"), max_count=4)
    assert [os.path.basename(p) for p in written] == ["part-000.tar", "part-001.tar", "part-002.tar"]
    return tmp_path


def read_by_webdataset(paths):
    data = webdataset.WebDataset([str(p) for p in paths], shardshuffle=False)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in data]


def test_same_keys_and_bytes_as_webdataset(shards):
    paths = sorted(shards.glob("*.tar"))
    reader = ShardReader(str(shards / "part-{000..002}.tar"))
    ours = [(reader[i].key, reader[i].files) for i in range(len(reader))]
    assert ours == read_by_webdataset(paths)
    assert len(ours) == 10
    assert reader[9].source == str(paths[2])


def test_awkward_names_as_webdataset(tmp_path):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "./a/x.JPG", b"1")
        add(tar, "./a/x.seg.png", b"22")
        add(tar, "a.b/y.left.jpg", b"")
        add(tar, "a.b/y.cls", b"7")
        add(tar, "a.b/noextension", b"-")
        add(tar, "__meta__/info.json", b"{}")
        add(tar, "d" * 150 + "/" + "e" * 120 + ".jpg", b"long")
        add(tar, "größe.txt", "ü".encode())
        tar.addfile(tarfile.TarInfo("folder.d"))
        folder = tarfile.TarInfo("sub.dir")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    reader = ShardReader(str(path))
    assert [(reader[i].key, reader[i].files) for i in range(len(reader))] == read_by_webdataset([path])
    assert reader[0].files == {"jpg": b"1", "seg.png": b"22"}


def test_dot_files_and_pax_headers_are_skipped(tmp_path):
    path = tmp_path / "mac.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "._0.jpg", b"apple")
        add(tar, "0.jpg", b"1")
        add(tar, "PaxHeader/0.txt", b"stored header")
        add(tar, "0.txt", b"one")
    reader = ShardReader(str(path))
    assert [reader[i].files for i in range(len(reader))] == [{"jpg": b"1", "txt": b"one"}]


def test_img2dataset_sample_decodes(shards):
    reader = open_reader(str(shards / "*.tar"))
    sample = decode_sample(reader[3])
    assert sample.key == "00003"
    assert sample.texts == ("number 3",)
    assert sample.images[0].shape == (3, 4, 5)
    assert sample.images[0].unique().tolist() == [3]
    assert sample.fields == {"split": "b", "fold": 0}


def test_patterns(shards):
    names = [str(shards / f"part-00{i}.tar") for i in range(3)]
    assert expand_shards(str(shards / "part-{000..002}.tar")) == names
    assert expand_shards(str(shards / "part-00{2,0}.tar")) == [names[2], names[0]]
    assert expand_shards([names[1], str(shards / "*-00[02].tar")]) == [names[1], names[0], names[2]]
    assert expand_shards("{a,b}{8..10}") == ["a8", "a9", "a10", "b8", "b9", "b10"]
    assert len(ShardReader([names[2], names[2]])) == 4


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("nowhere-{0..1}.tar", "'nowhere-0.tar' is not there"),
        ("none*.tar", "matches no file"),
        ("pipe:cat x.tar", "is a stream.*fsspec"),
        ([], "empty"),
    ],
)
def test_user_errors(pattern, words):
    with pytest.raises(ValueError, match=words) as caught:
        ShardReader(pattern)
    assert "\n" not in str(caught.value)


def test_truncated_at_any_byte(tmp_path, shards):
    whole = (shards / "part-002.tar").read_bytes()
    content = len(whole.rstrip(b"\0"))
    path = tmp_path / "cut.tar"
    for length in [0, 100, 512, 600, 1024, 1500, 2048, content - 1, content]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.tar"):
            ShardReader(str(path))


def test_damaged_header_and_compression(tmp_path, shards):
    whole = bytearray((shards / "part-002.tar").read_bytes())
    with tarfile.open(shards / "part-002.tar") as tar:
        middle = tar.getmembers()[2].offset
    whole[middle : middle + 20] = b"\xff" * 20
    (tmp_path / "hit.tar").write_bytes(whole)
    with pytest.raises(ValueError, match=f"damaged at byte {middle}"):
        ShardReader(str(tmp_path / "hit.tar"))
    with tarfile.open(tmp_path / "zip.tar.gz", "w:gz") as tar:
        add(tar, "0.jpg", b"1")
    with pytest.raises(ValueError, match="uncompressed"):
        ShardReader(str(tmp_path / "zip.tar.gz"))


def test_the_same_member_twice(tmp_path):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        add(tar, "0.jpg", b"1")
        add(tar, "0.JPG", b"2")
    with pytest.raises(ValueError, match=r"'0.JPG' twice"):
        ShardReader(str(tmp_path / "twice.tar"))


def test_shard_that_shrinks_later_is_a_bad_sample(shards):
    reader = ShardReader(str(shards / "part-002.tar"))
    with open(shards / "part-002.tar", "r+b") as file:
        file.truncate(700)
    with pytest.raises(BadSample, match="shorter"):
        reader[1]


def test_where(shards):
    reader = open_reader(str(shards / "*.tar"), where={"split": "b", "fold": ["0", 1]})
    assert [int(reader[i].key) for i in range(len(reader))] == [1, 3, 7, 9]
    assert reader[2].files["txt"] == b"number 7"
    assert reader.fingerprint != ShardReader(str(shards / "*.tar")).fingerprint
    with pytest.raises(ValueError, match=r"where.*matches no sample.*fold, split"):
        ShardReader(str(shards / "*.tar"), where={"spilt": "b"})


def first_texts(reader, queue):
    queue.put([reader[i].files["txt"] for i in range(len(reader))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(shards, method):
    reader = ShardReader(str(shards / "*.tar"))
    reader[0]  # a file is open
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=first_texts, args=(reader, queue))
    process.start()
    assert queue.get(timeout=60) == [f"number {i}".encode() for i in range(10)]
    process.join()


def test_few_files_stay_open(shards):
    reader = ShardReader(str(shards / "*.tar"))
    reader.max_open_files = 2
    for i in np.random.default_rng(0).integers(10, size=50):
        assert reader[int(i)].files["txt"] == f"number {i}".encode()
        assert len(reader._open) <= 2
    assert len(pickle.loads(pickle.dumps(reader))._open) == 0


def test_fsspec_url(shards):
    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.pipe_file(f"/vlp-test/part-00{i}.tar", (shards / f"part-00{i}.tar").read_bytes())
    local = ShardReader(str(shards / "*.tar"))
    for pattern in ("memory://vlp-test/part-{000..002}.tar", "memory://vlp-test/*.tar"):
        remote = open_reader(pattern)
        assert [remote[i].files for i in range(10)] == [local[i].files for i in range(10)]
        assert remote.fingerprint == local.fingerprint


def test_index_cache(shards, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = str(shards / "part-000.tar")
    ShardReader(path, index_cache=cache)
    assert not cache.exists()  # small shards are scanned each time
    monkeypatch.setattr(tar_index, "CACHE_FROM_BYTES", 0)
    first = ShardReader(path, index_cache=cache)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_scan", lambda *_: pytest.fail("scanned although cached"))
        again = ShardReader(path, index_cache=cache)
    assert [again[i] for i in range(4)] == [first[i] for i in range(4)]
    os.utime(path, ns=(1, 1))
    ShardReader(path, index_cache=cache)
    assert len(list(cache.iterdir())) == 2
    for stored in cache.iterdir():
        stored.write_bytes(b"torn")
    assert ShardReader(path, index_cache=cache)[1] == first[1]


def test_write_shards_is_reproducible_and_checks(tmp_path):
    samples = [{"__key__": "0", "txt": "a", "json": {"b": 1}}]
    one = write_shards(samples, str(tmp_path / "a" / "%d.tar"))
    two = write_shards(samples, str(tmp_path / "b" / "%d.tar"))
    assert Path(one[0]).read_bytes() == Path(two[0]).read_bytes()
    assert json.loads(ShardReader(one)[0].files["json"]) == {"b": 1}
    with pytest.raises(ValueError, match="shard number"):
        write_shards(samples, str(tmp_path / "x.tar"))
    with pytest.raises(ValueError, match=r"__key__ is 'a.b'"):
        write_shards([{"__key__": "a.b", "txt": "a"}], str(tmp_path / "%d.tar"))
