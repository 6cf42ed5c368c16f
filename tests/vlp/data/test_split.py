"""A split of one's own data: by image, the same anywhere, and the reader of each half."""

import csv

import numpy as np
import pytest
from PIL import Image

from vlp.config import build
from vlp.data.loader import DataConfig
from vlp.data.reader import open_reader
from vlp.data.split import split_by_image
from vlp.run import open_training_data, open_validation_data


def table(folder, rows, name="own.csv"):
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def picture(folder, name, value):
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(folder / name)
    return name


@pytest.fixture
def rows(tmp_path):
    """Twenty images with two captions each; one is there twice, under another name."""
    found = [{"image": picture(tmp_path, f"{i}.png", i), "caption": f"{i} {n}"} for i in range(20) for n in range(2)]
    return [*found, {"image": picture(tmp_path, "copy.png", 3), "caption": "3 again"}]


def images(reader):
    return {raw.files["png"] for raw in map(reader.__getitem__, range(len(reader)))}


def captions(reader):
    return {raw.texts[0] for raw in map(reader.__getitem__, range(len(reader)))}


def test_no_image_is_in_both_halves(tmp_path, rows):
    data = DataConfig(train=str(table(tmp_path, rows)), split=0.25)
    train, val = open_training_data(data), open_validation_data(data)
    assert len(train) + len(val) == 41 and len(images(val)) == 5
    assert not images(train) & images(val)
    split = split_by_image(open_reader(data.train), 0.25)
    assert split.images == (15, 5) and (len(split.train), len(split.val)) == (len(train), len(val))
    assert train.fingerprint != val.fingerprint != open_reader(data.train).fingerprint
    with pytest.raises(IndexError):
        val[len(val)]


def test_order_and_names_of_the_files_do_not_count(tmp_path, rows):
    (tmp_path / "other").mkdir()
    moved = []
    for row in rows[::-1]:
        (tmp_path / "other" / f"x{row['image']}").write_bytes((tmp_path / row["image"]).read_bytes())
        moved.append(row | {"image": f"other/x{row['image']}"})
    halves = [
        open_validation_data(DataConfig(train=str(table(tmp_path, each, name)), split=0.3))
        for each, name in ((rows, "a.csv"), (moved, "b.csv"))
    ]
    assert captions(halves[0]) == captions(halves[1])


@pytest.mark.parametrize("form", ["table", "folder", "list"])
def test_another_content_under_the_same_name_is_another_split(tmp_path, rows, form):
    path = str(table(tmp_path, rows))
    spec = {"table": path, "folder": str(tmp_path), "list": [path, path]}[form]

    def made(share=0.25):
        return split_by_image(open_reader(spec), share)

    before = made()
    assert made() is before and made(0.5).hash != before.hash
    name = rows[0]["image"]
    (tmp_path / name).rename(tmp_path / "aside")
    picture(tmp_path, name, 200)
    after = made()
    assert after.hash != before.hash
    (tmp_path / name).unlink()
    (tmp_path / "aside").rename(tmp_path / name)
    assert made().hash == before.hash


def test_samples_of_an_image_id_stay_together(tmp_path, rows):
    crops = [row | {"image_id": int(row["image"].split(".")[0]) // 4} for row in rows[:40]]
    data = DataConfig(train=str(table(tmp_path, crops)), split=0.4)
    halves = [{row.fields["image_id"] for row in map(r.__getitem__, range(len(r)))} for r in
              (open_training_data(data), open_validation_data(data))]  # fmt: skip
    assert not halves[0] & halves[1] and len(halves[1]) == 2


def test_unreadable_images_train_and_named_data_are_not_split(tmp_path, rows):
    broken = [*rows, {"image": "gone.png", "caption": "gone"}]
    path = str(table(tmp_path, broken))
    data = DataConfig(train=path, split=0.2)
    assert len(open_training_data(data)) + len(open_validation_data(data)) == 42
    assert 41 in split_by_image(open_reader(path), 0.2).train
    named = data.model_copy(update={"val": path})
    assert len(open_training_data(named)) == len(open_validation_data(named)) == 42


def test_one_image_cannot_be_divided(tmp_path, rows):
    with pytest.raises(
        ValueError, match=r"data\.split 0\.1: the 2 samples show 1 image that can be read, .* --data\.val"
    ):
        path = table(tmp_path, [rows[0], {"image": "gone.png", "caption": "gone"}])
        open_validation_data(DataConfig(train=str(path), split=0.1))
    with pytest.raises(ValueError, match=r"data\.val is not set"):
        open_validation_data(DataConfig(train=str(path)))


def test_a_source_of_the_same_data_would_train_on_what_is_held_out() -> None:
    data = build(DataConfig, {"train": "a.csv", "split": 0.1, "sources": {"text": {"train": "a.csv", "only": "text"}}})
    with pytest.raises(ValueError, match=r"data\.sources\.text\.train names the data of data\.train.*--data\.val"):
        data.of("text")
    assert data.model_copy(update={"val": "b.csv"}).of("text").split is None
