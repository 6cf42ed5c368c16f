"""Toy versions of models that later issues build, run through `model.run` and `model.losses`.

BLIP's shared stack, NLVR2's two images, X-VLM's three images to four texts, FLAVA's unpaired batches, UNITER's sampled
objectives: the interfaces must hold for them before anything is widened.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import OBJECTIVES, PIXELS, SIZES, VOCABULARY, tiny_batch, tiny_model
from torch import Tensor, nn

from encoders import PatchConfig, TextConfig
from encoders.types import Batch, Images
from objectives import AnswerConfig, ItcConfig, ItmConfig, LmConfig
from objectives.base import Decode, Draw, Embed, Encode, Fuse, LossOutput, ModelSpec, Objective, Results
from vlp.decoder import DecoderConfig
from vlp.fusion.dual import DualStreamConfig
from vlp.fusion.single import SingleStreamConfig
from vlp.model import EmbedConfig, Model, ModelConfig, build_model


def complete(model: nn.Module) -> None:
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing, f"no gradient for {missing}"


# BLIP: one stack is text tower, fusion and, with its own self-attention, decoder.


def blip() -> Model:
    config = ModelConfig(
        vision=PatchConfig(model="vit_tiny_patch16_224", image_size=PIXELS, patch_size=4, width=32, depth=2, heads=4),
        text=TextConfig(**SIZES | {"layers": 0}, vocabulary_size=VOCABULARY, max_length=8, segments=0),
        fusion=DualStreamConfig(**SIZES),
        decoder=DecoderConfig(**SIZES, share="all_but_self_attention"),
        embed=EmbedConfig(width=16),
    )
    objectives = {"itc": ItcConfig(), "itm": ItmConfig(floor=1e-4), "lm": LmConfig(label_smoothing=0.1)}
    return build_model(config, objectives)


def test_blip_shares_one_stack() -> None:
    model, batch = blip(), tiny_batch(4)
    for ours, fused in zip(model.decoder.blocks, model.fusion.blocks, strict=True):
        assert ours.cross is fused.cross and ours.feed is fused.feed and ours.attention is not fused.attention
    assert model.decoder.embeddings is model.text.embeddings
    outputs = model.losses(batch, Draw(0))
    assert outputs.keys() == {"itc", "itm", "lm"}
    only_lm = torch.autograd.grad(outputs["lm"].loss, model.fusion.blocks[0].cross.key.weight, retain_graph=True)[0]
    assert only_lm.abs().sum() > 0, "the decoder's gradient must reach the shared weights"
    sum(out.loss for out in outputs.values()).backward()
    complete(model)


def test_blip_text_tower_is_the_fusion_without_image() -> None:
    model, batch = blip().eval(), tiny_batch(4)
    found = model.run({Encode("text"), Embed("text"), Fuse(image=None), Fuse()}, batch)
    embeddings = model.text(batch.texts["clean"])
    alone = model.fusion(None, embeddings).text.states
    assert torch.equal(found[Encode("text")].states, alone)
    assert not torch.equal(embeddings.states, alone), "it is the stack, not the bare embeddings"
    torch.testing.assert_close(found[Fuse(image=None)].text.states, alone)
    fused = model.fusion(model.vision(batch.images["clean"]), embeddings).text.states
    torch.testing.assert_close(found[Fuse()].text.states, fused)
    torch.testing.assert_close(found[Embed("text")].norm(dim=1), torch.ones(4))


def test_blip_weights_stay_shared_after_loading() -> None:
    model, other = blip(), blip()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert other.decoder.blocks[0].feed is other.fusion.blocks[0].feed
    batch = tiny_batch(4)
    for name, out in model.losses(batch, Draw(0)).items():
        assert torch.equal(out.loss, other.losses(batch, Draw(0))[name].loss)


# NLVR2: two images a text.


def two_images(fusion: str) -> tuple[Model, Batch]:
    kinds = {
        "single_stream": SingleStreamConfig(**SIZES, images="pair"),
        "cross": DualStreamConfig(**SIZES, images="pair"),
        "co": DualStreamConfig(**SIZES, attention="co", images="pair", pooler="concat"),
    }
    model = tiny_model(kinds[fusion], {"answer": AnswerConfig(answers=("false", "true"), loss="ce")})
    torch.nn.init.normal_(model.fusion.order)  # zero at first, as if the images had no order
    batch = replace(
        tiny_batch(4, ("clean",)),
        image_of_text=torch.tensor([[0, 1], [2, 3], [3, 0], [1, 1]]),
        targets={"answer_scores": torch.eye(2)[[0, 1, 1, 0]]},
    )
    return model, batch


@pytest.mark.parametrize("fusion", ["single_stream", "cross", "co"])
def test_two_images_per_text(fusion: str) -> None:
    model, batch = two_images(fusion)
    loss, _ = model(batch, Draw(0))
    loss.backward()
    complete(model)
    model.eval()
    fused = model.run({Fuse()}, batch)[Fuse()]
    assert fused.pooled.shape[0] == 4
    if fused.image is not None:
        assert fused.image.states.shape[:2] == (4, 2 * model.vision.num_tokens)
    alone = replace(
        batch,
        images={"clean": Images(batch.images["clean"].pixels[[2, 3]])},
        texts={"clean": row(batch, [1])},
        image_of_text=torch.tensor([[0, 1]]),
    )
    torch.testing.assert_close(model.run({Fuse()}, alone)[Fuse()].pooled, fused.pooled[1:2], rtol=1e-4, atol=1e-5)
    swapped = replace(batch, image_of_text=batch.image_of_text.flip(1))
    after = model.run({Fuse()}, swapped)[Fuse()].pooled
    assert (after - fused.pooled)[:3].abs().amax(1).min() > 1e-4, "the order of the images must matter"
    torch.testing.assert_close(after[3], fused.pooled[3], rtol=1e-4, atol=1e-5)  # twice the same image


def row(batch: Batch, rows: list[int]):
    text = batch.texts["clean"]
    return replace(text, ids=text.ids[rows], keep=text.keep[rows])


@pytest.mark.parametrize("fusion", ["single_stream", "cross", "co"])
def test_patches_left_out_of_two_images_are_not_read(fusion: str) -> None:
    model, batch = two_images(fusion)
    model = tiny_model(model.config.fusion, ("itm", "lm")).eval()
    keep = (torch.arange(4 * (PIXELS // 4) ** 2).view(4, -1) % 3) > 0
    pixels = batch.images["clean"].pixels
    hidden = ~keep.view(4, 1, PIXELS // 4, PIXELS // 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    batch = replace(batch, texts=tiny_batch(4).texts)
    passes = {Fuse(), Decode(Encode("image"))}
    before, after = (
        model.run(passes, replace(batch, images={"clean": Images(one, keep)}))
        for one in (pixels, torch.where(hidden, 0, pixels))
    )
    torch.testing.assert_close(before[Fuse()].pooled, after[Fuse()].pooled)
    decoded = Decode(Encode("image"))
    torch.testing.assert_close(before[decoded].states, after[decoded].states)


def test_matching_refuses_two_images() -> None:
    batch = replace(tiny_batch(4), image_of_text=torch.tensor([[0, 1], [2, 3], [3, 0], [1, 1]]))
    with pytest.raises(ValueError, match="itm matches a text with one image, but here a text has 2"):
        tiny_model("single_stream", ("itm",)).losses(batch, Draw(0))


# X-VLM: three images to four texts.


@pytest.mark.parametrize("fusion", ["single_stream", "dual_stream", "co"])
def test_three_images_to_four_texts(fusion: str) -> None:
    model = tiny_model(fusion, ("itc", "itm", "mlm", "lm"))
    pairs = tiny_batch(4)
    owner = torch.tensor([0, 1, 1, 2])
    batch = replace(
        pairs,
        images={"clean": Images(pairs.images["clean"].pixels[:3])},
        image_of_text=owner,
        image_id=torch.arange(3),
        position=torch.arange(3),
    )
    loss, outputs = model(batch, Draw(0))
    loss.backward()
    complete(model)
    assert outputs.keys() == {"itc", "itm", "mlm", "lm"}
    model.eval()
    passes = {Fuse(), Decode(Encode("image")), Embed("image"), Embed("text")}
    found = model.run(passes, batch)
    assert found[Embed("image")].shape[0] == 3 and found[Embed("text")].shape[0] == 4
    laid_out = replace(batch, images={"clean": Images(batch.images["clean"].pixels[owner])}, image_of_text=None)
    same = model.run(passes, laid_out)
    torch.testing.assert_close(found[Fuse()].pooled, same[Fuse()].pooled, rtol=1e-4, atol=1e-5)
    decoded = Decode(Encode("image"))
    torch.testing.assert_close(found[decoded].states, same[decoded].states, rtol=1e-4, atol=1e-5)
    rows = model.objectives["itm"].rows(found, batch, Draw(0))["itm"]
    assert rows.image_index.max() < 3 and rows.text_index.max() < 4
    assert (owner[rows.text_index] != rows.image_index).all(), "a false pair is a true one"


# FLAVA: batches of images alone and of texts alone.


@dataclass(frozen=True)
class PatchColourConfig:
    """Stands in for masked image modelling: the mean colour of each masked patch."""

    weight: float = 1.0
    source: str | None = None
    head_of: str | None = None
    trains_embed = False
    reads = frozenset()

    def build(self, spec: ModelSpec) -> PatchColour:
        return PatchColour()


class PatchColour(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 3)
        self.needs = frozenset({Encode("image", "masked")})

    def count(self, batch: Batch) -> Tensor:
        masked = batch.images["masked"].masked
        assert masked is not None
        return masked.sum()

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        masked = batch.images["masked"].masked
        assert masked is not None
        side = PIXELS // 4
        colour = (
            batch.images["masked"].pixels.float().unflatten(2, (side, 4)).unflatten(4, (side, 4)).mean((3, 5)) / 255
        )
        error = (self.head(results[Encode("image", "masked")].states[:, 1:]) - colour.flatten(2).mT) ** 2
        return LossOutput((error.mean(2) * masked).sum() / masked.sum())


def unpaired_model() -> Model:
    config = tiny_model("single_stream", ("itm",)).config
    vision = config.vision.model_copy(update={"mask_token": True})
    config = config.model_copy(update={"vision": vision})
    objectives = {"itm": OBJECTIVES["itm"], "colour": PatchColourConfig()}
    return build_model(config, objectives)  # type: ignore[arg-type]


def masked_images(n: int) -> Images:
    clean = tiny_batch(n).images["clean"]
    return replace(clean, masked=torch.arange((PIXELS // 4) ** 2).expand(n, -1) % 3 == 0)


def test_image_only_batch() -> None:
    model = unpaired_model()
    batch = Batch(images={"masked": masked_images(4)}, position=torch.arange(4))
    loss, outputs = model(batch, Draw(0))
    assert list(outputs) == ["colour"], "the objectives that need a text stand aside"
    loss.backward()
    complete(model.vision)
    assert model.text.word_embedding.grad is None
    paired = replace(tiny_batch(4), images={**tiny_batch(4).images, "masked": masked_images(4)})
    assert model.losses(paired, Draw(0)).keys() == {"itm", "colour"}
    torch.testing.assert_close(model.losses(paired, Draw(0))["colour"].loss, outputs["colour"].loss)
    fused = model.run({Fuse(text=None)}, tiny_batch(4))[Fuse(text=None)]
    assert fused.text is None and fused.image.states.shape == (4, model.vision.num_tokens, 32)


def test_image_only_fuses_have_a_row_an_image() -> None:
    model = unpaired_model().eval()
    batch = replace(
        tiny_batch(4),
        images={"clean": Images(tiny_batch(3).images["clean"].pixels), "masked": masked_images(2)},
        image_of_text=torch.tensor([0, 1, 1, 2]),
    )
    clean, masked = Fuse("clean", None), Fuse("masked", None)
    together = model.run({clean, masked, Fuse()}, batch)
    assert together[clean].pooled.shape[0] == 3 and together[masked].pooled.shape[0] == 2
    for one in (clean, masked):
        alone = model.run({one}, batch)[one]
        torch.testing.assert_close(together[one].image.states, alone.image.states)
        torch.testing.assert_close(together[one].pooled, alone.pooled)


def test_text_only_batch() -> None:
    model = tiny_model("none", ("itc", "mlm"))
    batch = replace(tiny_batch(4), images={}, image_id=None)
    loss, outputs = model(batch, Draw(0))
    assert list(outputs) == ["mlm"]
    loss.backward()
    complete(model.text)
    assert all(parameter.grad is None for parameter in model.vision.parameters())
    for fusion in ("single_stream", "dual_stream", "co"):
        model = tiny_model(fusion, ("itm",))
        fused = model.run({Fuse(image=None)}, batch)[Fuse(image=None)]
        assert fused.image is None and fused.text.states.shape == (4, 8, 32)


def test_batch_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="without image"):
        tiny_model("dual_stream", ("itc", "itm")).losses(replace(tiny_batch(4), images={}), Draw(0))


# UNITER: one objective a step.


@pytest.mark.parametrize("name", ["itc", "itm", "mlm", "lm"])
def test_sampled_objective(name: str) -> None:
    model = tiny_model("dual_stream", ("itc", "itm", "mlm", "lm"))
    batch = tiny_batch(4)
    everything = model.losses(batch, Draw(0))
    alone = model.losses(batch, Draw(0), names=[name])
    assert list(alone) == [name]
    torch.testing.assert_close(alone[name].loss, everything[name].loss)
    assert model.needs([name]) < model.needs()
    loss, outputs = model(batch, Draw(0), names=[name])
    loss.backward()
    assert list(outputs) == [name]
    others = [p for other in {"itm", "mlm", "lm"} - {name} for p in model.objectives[other].parameters()]
    tied = {id(model.text.word_embedding)}
    assert all(parameter.grad is None for parameter in others if id(parameter) not in tied)


def test_sampled_objective_reads_only_its_views() -> None:
    model = tiny_model("dual_stream", ("itc", "itm", "mlm", "lm"))
    batch = tiny_batch(4)
    assert model.losses(replace(batch, texts={"masked": batch.texts["masked"]}), Draw(0), names=["mlm"]).keys() == {
        "mlm"
    }
    with pytest.raises(ValueError, match=r"unknown objectives \['mim'\]; the model has"):
        model.losses(batch, Draw(0), names=["mim"])
