"""Regions from arrays, texts of two segments and pairs made false: what a region model's loader gives."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders import RegionConfig, TextConfig
from encoders.types import Batch, Regions
from objectives import ItmConfig, MlmConfig, MrmConfig
from objectives.base import Draw
from objectives.mrm import MaskedRegions, RegionTargetConfig, intersection_over_union
from vlp.data.batch import Example
from vlp.data.fetch import pair_example
from vlp.data.loader import DataConfig, Loader
from vlp.data.pairing import PairingConfig, encode_segments, pair
from vlp.data.reader import BadSample, Sample, open_reader
from vlp.data.regions import RegionLayout, geometry, read_regions, region_views
from vlp.data.shards import write_shards
from vlp.data.tokenizer import TokenizerConfig, build_tokenizer
from vlp.fusion.single import SingleStreamConfig
from vlp.model import ModelConfig, build_model
from vlp.train.reading import region_layout

WIDTH, CLASSES, SAMPLES = 6, 5, 12
LAYOUT = RegionLayout(boxes=7, number=8, targets=("classes",), views={"masked": MaskedRegions(0.3, 1.0, 0.0, None)})


def arrays(number: int, regions: int | None = None) -> dict[str, Any]:
    """What a detector found in picture ``number`` of 200 x 100 pixels."""
    generator = np.random.default_rng(number)
    regions = regions or 3 + number % 5
    low = generator.uniform(0, 40, (regions, 2))
    boxes = np.concatenate([low, low + generator.uniform(5, 60, (regions, 2))], 1)
    return {
        "features": generator.normal(size=(regions, WIDTH)).astype(np.float16),
        "boxes": boxes.astype(np.float32),
        "width": 200,
        "height": 100,
        "objects": generator.integers(0, CLASSES, regions),
        "confidence": generator.random(regions).astype(np.float32),
        "classes": generator.dirichlet(np.ones(CLASSES), regions),
    }


def npz(found: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **found)
    return file.getvalue()


def caption(number: int) -> list[str]:
    return [f"a picture of thing {number}", f"thing {number} seen again"]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Three forms: `.npz`; `.npy` members with sizes in `.json`; and a picture beside it that nobody decodes."""
    samples = []
    for number in range(SAMPLES):
        found = arrays(number)
        sample: dict[str, Any] = {"__key__": f"{number:03d}"}
        fields: dict[str, Any] = {"captions": caption(number), "tags": [f"tag{number}", "dog"]}
        if number % 3 == 1:
            fields |= {"width": found.pop("width"), "height": found.pop("height")}
            for name, array in found.items():
                file = io.BytesIO()
                np.save(file, array)
                sample[f"{name}.npy"] = file.getvalue()
        else:
            sample["npz"] = npz(found)
        if number % 3 == 2:
            sample["jpg"] = b"not a picture"
        samples.append({**sample, "json": fields})
    return write_shards(samples, str(tmp_path / "regions-%02d.tar"))[0]


@pytest.fixture
def table(tmp_path: Path) -> str:
    rows = []
    for number in range(SAMPLES):
        (tmp_path / f"{number}.npz").write_bytes(npz(arrays(number)))
        rows.append({"features": f"{number}.npz", "captions": caption(number), "tags": [f"tag{number}", "dog"]})
    path = tmp_path / "table.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def batches(data: str, layout: RegionLayout = LAYOUT, size: int = 4, start: int = 0, **more: Any) -> list[Batch]:
    config = DataConfig(train=data, workers=0, tokenizer=TokenizerConfig(size=80), **more)
    reader = open_reader(data)
    words = [text for number in range(SAMPLES) for text in (*caption(number), f"tag{number} dog")]
    tokenizer = build_tokenizer(config.tokenizer, iter(words))
    views = {"masked": build_mlm_view()}
    loader = Loader(reader, pair_example, tokenizer, views, config, seed=3, global_batch=size, regions=layout)
    return [one for step in loader.steps(start, SAMPLES) for one in step]


def build_mlm_view() -> Any:
    return model_of({"mlm": MlmConfig()}).text_views()["masked"]


def model_of(objectives: dict[str, Any], **vision: Any) -> Any:
    config = ModelConfig(
        vision=RegionConfig(features=WIDTH, width=32, number=8, segments="text", mask_embedding=True, **vision),
        text=TextConfig(width=32, layers=0, heads=4, vocabulary_size=80, max_length=32),
        fusion=SingleStreamConfig(width=32, layers=2, heads=4, modality_embedding=False),
    )
    return build_model(config, objectives)


