"""Masked image modelling: hidden blocks, their codes and pixels, and whom it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from encoders import PatchConfig, TextConfig
from encoders.codebook import CodebookConfig
from encoders.types import Batch, Images, Texts
from objectives import ItcConfig, ItmConfig, MimConfig, MlmConfig, ObjectiveConfig
from objectives.base import Draw, Encode, Fuse
from objectives.mim import BlockView
from vlp.data.batch import hide_patches
from vlp.fusion.single import SingleStreamConfig
from vlp.model import Model, ModelConfig

SIZES = {"width": 16, "layers": 1, "heads": 2}
CODES = 12
FLAVA: dict[str, ObjectiveConfig] = {
    "itc": ItcConfig(matched=True, positives="diagonal"),
    "itm": ItmConfig(scheme="given", masked=True),
    "mmm_image": MimConfig(codes=CODES, matched=True),
    "mmm_text": MlmConfig(image="masked", matched=True, tied=False),
    "mim": MimConfig(codes=CODES, unpaired=True),
    "mlm": MlmConfig(unpaired=True, tied=False),
}


def model(objectives: dict[str, ObjectiveConfig], codebook: bool = False) -> Model:
    vision = PatchConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2, mask_token=True)
    config = ModelConfig(
        vision=vision,
        text=TextConfig(**SIZES, vocabulary_size=30, max_length=8, norm="pre"),
        fusion=SingleStreamConfig(**SIZES, before_norm=True, class_token=True, project="both"),
        codebook=CodebookConfig(codes=CODES, width=4, blocks=1) if codebook else None,
    )
    return Model(config, objectives)


def pairs(number: int = 4, targets: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(0)
    clean = Images(torch.randint(0, 256, (number, 3, 16, 16), generator=generator).to(torch.uint8))
    hidden = hide_patches(clean, {"masked": BlockView((4, 4), 0.4, 16)}, range(number), 1, Draw())["masked"]
    codes = torch.randint(CODES, (number, 16), generator=generator)
    ids = torch.randint(5, 30, (number, 6), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, -100)
    keep = torch.ones_like(ids, dtype=torch.bool)
    images = {"clean": clean, "masked": replace(hidden, targets={"codes": codes} if targets else {})}
    texts = {"clean": Texts(ids, keep), "masked": Texts(ids, keep, labels=labels)}
    return Batch(images, texts, targets={"match": torch.tensor([1, 0, 1, 1])[:number]})


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (2, 2), (7, 3)])
@pytest.mark.parametrize("share", [0.1, 75 / 196, 0.75])
def test_blocks(grid: tuple[int, int], share: float) -> None:
    view = BlockView(grid, share, 16)
    masks = [view.make(np.random.default_rng(seed)) for seed in range(20)]
    wanted = max(1, round(share * grid[0] * grid[1]))
    assert all(mask.shape == (grid[0] * grid[1],) and 0 < mask.sum() <= wanted for mask in masks)
    assert np.mean([mask.sum() for mask in masks]) > 0.6 * wanted
    assert np.array_equal(masks[3], view.make(np.random.default_rng(3)))


def test_neighbours_are_hidden_together() -> None:
    """A hidden patch has more hidden neighbours than the share of hidden ones would give it."""
    masks = np.stack([BlockView((14, 14), 0.38, 16).make(np.random.default_rng(n)) for n in range(30)])
    masks = masks.reshape(-1, 14, 14)
    both = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, 1:].sum()
    assert both > 0.38 * 1.5


def test_what_is_hidden_depends_on_the_position_alone() -> None:
    clean = Images(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    views = {"masked": BlockView((4, 4), 0.4, 16)}
    whole = hide_patches(clean, views, [5, 6], 2, Draw(1))["masked"]
    part = hide_patches(Images(clean.pixels[:2]), views, [6], 2, Draw(1))["masked"]
    assert torch.equal(whole.masked[2:], part.masked) and not torch.equal(whole.masked[0], whole.masked[1])
    assert len(whole.masked_at) % 8 == 0
    assert torch.equal(whole.masked_at[whole.masked_at >= 0], whole.masked.flatten().nonzero()[:, 0])


def test_codes_are_predicted_where_patches_are_hidden() -> None:
    ours, batch = model({"mim": MimConfig(codes=CODES)}).eval(), pairs()
    masked = batch.images["masked"]
    assert isinstance(masked, Images) and masked.masked is not None
    states = ours.run([Fuse("masked", "masked")], batch)[Fuse("masked", "masked")].image.states[
        :, 2:
    ]  # two class tokens
    logits = ours.objectives["mim"].head(states[masked.masked])
    wanted = F.cross_entropy(logits, masked.targets["codes"][masked.masked])
    found = ours.losses(batch, Draw())["mim"].loss
    torch.testing.assert_close(found, wanted)
    slow = replace(batch, images={**batch.images, "masked": replace(masked, masked_at=None)})
    torch.testing.assert_close(ours.losses(slow, Draw())["mim"].loss, wanted)
    assert float(ours.objectives["mim"].count(batch)) == masked.masked.sum()
    shown = replace(
        masked,
        pixels=torch.where(
            masked.masked.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3), 0, masked.pixels
        ),
    )
    hidden = replace(batch, images={**batch.images, "masked": shown})
    torch.testing.assert_close(ours.losses(hidden, Draw())["mim"].loss, found)  # it cannot see what it is to predict


def test_several_texts_of_an_image() -> None:
    ours, batch = model({"mim": MimConfig(codes=CODES)}).eval(), pairs()
    index = torch.tensor([0, 0, 1, 3])
    found = ours.losses(replace(batch, image_of_text=index), Draw())["mim"].loss
    masked = batch.images["masked"]
    every = replace(masked, pixels=masked.pixels[index], masked=masked.masked[index], masked_at=None)
    every = replace(every, targets={"codes": masked.targets["codes"][index]})
    wanted = ours.losses(replace(batch, images={"masked": every}), Draw())["mim"].loss
    torch.testing.assert_close(found, wanted)


def test_pixels_are_predicted_where_patches_are_hidden() -> None:
    ours, batch = model({"mim": MimConfig(target="pixels", alone=True), "mlm": MlmConfig()}).eval(), pairs()
    masked = batch.images["masked"]
    states = ours.run([Encode("image", "masked")], batch)[Encode("image", "masked")].states[:, 1:]
    patches = masked.pixels.float().unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    patches = patches.flatten(1, 2)[masked.masked]  # [K, 48]
    target = (patches - patches.mean(1, keepdim=True)) / patches.std(1, keepdim=True, correction=0)
    wanted = (ours.objectives["mim"].head(states[masked.masked]) - target).abs().mean()
    torch.testing.assert_close(ours.losses(batch, Draw())["mim"].loss, wanted, rtol=1e-4, atol=1e-5)


def test_false_pairs_train_matching_alone() -> None:
    ours, batch = model(FLAVA).eval(), pairs()
    losses = ours.losses(batch, Draw())
    assert set(losses) == {"itc", "itm", "mmm_image", "mmm_text"}
    other = replace(batch, texts={n: replace(t, labels=_other(t.labels)) for n, t in batch.texts.items()})
    again = ours.losses(other, Draw())
    torch.testing.assert_close(again["mmm_text"].loss, losses["mmm_text"].loss)
    none = replace(batch, targets={"match": torch.zeros(4, dtype=torch.long)})
    every = replace(batch, targets={"match": torch.ones(4, dtype=torch.long)})
    for name in ("itc", "mmm_image", "mmm_text"):  # where none is true, all count
        torch.testing.assert_close(ours.losses(none, Draw())[name].loss, ours.losses(every, Draw())[name].loss)
        assert not torch.allclose(ours.losses(every, Draw())[name].loss, losses[name].loss)


def _other(labels: torch.Tensor | None) -> torch.Tensor | None:
    """Other labels in the false pair's row."""
    if labels is None:
        return None
    changed = labels.clone()
    changed[1] = torch.where(labels[1] == -100, -100, 5)
    return changed


