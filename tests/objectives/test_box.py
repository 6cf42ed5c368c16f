"""Regions of pictures, and boxes predicted in the whole of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import PIXELS, tiny_batch, tiny_model

from encoders import GridConfig, PatchConfig
from encoders.types import Batch, Images
from objectives import BoxConfig, ItcConfig, ItmConfig, MlmConfig
from objectives.base import WHOLE, Draw, Encode, Fuse, Rows
from vlp.model import Model

OBJECTIVES = {"itc": ItcConfig(), "itm": ItmConfig(), "mlm": MlmConfig(), "box": BoxConfig()}
OWNER = torch.tensor([0, 0, 1, 2])
PATCH = {"model": "vit_tiny_patch16_224", "image_size": PIXELS, "patch_size": 4, "width": 32, "depth": 2, "heads": 4}


def region_batch() -> Batch:
    batch = tiny_batch(4)
    keep = torch.ones(4, (PIXELS // 4) ** 2, dtype=torch.bool)
    keep[1, 5:], keep[3, :12] = False, False
    pixels = batch.images["clean"].pixels[:3]
    targets = {"box": torch.rand(4, 4), "has_box": torch.tensor([False, True, False, True])}
    return replace(batch, images={"clean": Images(pixels, keep, owner=OWNER)}, targets=targets)


def test_every_part_learns_from_regions_and_boxes() -> None:
    model, batch = tiny_model("dual_stream", OBJECTIVES), region_batch()
    loss, outputs = model(batch, Draw())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert model.counts(batch)["box"] == 2 and torch.isfinite(outputs["box"].loss)


def test_boxes_that_are_not_there_do_not_count() -> None:
    model, batch = tiny_model("dual_stream", OBJECTIVES), region_batch()
    found = model.losses(batch, Draw())["box"].loss
    changed = batch.targets["box"].clone()
    changed[~batch.targets["has_box"]] = 0.1
    same = replace(batch, targets={**batch.targets, "box": changed})
    assert torch.equal(model.losses(same, Draw())["box"].loss, found)
    whole = replace(tiny_batch(4), targets={})
    assert model.counts(whole)["box"] == 0 and model.losses(whole, Draw())["box"].loss == 0


def test_pictures_and_their_regions_are_read_once() -> None:
    model, calls = tiny_model("dual_stream", OBJECTIVES), []
    model.vision.vit.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    model.losses(region_batch(), Draw())
    assert calls == [1]


@pytest.mark.parametrize("depth", [None, 2, 1])
def test_regions_see_their_own_patches(depth: int | None) -> None:
    encoder = PatchConfig(**PATCH, region_depth=depth).build().eval()
    images = region_batch().images["clean"]
    regions, pictures = encoder.regions(images)
    plain = encoder(Images(images.pixels))
    torch.testing.assert_close(pictures.states, plain.states)
    assert regions.states.shape == (4, encoder.num_tokens, 32) and torch.equal(encoder(images).states, regions.states)
    # A region of all patches is its picture.
    torch.testing.assert_close(regions.states[[0, 2]], plain.states[[0, 1]])
    # One whose blocks all see its own patches alone is the picture with the other patches masked.
    alone = encoder(Images(images.pixels[OWNER], images.keep))
    equal = torch.allclose(regions.states[regions.keep], alone.states[alone.keep], atol=1e-5)
    assert equal == (depth in (None, 2))


def test_a_regions_mean_is_of_its_own_cells() -> None:
    arguments = {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2}
    config = GridConfig(model="swin_tiny_patch4_window7_224", image_size=32, mean_token=True, arguments=arguments)
    encoder = config.build().eval()
    keep = torch.ones(3, 16, dtype=torch.bool)
    keep[1, 3:] = False
    images = Images(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), keep, owner=torch.tensor([0, 0, 1]))
    regions, pictures = encoder.regions(images)
    plain = encoder(Images(images.pixels))
    torch.testing.assert_close(pictures.states, plain.states)
    torch.testing.assert_close(regions.states[1, 0], plain.states[0, 1:4].mean(0))
    torch.testing.assert_close(regions.states[[0, 2]], plain.states)
    torch.testing.assert_close(regions.pooled[[0, 2]], plain.pooled)


def test_the_whole_picture_is_the_image_where_there_are_no_regions() -> None:
    model, batch = tiny_model("dual_stream", OBJECTIVES).eval(), tiny_batch(4)
    results = model.run([Encode("image"), Encode("image", WHOLE)], batch)
    assert results[Encode("image")] is results[Encode("image", WHOLE)]


def fused(model: Model, batch: Batch, rows: Rows) -> torch.Tensor:
    return model.run([Fuse(WHOLE, rows="box")], batch, rows={"box": rows})[Fuse(WHOLE, rows="box")].pooled


def test_a_text_is_fused_with_the_picture_of_its_region() -> None:
    model, batch = tiny_model("dual_stream", OBJECTIVES).eval(), region_batch()
    rows = model.objectives["box"].rows(model.new_results(), batch, Draw())["box"]
    assert torch.equal(rows.image_index, OWNER)
    pixels = batch.images["clean"].pixels[OWNER]
    alone = replace(batch, images={"clean": Images(pixels)})
    wanted = fused(model, alone, Rows(torch.arange(4), torch.arange(4)))
    torch.testing.assert_close(fused(model, batch, rows), wanted)
