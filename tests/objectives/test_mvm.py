"""Masked visual modelling by a dictionary's entries: what is hidden, what it costs, and whose rows count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SIZES, tiny_batch, tiny_model
from torch.nn import functional as F

from encoders import GridConfig, PatchConfig
from encoders.dictionary import DictionaryConfig
from encoders.types import Batch, Images
from objectives import ItmConfig, MimConfig, MlmConfig, ObjectiveConfig
from objectives.base import Draw, Encode, Fuse
from objectives.mim import EntryView
from vlp.data.batch import hide_patches
from vlp.fusion.single import SingleStreamConfig
from vlp.model import Model

BOTH, READ = Fuse("masked", "masked"), Encode("image", "masked")


def model(objectives: dict[str, ObjectiveConfig] | None = None, masks: bool = True, **more: Any) -> Model:
    vision = GridConfig(
        model="resnet10t",
        image_size=32,
        arguments={"output_stride": 8, "channels": (8, 8, 8, 8), "stem_width": 8},
        positions="sine",
        dictionary=DictionaryConfig(entries=6, width=8, mask_token=masks),
        **more,
    )
    return tiny_model(
        SingleStreamConfig(**SIZES, project="image_norm"),
        objectives or {"mim": MimConfig(target="entries")},
        vision=vision,  # type: ignore[arg-type]
    )


def pairs(number: int = 4, share: float = 1.0) -> Batch:
    batch = tiny_batch(number)
    clean = Images(batch.images["clean"].pixels.repeat_interleave(2, 2).repeat_interleave(2, 3))  # 4 x 4 cells of 8
    return replace(
        batch, images={"clean": clean} | hide_patches(clean, {"masked": EntryView(16, share)}, range(number), 1, Draw())
    )


def test_a_cell_of_a_share_of_the_images_is_named() -> None:
    masks = np.stack([EntryView(9, 0.4).make(np.random.default_rng(seed)) for seed in range(400)])
    assert masks.shape == (400, 9) and masks.dtype == bool and set(masks.sum(1)) == {0, 1}
    assert abs(masks.any(1).mean() - 0.4) < 0.08 and (masks.sum(0) > 5).all()
    assert np.stack([EntryView(9, 1.0).make(np.random.default_rng(seed)) for seed in range(20)]).any(1).all()


def by_hand(ours: Model, batch: Batch, rows: list[int], true: list[bool]) -> torch.Tensor:
    """Mean over the true rows with something hidden of the mean over the row's hidden cells, a cell at a time."""
    results = ours.run([BOTH, READ], batch)
    tokens = ours.vision.dictionary
    with torch.no_grad():
        pixels = batch.images["masked"].pixels
        clean = ours.vision._map(pixels, layers=False)[0].flatten(2).transpose(1, 2)
        numbers = torch.cdist(tokens.norm(tokens.project(clean)), tokens.entries).argmin(2)  # [B, 16]
    terms = []
    for row, image in enumerate(rows):
        named = batch.images["masked"].masked[image].nonzero()[:, 0]
        if len(named) and true[row]:
            label = int(numbers[image, named[0]])
            states = results[BOTH].image.states[row, -16:][numbers[image] == label]
            logits = ours.objectives["mim"].head(states)
            terms.append(F.cross_entropy(logits, torch.full((len(states),), label)))
    return torch.stack(terms).mean()


def test_the_entry_that_all_hidden_cells_have_is_predicted() -> None:
    ours, batch = model().eval(), pairs(5, share=0.3)
    hidden = batch.images["masked"].masked.any(1)
    assert 0 < hidden.sum() < 5 and ours.objectives["mim"].chance(5) == pytest.approx(np.log(6))
    found = ours.losses(batch, Draw())["mim"]
    torch.testing.assert_close(found.loss, by_hand(ours, batch, list(range(5)), [True] * 5))
    assert float(ours.objectives["mim"].count(batch)) == hidden.sum() and 0 <= found.metrics["accuracy"] <= 1
    with torch.no_grad():
        ours.vision.dictionary.mask.add_(torch.randn(8))
    assert not torch.equal(ours.losses(batch, Draw())["mim"].loss, found.loss)


def test_several_texts_of_an_image_and_false_pairs() -> None:
    objectives = {"mim": MimConfig(target="entries", matched=True), "itm": ItmConfig(scheme="given", masked=True)}
    ours, batch = model(objectives).eval(), pairs()
    batch = replace(batch, image_of_text=torch.tensor([0, 0, 1, 3]), targets={"match": torch.tensor([1, 0, 1, 1])})
    wanted = by_hand(ours, batch, [0, 0, 1, 3], [True, False, True, True])
    torch.testing.assert_close(ours.losses(batch, Draw())["mim"].loss, wanted)
    assert float(ours.objectives["mim"].count(batch)) == 3


def test_nothing_hidden_costs_nothing() -> None:
    ours, batch = model(), pairs()
    shown = replace(batch.images["masked"], masked=torch.zeros(4, 16, dtype=torch.bool))
    loss = ours.losses(replace(batch, images={"masked": shown}), Draw())["mim"].loss
    loss.backward()
    assert loss == 0 and float(ours.objectives["mim"].count(replace(batch, images={"masked": shown}))) == 0


def test_one_pass_of_sohos_three_objectives_trains_every_part() -> None:
    ours = model(
        {
            "mlm": MlmConfig(image="masked", matched=True),
            "itm": ItmConfig(scheme="given", masked=True),
            "mim": MimConfig(target="entries", matched=True),
        },
        max_pool=False,
        sample=12,
    ).train()
    assert ours.image_names() == {"clean", "masked"} and {BOTH, READ} == ours.needs()
    batch = replace(pairs(), targets={"match": torch.tensor([1, 0, 1, 1])})
    ours(batch, Draw())[0].backward()
    missing = [name for name, one in ours.named_parameters() if one.requires_grad and one.grad is None]
    assert not missing
    assert all(one.grad.isfinite().all() for one in ours.parameters() if one.grad is not None)


def test_without_a_fusion_the_map_alone_is_read() -> None:
    ours, batch = model({"mim": MimConfig(target="entries", alone=True), "mlm": MlmConfig()}).eval(), pairs()
    assert ours.objectives["mim"].needs == {READ}
    states, labels = ours.run([READ], batch)[READ].states, ours.run([READ], batch)[READ].labels
    terms = [
        F.cross_entropy(ours.objectives["mim"].head(states[row][labels[row] >= 0]), labels[row][labels[row] >= 0])
        for row in range(4)
    ]
    torch.testing.assert_close(ours.losses(batch, Draw())["mim"].loss, torch.stack(terms).mean())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target entries hides those of a dictionary; .*mask_token: true"):
        model(masks=False)
    with pytest.raises(ValueError, match="target entries hides those of a dictionary"):
        patch = PatchConfig(model="vit_tiny_patch16_224", image_size=16, patch_size=4, width=32, depth=1, heads=4)
        tiny_model("single_stream", {"mim": MimConfig(target="entries")}, vision=patch)
    with pytest.raises(ValueError, match="of a grid's dictionary target entries"):
        model({"mim": MimConfig()})