def regions_of(batch: Batch, view: str = "clean") -> Regions:
    found = batch.images[view]
    assert isinstance(found, Regions)
    return found


def test_geometries() -> None:
    boxes = np.array([[0.1, 0.2, 0.5, 0.4]])
    expected = [0.1, 0.2, 0.5, 0.4, 0.4, 0.2, 0.08]
    for values, chosen in {0: [], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3, 6], 6: [0, 1, 2, 3, 4, 5], 7: range(7)}.items():
        np.testing.assert_allclose(geometry(boxes, values), [[expected[i] for i in chosen]], rtol=1e-6)


@pytest.mark.parametrize("form", ["shards", "table"])
def test_arrays_of_every_form_are_read(form: str, request: pytest.FixtureRequest) -> None:
    seen = set()
    for batch in batches(request.getfixturevalue(form)):
        clean = regions_of(batch)
        assert clean.features.shape == (4, 8, WIDTH) and clean.boxes.shape == (4, 8, 7) and clean.masked is None
        for row in range(4):
            number = next(n for n in range(SAMPLES) if np.allclose(arrays(n)["features"][0], clean.features[row, 0]))
            seen.add(number)
            truth, keep = arrays(number), clean.keep[row]
            assert keep.sum() == len(truth["features"]) and keep[: keep.sum()].all()
            relative = truth["boxes"] / np.array([200, 100, 200, 100])
            np.testing.assert_allclose(clean.boxes[row][keep], geometry(relative, 7), rtol=1e-5)
            assert (clean.features[row][~keep] == 0).all()
    assert seen == set(range(SAMPLES))


def test_masks_depend_on_the_position_alone(shards: str) -> None:
    every = {int(p): (b, i) for b in batches(shards) for i, p in enumerate(b.position)}
    for batch in batches(shards, size=3, start=6):
        masked, clean = regions_of(batch, "masked"), regions_of(batch)
        assert masked.masked is not None and masked.predict is not None and masked.predict_at is not None
        assert torch.equal(masked.masked, masked.predict) and not (masked.masked & ~clean.keep).any()
        assert masked.masked.any(1).all() and len(masked.predict_at) % 8 == 0
        at = masked.predict_at[masked.predict_at >= 0]
        assert torch.equal(at, masked.predict.flatten().nonzero()[:, 0])
        for row, position in enumerate(batch.position):
            other, there = every[int(position)]
            same = regions_of(other, "masked")
            length = min(same.masked.shape[1], masked.masked.shape[1])
            assert torch.equal(same.masked[there, :length], masked.masked[row, :length])
            assert torch.equal(same.targets["classes"][there, :length], masked.targets["classes"][row, :length])


def test_shares_of_hidden_replaced_and_shown_regions() -> None:
    view, boxes = MaskedRegions(0.15, 0.8, 0.1, None), np.tile([0, 0, 0.1, 0.1], (50, 1))
    masks = [view.make(boxes, np.random.default_rng(n)) for n in range(400)]
    predict, masked, replaced = (
        np.stack(found)
        for found in ([m.predict for m in masks], [m.masked for m in masks], [m.replaced >= 0 for m in masks])
    )
    assert predict.mean() == pytest.approx(0.15, abs=0.01) and predict.any(1).all()
    assert masked.sum() / predict.sum() == pytest.approx(0.8, abs=0.02)
    assert replaced.sum() / predict.sum() == pytest.approx(0.1, abs=0.02)
    assert not (masked & replaced).any() and not ((masked | replaced) & ~predict).any()


def test_what_overlaps_a_predicted_region_is_hidden() -> None:
    boxes = np.array([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.4], [0.3, 0.3, 0.8, 0.8], [0.9, 0.9, 1, 1]])
    assert intersection_over_union(boxes, boxes)[0] == pytest.approx([1, 0.8, 0.04 / 0.46, 0])
    for number in range(30):
        mask = MaskedRegions(0.2, 1.0, 0.0, 0.4).make(boxes, np.random.default_rng(number))
        near = mask.predict[:2].any()
        assert list(mask.masked) == [near, near, mask.predict[2], mask.predict[3]]


