"""Words that carry what a CNN sees in the box that they name (B2T2), from the data to the fusion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SIZES, VOCABULARY
from PIL import Image
from test_recipes import resolved
from torch.nn import functional as F

from downstream.task import batches, seen_samples
from encoders import GridConfig, TextConfig
from encoders.grid import pooled_boxes
from encoders.types import Batch, Images, Texts, Tokens
from objectives import ItmConfig, MlmConfig, MrmConfig
from objectives.base import Draw, Fuse, Rows
from objectives.mrm import RegionTargetConfig
from vlp.data.boxes import boxes_of
from vlp.data.fetch import pair_example
from vlp.data.loader import DataConfig, Loader
from vlp.data.pairing import PairingConfig
from vlp.data.reader import BadSample, Sample, open_reader
from vlp.data.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from vlp.fusion.rows import concatenate, pad_to, take
from vlp.fusion.single import SingleStreamConfig
from vlp.model import Model, ModelConfig, build_model
from vlp.pretrain import pretrain
from vlp.run import Parts, RunConfig, settle
from vlp.shrink import shrink
from vlp.train.log import read_metrics

BOXES = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0]], [[0.5, 0.25, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]]])
FUSION: dict[str, Any] = {
    **{**SIZES, "modality_embedding": False},
    **{"words_see": "named", "words_see_by": "tanh", "image_tokens": False},
}


def model_of(objectives: dict[str, Any] | None = None, **fusion: Any) -> Model:
    torch.manual_seed(0)
    config = ModelConfig(
        vision=GridConfig(model="resnet18", image_size=64, tokens="boxes"),
        text=TextConfig(**SIZES | {"layers": 0}, vocabulary_size=96, max_length=16),
        fusion=SingleStreamConfig(**FUSION | fusion),
    )
    return build_model(config, objectives or {}).eval()


def a_batch() -> Batch:
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (2, 5))
    texts = Texts(ids, torch.ones(2, 5, dtype=torch.bool), boxes=torch.tensor([[-1, 0, 1, 1, -1], [-1, -1, 0, -1, -1]]))
    images = Images(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), boxes=BOXES)
    return Batch({"clean": images}, {"clean": texts})


def test_a_box_is_the_mean_of_places_between_cells() -> None:
    torch.manual_seed(0)
    found = torch.randn(2, 3, 5, 8)
    boxes = torch.rand(2, 4, 2) / 2
    boxes = torch.cat([boxes + 0.1, boxes + 0.1 + torch.rand(2, 4, 2) * 0.3 + 0.05], -1)
    steps = (torch.arange(7) + 0.5) / 7
    wanted = torch.empty(2, 4, 3)
    for b in range(2):
        for r in range(4):
            left, top, right, bottom = boxes[b, r].tolist()
            y, x = torch.meshgrid(top + steps * (bottom - top), left + steps * (right - left), indexing="ij")
            grid = torch.stack([x, y], -1)[None] * 2 - 1
            read = F.grid_sample(found[b : b + 1], grid, align_corners=False, padding_mode="border")
            wanted[b, r] = read.mean((0, 2, 3))
    torch.testing.assert_close(pooled_boxes(found, boxes, 7), wanted, rtol=1e-4, atol=1e-5)


def test_a_text_as_b2t2_embeds_it() -> None:
    model, batch = model_of(), a_batch()
    images, texts, vision, fusion = batch.images["clean"], batch.texts["clean"], model.vision, model.fusion
    with torch.no_grad():
        pixels = (images.pixels / 255 - vision.mean) / vision.std
        found = vision.body.forward_features(pixels)
        whole, boxes = found.mean((2, 3)), pooled_boxes(found, BOXES, 7)
        seen = torch.zeros(2, 5, 512)
        seen[:, 0] = whole
        seen[0, 1], seen[0, 2], seen[0, 3], seen[1, 2] = boxes[0, 0], boxes[0, 1], boxes[0, 1], boxes[1, 0]
        states = model.text.embeddings(texts) + torch.tanh(fusion.words_see.project(seen))
        for block in fusion.blocks:
            states = block(states)
        result = model.run({Fuse()}, batch)[Fuse()]
        torch.testing.assert_close(result.text.states, states, rtol=1e-4, atol=1e-5)
        assert result.image is None
        # With another's image a text names the boxes there; where there is none, nothing.
        rows, pairs = Fuse(rows="other"), {"other": Rows(torch.tensor([1, 1]), torch.tensor([0, 1]))}
        seen = seen.clone()
        seen[0, 0], seen[0, 1], seen[0, 2:4] = whole[1], boxes[1, 0], 0
        states = model.text.embeddings(texts) + torch.tanh(fusion.words_see.project(seen))
        for block in fusion.blocks:
            states = block(states)
        both = model.run({rows, Fuse()}, batch, rows=pairs)
        torch.testing.assert_close(both[rows].text.states, states, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[Fuse()].text.states, result.text.states, rtol=1e-4, atol=1e-5)


def test_without_boxes_the_first_word_carries_the_whole_image() -> None:
    model, batch = model_of(), a_batch()
    plain = replace(
        batch,
        images={"clean": replace(batch.images["clean"], boxes=None)},
        texts={"clean": replace(batch.texts["clean"], boxes=None)},
    )
    found = model.run({Fuse()}, plain)[Fuse()].text.states
    nothing = replace(batch, texts={"clean": replace(batch.texts["clean"], boxes=torch.full((2, 5), -1))})
    torch.testing.assert_close(model.run({Fuse()}, nothing)[Fuse()].text.states, found)
    assert not torch.allclose(model.run({Fuse()}, batch)[Fuse()].text.states, found, atol=1e-3)


def test_rows_keep_what_words_name() -> None:
    states, named = torch.randn(2, 3, 4), torch.tensor([[-1, 0, 1], [-1, -1, 2]])
    tokens = Tokens(states, None, states[:, 0], named=named)
    other = Tokens(torch.randn(1, 5, 4), None, torch.randn(1, 4))
    assert take(tokens, torch.tensor([1, 0])).named.tolist() == named.flip(0).tolist()
    assert pad_to(tokens, 4).named.tolist() == [[-1, 0, 1, -1], [-1, -1, 2, -1]]
    joined = concatenate([tokens, other])
    assert joined is not None
    assert joined.named.tolist() == [[-1, 0, 1, -1, -1], [-1, -1, 2, -1, -1], [-1] * 5]
    assert concatenate([other, other]).named is None


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leave these out, or use tokens cells"):
        GridConfig(model="resnet18", tokens="boxes", sample=4).build()
    with pytest.raises(ValueError, match=r"set model\.fusion\.words_see, and a pooler of cls, tanh or relu"):
        model_of(words_see="none")
    with pytest.raises(ValueError, match=r"set model\.fusion\.words_see, and a pooler of cls, tanh or relu"):
        model_of(pooler="product")
    with pytest.raises(ValueError, match="mrm needs fused image states"):
        model_of({"mrm": MrmConfig(targets={"classes": RegionTargetConfig(outputs=3)})})


# From the data


CAPTIONS = ["a brown dog and a cup", "two cups on a table", "a dog"]
NAMED: list[list[Any]] = [
    [[2, 11, [0.1, 0.2, 0.5, 0.9]], [18, 21, [0.5, 0.5, 0.75, 1.0]]],
    [[0, 8, [0.0, 0.0, 0.5, 0.5]], [14, 19, [0.0, 0.0, 0.5, 0.5]]],
    [],
]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    rows = []
    for number, (caption, named) in enumerate(zip(CAPTIONS, NAMED, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": caption, "phrases": named})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def tokenizer() -> Tokenizer:
    return build_tokenizer(TokenizerConfig(size=90, min_frequency=1), iter(CAPTIONS * 3))


def config_of(table: Path, **more: Any) -> DataConfig:
    transform = {"image_size": 64, "flip": "never"}
    return DataConfig.model_validate(
        {"train": str(table), "workers": 0, "boxes": "phrases", "transform": transform, "max_length": 12, **more}
    )


def test_words_that_name_boxes(table: Path) -> None:
    words, model = tokenizer(), model_of({"mlm": MlmConfig(mask_probability=0.5), "itm": ItmConfig()}).train()
    loader = Loader(
        open_reader(str(table)), pair_example, words, model.text_views(), config_of(table), seed=0, global_batch=3,
        shuffle=False,
    )  # fmt: skip
    ((batch,),) = loader.steps(0, 3)
    for name in ("clean", "masked"):
        text = batch.texts[name]
        for row, (caption, named) in enumerate(zip(CAPTIONS, NAMED, strict=True)):
            ids = batch.texts["clean"].ids[row]
            for box in range(2):
                said = words.decode(ids[text.boxes[row] == box])
                phrases = [caption[first:end] for first, end, corners in named
                           if batch.images["clean"].boxes[row, box].tolist() == pytest.approx(corners)]  # fmt: skip
                assert said == " ".join(phrases)
    assert batch.images["clean"].boxes.shape == (3, 2, 4) and not batch.images["clean"].boxes[2].any()
    assert (batch.texts["clean"].boxes[1] == 0).sum() > 1, "two phrases name one box"
    loss, _ = model(batch, Draw(0))
    loss.backward()
    assert loss.isfinite() and [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    shown = batch.images["clean"].pixels.clone()
    shown[1, :, 40:, 40:] = 255 - shown[1, :, 40:, 40:]  # outside of the box
    assert shown.shape == (3, 3, 64, 64)


def test_fields_that_name_no_boxes() -> None:
    def of(value: Any, *texts: str) -> Any:
        return boxes_of(Sample("k", (), texts or ("a dog",), {"phrases": value}), "phrases", "a dog")

    box = [0.0, 0.0, 0.5, 1.0]
    assert of([[2, 5, box]]) == ((2, 5, (0.0, 0.0, 0.5, 1.0)),) and of([]) == ()
    assert of(json.dumps([[2, 5, box]])) == of([[2, 5, box]]) == of([[], [[2, 5, box]]], "a cup", "a dog")
    for wrong in (None, "x", [[2, 9, box]], [[2, 5, [0, 0, 2, 1]]], [[2, 5, [0.5, 0, 0.5, 1]]], [[2, 5]], [[], []]):
        with pytest.raises(BadSample, match="phrases"):
            of(wrong)


def test_what_would_move_boxes_is_refused(table: Path) -> None:
    def build(**more: Any) -> Loader:
        config = config_of(table, **more)
        return Loader(open_reader(str(table)), pair_example, tokenizer(), {}, config, seed=0, global_batch=3)

    with pytest.raises(ValueError, match=r"data\.transform\.flip auto would move boxes"):
        build(transform={"image_size": 64})
    with pytest.raises(ValueError, match=r"data\.pairing would move"):
        build(pairing=PairingConfig(false_text=0.5))


def test_the_recipe_runs_on_pairs_without_boxes(table: Path, tmp_path: Path) -> None:
    run = shrink(resolved("pretrain/b2t2"))
    rows = {"samples": 12, "global_batch": 6, "micro_batch": 6, "log_every": 1}
    data = {"train": str(table), "workers": 0, "tokenizer": TokenizerConfig(size=90, min_frequency=1)}
    optim = run.train.optim.model_copy(update={"warmup": 0})
    train = run.train.model_copy(update={**rows, "optim": optim})
    run = settle(run.model_copy(update={"data": run.data.model_copy(update=data), "train": train}))
    found = pretrain(run, tmp_path / "run", torch.device("cpu"))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert found.finished and len(records) == 2
    assert all(np.isfinite([record["mlm/loss"], record["itm/loss"]]).all() for record in records)


def test_evaluations_read_boxes_too(table: Path) -> None:
    model = model_of({"itm": ItmConfig()})
    run = RunConfig(model=model.config, objectives={"itm": ItmConfig()}, data=config_of(table))
    parts = Parts(run, model, tokenizer(), open_reader(str(table)))
    bad: dict[str, str] = {}
    ((_, batch),) = batches(parts, seen_samples(parts, parts.reader, bad), 3)
    assert not bad and batch.images["clean"].boxes.shape == (3, 2, 4)
    assert (batch.texts["clean"].boxes >= 0).any(1).tolist() == [True, True, False]