def test_pairs_images_and_texts_together_train_all() -> None:
    ours, batch = model(FLAVA), pairs()
    for part in (batch, replace(batch, texts={}, targets={}), replace(batch, images={}, targets={})):
        ours(part, Draw())[0].backward()
    missing = [name for name, one in ours.named_parameters() if one.requires_grad and one.grad is None]
    assert not missing
    assert set(ours.active(replace(batch, texts={}))) == {"mim"} and set(ours.active(replace(batch, images={}))) == {
        "mlm"
    }
    with pytest.raises(ValueError, match="can use a batch of pairs"):
        ours.active(batch, ["mim", "mlm"])


def test_codes_of_the_codebook() -> None:
    ours, batch = model({"mim": MimConfig(codes=CODES)}, codebook=True).eval(), pairs(targets=False)
    assert ours.codebook is not None and not any(one.requires_grad for one in ours.codebook.parameters())
    masked = batch.images["masked"]
    codes = ours.codebook.codes(masked, (4, 4))
    assert codes.shape == (4, 16) and len(codes.unique()) > 1
    given = replace(masked, targets={"codes": codes})
    found, wanted = (ours.losses(replace(batch, images={"masked": one}), Draw())["mim"].loss for one in (masked, given))
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="image codes need uint8 pixels"):
        ours.codebook.codes(replace(masked, pixels=masked.pixels.float()), (4, 4))
    with pytest.raises(ValueError, match=r"set model\.codebook"):
        model({"mim": MimConfig(codes=CODES)}).losses(batch, Draw())