def test_the_whole_image_does_not_give_hidden_features_back() -> None:
    layout = replace(LAYOUT, boxes=5, number=9, whole=True)
    sample = read_regions("0", {"npz": npz(arrays(0))}, layout)
    found = region_views([sample], [0], layout, Draw(0))
    clean, masked = found["clean"], found["masked"]
    number = len(sample.features)
    assert torch.equal(clean.boxes[0, 0], torch.tensor([0.0, 0, 1, 1, 1])) and clean.keep[0].sum() == number + 1
    np.testing.assert_allclose(clean.features[0, 0], sample.features.mean(0), rtol=1e-4, atol=1e-6)
    shown, classes = ~masked.masked[0, 1 : number + 1], masked.targets["classes"][0]
    np.testing.assert_allclose(masked.features[0, 0], sample.features[shown.numpy()].mean(0), rtol=1e-4, atol=1e-6)
    assert not masked.predict[0, 0] and not classes[0].any()
    np.testing.assert_array_equal(classes[1 : number + 1], sample.targets["classes"])


def test_replaced_features_are_those_of_another_image(shards: str) -> None:
    layout = replace(LAYOUT, views={"masked": MaskedRegions(0.9, 0.0, 1.0, None)})
    pool = np.concatenate([arrays(n)["features"].astype(np.float32) for n in range(SAMPLES)])
    for batch in batches(shards, layout):
        clean, masked = regions_of(batch), regions_of(batch, "masked")
        assert torch.equal(masked.targets["features"], clean.features) and not masked.masked.any()
        changed = (masked.features != clean.features).any(-1)
        assert torch.equal(changed, masked.predict)
        assert all((pool == row.numpy()).all(1).any() for row in masked.features[changed])


def test_a_broken_other_image_costs_no_more_than_a_broken_own_one(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"{n:02d}", "npz": b"broken" if n == 3 else npz(arrays(n)), "txt": f"thing {n}"} for n in range(12)
    ]
    data = write_shards(samples, str(tmp_path / "%02d.tar"))[0]
    layout = replace(LAYOUT, views={"masked": MaskedRegions(0.3, 0.5, 0.5, None)})
    found = batches(data, layout, bad_samples=0.5)
    assert sum(len(batch.position) for batch in found) == 12


def test_most_confident_regions_are_taken() -> None:
    found = read_regions("0", {"npz": npz(arrays(4, regions=20))}, LAYOUT)
    best = np.sort(np.argsort(-arrays(4, regions=20)["confidence"])[:8])
    np.testing.assert_allclose(found.features, arrays(4, regions=20)["features"][best].astype(np.float32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"features": None}, "no features of regions; it has boxes"),
        ({"classes": None}, "no classes of regions"),
        ({"width": None}, "no width"),
        ({"width": 0}, "0 x 100 pixels"),
        ({"boxes": np.zeros((2, 4))}, "3 regions have features, but 2 have boxes"),
        ({"features": np.full((3, WIDTH), np.nan)}, "features of its regions are not finite"),
        ({"features": np.zeros(WIDTH)}, "not regions x width"),
    ],
)
def test_bad_arrays_are_named(change: dict[str, Any], reason: str) -> None:
    found = {name: array for name, array in {**arrays(0), **change}.items() if array is not None}
    with pytest.raises(BadSample, match=reason):
        read_regions("0", {"npz": npz(found)}, LAYOUT)


@pytest.mark.parametrize("form", ["shards", "csv", "jsonl"])
def test_data_without_arrays_are_refused_once(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    """Before anything is read in earnest, instead of a line for every sample."""
    if form == "shards":
        samples = [{"__key__": f"{n}", "npy": b"", "txt": f"thing {n}"} for n in range(SAMPLES)]
        data, known = write_shards(samples, str(tmp_path / "%d.tar"))[0], "npy, txt"
    else:
        (tmp_path / "0.png").write_bytes(b"")
        row = "image,caption\n" + "0.png,a thing\n" * SAMPLES
        row = row if form == "csv" else '{"image": "0.png", "caption": "a thing"}\n' * SAMPLES
        (tmp_path / f"data.{form}").write_text(row)
        data, known = str(tmp_path / f"data.{form}"), "png, image, caption"
    words = rf"^data\.train: .* no features in .* whose samples have {known}; store "
    with pytest.raises(ValueError, match=words) as error:
        batches(data)
    assert "\n" not in str(error.value)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_broken_or_pickled_archive_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="npz cannot be read"):
        read_regions("0", {"npz": b"PK broken"}, LAYOUT)
    with pytest.raises(BadSample, match=r"features in \.npz cannot be read"):
        read_regions("0", {"npz": npz({**arrays(0), "features": np.array([{}], dtype=object)})}, LAYOUT)


def test_second_segments_and_false_pairs(shards: str) -> None:
    pairing = PairingConfig(second="tags", false_text=0.25, false_second=0.25)
    found = [b for seed in range(10) for b in batches(shards, pairing=pairing, max_length=16)][:3]
    for batch in found:
        for text in batch.texts.values():
            assert text.segments is not None
            ends = text.segments.sum(1)
            assert (ends > 0).all() and not text.segments[~text.keep].any()
        assert set(batch.targets["match"].tolist()) <= {0, 1, 2}


