"""Files of vectors: written, read, searched."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from PIL import Image
from toys import COLORS, checkpoint, picture, write_table

from downstream.embedding import Index, embed_folder, read_index, search
from vlp.checkpoint.load import load
from vlp.data.reader import open_reader


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "inner").mkdir(parents=True)
    for number, color in enumerate(COLORS):
        picture(images / f"{color}.png", color, seed=number)
    picture(images / "inner" / "red.png", "red", "striped")
    return images


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_round_trip(loaded, folder, tmp_path, suffix):
    """Batches smaller than the folder; the vectors are those of the loading API; an image finds itself."""
    pytest.importorskip("pyarrow")
    out = tmp_path / "new" / f"index{suffix}"
    done = embed_folder(loaded, folder, out, batch_size=2)
    names = [*sorted(f"{color}.png" for color in COLORS), "inner/red.png"]
    assert done.count == 5 and not done.bad and [path.name for path in out.parent.iterdir()] == [out.name]
    index = read_index(out)
    assert index.keys == names and index.vectors.shape == (5, 16) and index.vectors.dtype == np.float32
    wanted = loaded.embed_images([folder / name for name in names])
    torch.testing.assert_close(torch.from_numpy(index.vectors), wanted, rtol=1e-4, atol=1e-5)
    with Image.open(folder / "blue.png") as image:
        found = search(loaded, out, [folder / "red.png", str(folder / "green.png"), image.copy(), "a red square"], k=2)
    assert [hits[0][0] for hits in found[:3]] == ["red.png", "green.png", "blue.png"]
    assert found[0][0][1] == pytest.approx(1, abs=1e-4)
    scores = wanted @ loaded.embed_texts(["a red square"])[0]
    assert [score for _, score in found[3]] == pytest.approx(scores.sort(descending=True).values[:2].tolist(), abs=1e-4)
    assert search(loaded, index, []) == []


def test_npz_opens_without_vlp(loaded, folder, tmp_path):
    embed_folder(loaded, open_reader(str(folder)), tmp_path / "index.npz")
    with np.load(tmp_path / "index.npz") as file:
        assert sorted(file) == ["keys", "vectors", "vlp"]
        assert np.linalg.norm(file["vectors"], axis=1) == pytest.approx(np.ones(5), abs=1e-5)


def test_texts_of_a_table(loaded, folder, tmp_path):
    rows = [{"image": str(folder / f"{color}.png"), "caption": f"a plain {color} square"} for color in COLORS]
    table = write_table(tmp_path / "captions.csv", rows)
    done = embed_folder(loaded, table, tmp_path / "texts.npz", modality="text", batch_size=3)
    assert done.count == 4
    texts = [row["caption"] for row in rows]
    index = read_index(tmp_path / "texts.npz")
    assert index.keys == texts
    torch.testing.assert_close(torch.from_numpy(index.vectors), loaded.embed_texts(texts), rtol=1e-4, atol=1e-5)
    assert search(loaded, index, [texts[2]], k=1)[0][0][0] == texts[2]


def test_broken_images_are_named(loaded, folder, tmp_path):
    (folder / "torn.png").write_bytes((folder / "red.png").read_bytes()[:60])
    done = embed_folder(loaded, folder, tmp_path / "index.npz", batch_size=2)
    assert done.count == 5 and list(done.bad) == ["torn.png"]
    assert "torn.png" not in read_index(tmp_path / "index.npz").keys


def test_an_error_leaves_no_file(loaded, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("downstream.embedding.embed_images", lambda *args: iter([([0], torch.zeros(1, 16), {})]))
    with pytest.raises(ValueError, match="shorter"):
        embed_folder(loaded, folder, tmp_path / "index.npz", batch_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_mistakes_say_what_to_do(loaded, folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"should end in .npz or .parquet"):
        embed_folder(loaded, folder, tmp_path / "index.csv")
    with pytest.raises(ValueError, match="write it with vlp embed"):
        search(loaded, tmp_path / "none.npz", ["a"])
    (tmp_path / "torn.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"not an index of vlp embed .*write it again"):
        read_index(tmp_path / "torn.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="not an index of vlp embed"):
        read_index(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="made with other weights"):
        search(loaded, Index(["a"], np.zeros((1, 16), np.float32), {"model": "other"}), ["a"])
    with pytest.raises(ValueError, match=r"has a usable text.*no text"):
        embed_folder(loaded, folder, tmp_path / "index.npz", modality="text")
    bare = load(checkpoint(tmp_path, ("mlm",)))
    with pytest.raises(ValueError, match="no common space"):
        embed_folder(bare, folder, tmp_path / "index.npz")
    imported = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ValueError, match=r"needs pyarrow; pip install 'vlp\[parquet\]'"):
        embed_folder(loaded, folder, tmp_path / "index.parquet")