def test_published_codebook(tmp_path: Path) -> None:
    torch.manual_seed(0)  # with some weights all codes are one
    theirs = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, num_blocks_per_group=2, vocab_size=CODES))
    for one in theirs.parameters():
        torch.nn.init.normal_(one, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = CodebookConfig(codes=CODES, width=8, init=str(tmp_path)).build()
    ours.load_pretrained()
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(ours(pixels), theirs.get_codebook_indices(pixels)) and len(ours(pixels).unique()) > 1
    with pytest.raises(ValueError, match=r"model\.codebook\.init .* take its codes, width and blocks"):
        CodebookConfig(codes=CODES, width=4, init=str(tmp_path)).build().load_pretrained()


def test_what_cannot_be_is_refused() -> None:
    queries = {"layout": "split", "number": 3, "width": 16, "heads": 2}
    config = ModelConfig(
        vision=PatchConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2, queries=queries),
        text=TextConfig(**SIZES, vocabulary_size=30),
    )
    with pytest.raises(ValueError, match="objective mim hides patches"):
        Model(config, {"mim": MimConfig()})
    with pytest.raises(ValueError, match="objective mim needs fused image states"):
        Model(
            ModelConfig(vision=PatchConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2), text=config.text),
            {"mim": MimConfig()},
        )


def test_scores_may_be_one_linear_map():
    """BEiT-3's head; its loss by hand, over hidden patches that see the text."""
    found = model({"mmm_image": MimConfig(codes=CODES, head="linear"), "mmm_text": MlmConfig(image="masked")}).eval()
    head, batch = found.objectives["mmm_image"].head, pairs()
    assert isinstance(head, torch.nn.Linear) and head.weight.shape == (CODES, 16)
    states = found.run([Fuse("masked", "masked")], batch)[Fuse("masked", "masked")].image.states[:, -16:]
    hidden, codes = batch.images["masked"].masked, batch.images["masked"].targets["codes"]
    wanted = F.cross_entropy(states[hidden] @ head.weight.T + head.bias, codes[hidden])
    torch.testing.assert_close(found.losses(batch, Draw())["mmm_image"].loss, wanted)