def test_shares_of_false_pairs() -> None:
    own, other = (Sample(k, (), (f"text {k}",), {"tags": [f"tag {k}"]}) for k in "ab")
    config, counts = PairingConfig(second="tags", false_text=0.25, false_second=0.25), [0, 0, 0]
    for number in range(800):
        one = pair(config, Example("a", (), "text a"), own, lambda: other, np.random.default_rng(number))
        match = int(one.targets["match"])
        counts[match] += 1
        expected = {0: ("text b", "tag a"), 1: ("text a", "tag a"), 2: ("text a", "tag b")}[match]
        assert (one.text, one.second) == expected
    assert [n / 800 for n in counts] == pytest.approx([0.25, 0.5, 0.25], abs=0.04)


def test_a_second_caption_is_another_one(shards: str) -> None:
    every = batches(shards, pairing=PairingConfig(second="captions"), max_length=32)
    assert all("match" not in batch.targets for batch in every)
    for batch in every:
        text = batch.texts["clean"]
        for ids, segments in zip(text.ids, text.segments, strict=True):
            assert ids[segments == 0].tolist()[1:4] != ids[segments == 1].tolist()[:3]


def test_the_longer_segment_is_cut() -> None:
    words = [f"w{n}" for n in range(30)]
    tokenizer = build_tokenizer(TokenizerConfig(size=120), iter([" ".join(words)] * 3))
    whole = [tokenizer.encode(text, 64)[0] for text in (" ".join(words), "w1 w2")]
    ids, starts, segments = encode_segments(tokenizer, " ".join(words), "w1 w2", 12)
    assert len(ids) == len(starts) == len(segments) == 12
    second = ids[segments == 1]
    assert list(second) == list(whole[1][1:]) and ids[segments == 0][-1] == ids[-1] == tokenizer.vocabulary.sep
    assert list(ids[: 12 - len(second) - 1]) == list(whole[0][: 12 - len(second) - 1]) and not starts[0]


def test_a_region_model_trains_on_what_the_loader_gives(shards: str) -> None:
    target = {"classes": RegionTargetConfig(outputs=CLASSES)}
    model = model_of(
        {
            "mlm": MlmConfig(image="masked"),
            "mrm": MrmConfig(text="masked", targets=target, overlap=0.4),
            "itm": ItmConfig(scheme="given", masked=True),
        }
    ).train()
    layout = region_layout(model, whole=False)
    assert layout is not None and layout.targets == ("classes",) and set(layout.views) == {"masked"}
    for batch in batches(shards, layout, pairing=PairingConfig(false_text=0.5), max_length=16):
        loss, outputs = model(batch, Draw(0))
        loss.backward()
        assert loss.isfinite() and set(outputs) == {"mlm", "mrm", "itm"}


@pytest.mark.parametrize("classes", [2, 3])
def test_false_tags_are_a_class_of_their_own_or_no_match(shards: str, classes: int) -> None:
    model = model_of({"itm": ItmConfig(scheme="given", classes=classes)})
    with torch.no_grad():
        model.objectives.itm.head.weight.zero_()
        model.objectives.itm.head.bias.copy_(torch.tensor([0.0, 1.0, 2.0])[:classes])
    layout = region_layout(model, whole=False)
    batch = batches(shards, layout, pairing=PairingConfig(second="tags", false_second=1.0), max_length=16)[0]
    loss = model.losses(batch, Draw(0))["itm"].loss
    wanted = torch.tensor([0.0, 1.0, 2.0])[:classes].log_softmax(0)[2 if classes == 3 else 0]
    assert loss.item() == pytest.approx(-wanted.item(), rel=1e-5)
    score = model.objectives.itm.score(torch.zeros(1, 32))
    assert score.item() == pytest.approx(1.0 if classes == 2 else 1 - np.log(1 + np.exp(2)), rel=1e-5)
    with pytest.raises(ValueError, match=r"make some false by data\.pairing"):
        model.losses(replace(batch, targets={}), Draw(0))


def test_objectives_must_hide_alike() -> None:
    target = {"classes": RegionTargetConfig(outputs=CLASSES)}
    other = MrmConfig(targets=target, hide=0.9)
    with pytest.raises(ValueError, match="hide regions in different ways"):
        region_layout(model_of({"mlm": MlmConfig(), "a": MrmConfig(targets=target), "b": other}), whole=False)
