"""Texts that begin otherwise where they are fused (BLIP's [ENC]), and two images read at once (BLIP's NLVR2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import SIZES, tiny_batch, tiny_model

from encoders.types import Images
from objectives import AnswerConfig
from objectives.base import Draw, Encode, Fuse
from vlp.fusion.dual import DualStreamConfig
from vlp.model import Model, build_model

FIRST = 7


def model_with(**text: object) -> Model:
    config = tiny_model("dual_stream", ("itc", "itm", "mlm")).config
    settings = config.text.model_copy(update={"layers": 0, **text})
    return build_model(config.model_copy(update={"text": settings}), tiny_model().objective_configs).eval()


def test_fused_texts_begin_with_their_own_id() -> None:
    model, plain, batch = model_with(fused_first=FIRST), model_with(), tiny_batch(4)
    plain.load_state_dict(model.state_dict())
    text = batch.texts["clean"]
    other = text.ids.clone()
    other[:, 0] = FIRST
    changed = replace(batch, texts={**batch.texts, "clean": replace(text, ids=other)})
    passes = {Fuse(), Fuse(image=None), Encode("text")}
    found, wanted, alone = model.run(passes, batch), plain.run(passes, changed), plain.run(passes, batch)
    assert torch.equal(found[Fuse()].text.states, wanted[Fuse()].text.states)
    assert torch.equal(found[Encode("text")].states, alone[Encode("text")].states)
    assert torch.equal(found[Fuse(image=None)].text.states, alone[Fuse(image=None)].text.states)
    assert not torch.equal(found[Fuse()].text.states, alone[Fuse()].text.states)
    model.train()
    loss, _ = model(batch, Draw(0))
    loss.backward()
    assert model.text.embeddings.word.weight.grad[FIRST].abs().sum() > 0


def parallel(merge_from: int) -> Model:
    fusion = DualStreamConfig(**SIZES, images="parallel", merge_from=merge_from)
    return tiny_model(fusion, {"answer": AnswerConfig(answers=("false", "true"), loss="ce", head="relu")})


@pytest.mark.parametrize("merge_from", [0, 1, 2])
def test_two_images_are_read_at_once(merge_from: int) -> None:
    model = parallel(merge_from)
    assert [block.cross.merge is not None for block in model.fusion.blocks] == [n >= merge_from for n in range(2)]
    pairs = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 1]])
    scores = torch.eye(2)[[0, 1, 1, 0]]
    batch = replace(tiny_batch(4, ("clean",)), image_of_text=pairs, targets={"answer_scores": scores})
    loss, _ = model(batch, Draw(0))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    before = model.run({Fuse()}, batch)[Fuse()].pooled
    after = model.run({Fuse()}, replace(batch, image_of_text=pairs.flip(1)))[Fuse()].pooled
    assert (after - before)[:3].abs().amax(1).min() > 1e-4, "the order of the images must matter"
    torch.testing.assert_close(after[3], before[3])  # twice the same image


def test_patches_left_out_of_either_image_are_not_read() -> None:
    model = parallel(1).eval()
    batch = replace(tiny_batch(4, ("clean",)), image_of_text=torch.tensor([[0, 1], [2, 3], [3, 0], [1, 1]]))
    pixels = batch.images["clean"].pixels
    keep = torch.arange(4 * 16).view(4, 16) % 3 > 0
    hidden = ~keep.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    before, after = (
        model.run({Fuse()}, replace(batch, images={"clean": Images(one, keep)}))[Fuse()].pooled
        for one in (pixels, torch.where(hidden, 0, pixels))
    )
    torch.testing.assert_close(before, after)


def test_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="images parallel gives a text 2 images, here it has 1"):
        parallel(1).run({Fuse()}, tiny_batch(4, ("clean",)))
    with pytest.raises(ValueError, match="images parallel needs"):
        tiny_model(DualStreamConfig(**SIZES, images="parallel", attention="co"), ("itm",))
