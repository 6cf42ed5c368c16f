"""Attention whose positions are apart from the content (TUPE, OFA), and NormFormer's scales, by definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import LENGTH, SIZES, VOCABULARY, tiny_batch, tiny_model
from torch import Tensor

from encoders import GridConfig, PatchConfig
from encoders.form import FormConfig
from encoders.layers import Block
from encoders.text import StackConfig
from encoders.types import Texts, Tokens
from objectives import LmConfig, MlmConfig
from objectives.base import Decode, Draw, Encode, Fuse
from vlp.decoder import DecoderConfig
from vlp.fusion.multiway import MultiwayConfig
from vlp.fusion.single import SingleStreamConfig
from vlp.fusion.untied import UntiedConfig, UntiedPositions, word_distances
from vlp.generate import DecoderStepper, FusedStepper
from vlp.model import Model, build_model
from vlp.passes import memory_of

SMALL = UntiedConfig(length=20, buckets=6, side=5)
HEADS, WIDTH = SIZES["heads"], SIZES["width"]


def positions(grid: tuple[int, int] | None = (2, 3)) -> UntiedPositions:
    """Positions whose tables of distances are not zero, as they are at first."""
    torch.manual_seed(0)
    found = UntiedPositions(SMALL, StackConfig(**SIZES), grid)
    for weight in found.parameters():
        torch.nn.init.normal_(weight)
    return found.requires_grad_(False)


def model_of(objective: Any = None, *, class_token: bool = False, decoder: bool = True, **fusion: Any) -> Model:
    """Bare embeddings without positions, one stream of them, and a decoder that reads it whole."""
    small = tiny_model("single_stream", ("itm",))
    stated = {**SIZES, "norm": "pre", "normformer": True}
    text = small.config.text.model_copy(update={**stated, "layers": 0, "absolute_positions": False})
    vision = PatchConfig(
        model="vit_tiny_patch16_224", image_size=16, patch_size=4, width=32, depth=0, heads=4, class_token=class_token
    )
    config = small.config.model_copy(
        update={
            "vision": vision,
            "text": text,
            "fusion": SingleStreamConfig(untied=SMALL, **{**stated, **fusion}),
            "decoder": DecoderConfig(**stated, untied=SMALL, memory="both", share="words") if decoder else None,
        }
    )
    model = build_model(config, {"lm": objective or LmConfig(memory="fused", head="bare")}, seed=1)
    for name, weight in model.named_parameters():
        if "_bias." in name:  # tables of distances
            torch.nn.init.normal_(weight)
        elif "head_scale" in name:
            torch.nn.init.normal_(weight, 1.0)
    return model.eval()


def bucket(offset: int, longest: int, buckets: int) -> int:
    """A distance's row, in words: one by one up to half of the buckets, then in geometric steps up to the longest."""
    near = buckets // 2
    if abs(offset) <= near:
        return offset + buckets - 1
    steps = math.ceil(round(math.log(abs(offset) / near, (longest - 1) / near) * (near - 1), 5))
    return int(math.copysign(near + steps, offset)) + buckets - 1


@pytest.mark.parametrize(("longest", "buckets"), [(1024, 256), (20, 6), (4, 16)])
def test_distances_between_words(longest: int, buckets: int) -> None:
    length = min(longest, 300)
    found = word_distances(length, longest, buckets, torch.device("cpu"))
    expected = [[bucket(query - key, longest, buckets) for key in range(length)] for query in range(length)]
    assert found.tolist() == expected
    assert found.min() >= 0 and found.max() <= 2 * buckets - 2


@pytest.mark.parametrize("first", [0, 1])
def test_bias_of_two_tokens_as_written_by_hand(first: int) -> None:
    """Products of their normalised positions, over the root of twice a head's width, and the row of their distance."""
    untied = positions()
    places = untied(first + 6, 4)[0]
    bias = untied.biases(places[None], first + 6)
    width, span = WIDTH // HEADS, 2 * SMALL.side - 1
    cells = [None] * first + [(row, column) for row in range(2) for column in range(3)]
    for query in range(first + 10):
        for key in range(first + 10):
            left, right = untied.query(places[query]).view(HEADS, width), untied.key(places[key]).view(HEADS, width)
            expected = (left * right).sum(1) / math.sqrt(2 * width)
            for layer, found in enumerate(bias):
                table: Tensor | int = 0
                if min(query, key) >= first + 6:
                    table = untied.word_bias[layer].weight[bucket(query - key, SMALL.length, SMALL.buckets)]
                elif max(query, key) < first + 6:
                    one, two = cells[query], cells[key]
                    if one is None or two is None:
                        row = span**2 + (2 if one is two else 0 if one is None else 1)
                    else:
                        row = (one[0] - two[0] + SMALL.side - 1) * span + one[1] - two[1] + SMALL.side - 1
                    table = untied.image_bias[layer].weight[row]
                torch.testing.assert_close(found[0, :, query, key], expected + table, rtol=1e-4, atol=1e-4)


def by_hand(
    block: Block, x: Tensor, bias: Tensor, memory: Tensor | None = None, on_memory: Tensor | None = None
) -> Tensor:
    """NormFormer's layer (Shleifer et al. 2021, section 2) whose logits are halves of content plus a bias."""

    def attend(part: Any, query: Tensor, read: Tensor, more: Tensor) -> Tensor:
        q, k, v = (
            m(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for m, y in zip((part.query, part.key, part.value), (query, read, read))
        )
        share = (q @ k.mT / math.sqrt(2 * q.shape[-1]) + more).softmax(-1)
        return part.out(((share @ v) * part.head_scale.view(-1, 1, 1)).transpose(1, 2).flatten(2))

    y = block.attention_norm(x)
    x = x + block.attention_after(attend(block.attention, y, y, bias))
    if memory is not None:
        assert on_memory is not None
        x = x + block.cross_after(attend(block.cross, block.cross_norm(x), memory, on_memory))
    y = torch.nn.functional.gelu(block.feed.up(block.feed_norm(x)))
    return x + block.feed.down(block.feed.norm(y))


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_encoder_and_decoder_as_written_by_hand(class_token: bool) -> None:
    model, batch = model_of(class_token=class_token), tiny_batch(1)
    real = int(batch.texts["clean"].keep.sum())
    wanted = Decode(Fuse(), "causal")
    results = model.run([wanted], batch)
    fused, written = results[Fuse()], results[wanted]
    fusion, decoder = model.fusion, model.decoder
    image, ids = model.vision(batch.images["clean"]).states, batch.texts["clean"].ids[:, :real]
    number = image.shape[1]
    x = torch.cat([image + fusion.modality.weight[0], model.text.embeddings.word(ids)], 1)
    words = model.text.embeddings.norm(model.text.embeddings.word(ids) + model.text.embeddings.segment.weight[0])
    x[:, number:] = words + fusion.modality.weight[1]
    places = fusion.untied(number, real)
    for block, bias in zip(fusion.blocks, fusion.untied.biases(places, number), strict=True):
        x = by_hand(block, x, bias)
    x = fusion.final_norm(x)
    torch.testing.assert_close(torch.cat([fused.image.states, fused.text.states[:, :real]], 1), x)
    y = decoder.embeddings.norm(decoder.embeddings.word(ids))
    own = decoder.untied(0, real)
    future = torch.full((real, real), -torch.inf).triu(1)
    cross = decoder.cross_positions
    left, right = (
        m(p)[0].unflatten(-1, (HEADS, -1)).transpose(0, 1) for m, p in ((cross.query, own), (cross.key, places))
    )
    on_memory = left @ right.mT / math.sqrt(2 * WIDTH / HEADS)
    for block, bias in zip(decoder.blocks, decoder.untied.biases(own, 0), strict=True):
        y = by_hand(block, y, bias + future, x, on_memory)
    torch.testing.assert_close(written.states[:, :real], decoder.final_norm(y), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_and_other_texts_of_the_step_change_nothing() -> None:
    model, batch = model_of(), tiny_batch(4)
    wanted = Decode(Fuse(), "causal")
    together = model.run([wanted, Decode(Fuse(None, "masked"), "causal"), Fuse(text="masked")], batch)[wanted].states
    for row in range(4):
        alone = model.run([wanted], tiny_batch(1, first=row))[wanted].states
        real = int(batch.texts["causal"].keep[row].sum())
        torch.testing.assert_close(together[row, :real], alone[0, :real])


@pytest.mark.parametrize("beside", [False, True])
@torch.no_grad()
def test_step_by_step_equals_all_at_once(beside: bool) -> None:
    model = model_of(LmConfig(memory="beside"), decoder=False) if beside else model_of()
    batch, ids = tiny_batch(3), torch.tensor([[1, 7, 9, 11]] * 3)
    head, found = model.objectives["lm"].head, []
    for use_cache in (True, False):
        if beside:
            image = model.vision(batch.images["clean"])
            stepper: Any = FusedStepper(model, head, image, None, use_cache)
        else:
            fused = model.run([Fuse()], batch)[Fuse()]
            stepper = DecoderStepper(model.decoder, head, memory_of(fused, "both"), None, use_cache)
        found.append(torch.stack([stepper.step(ids[:, at : at + 1]) for at in range(4)]))
    torch.testing.assert_close(found[0], found[1])


def test_every_weight_learns_and_order_is_seen() -> None:
    model, batch = model_of().train(), tiny_batch(4)
    batch.texts["causal"].ids[:] = batch.texts["clean"].ids
    loss, _ = model(batch, Draw(0))
    loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    texts = torch.tensor([[1, 7, 9, 2]]), torch.tensor([[1, 9, 7, 2]])
    first, second = (model.text(Texts(ids, torch.ones(1, 4, dtype=torch.bool))) for ids in texts)
    with torch.no_grad():
        one, two = (model.eval().fusion(None, each).text.states[0, 0] for each in (first, second))
    assert not torch.allclose(one, two, atol=1e-4)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    text = model_of().config.text
    drawn = PatchConfig(model="vit_tiny_patch16_224", image_size=16, patch_size=4, patch_drop=0.5)
    for changed, said in (
        ({"vision": drawn}, "needs image tokens that are all cells"),
        ({"fusion": SingleStreamConfig(**SIZES, untied=SMALL, images="pair")}, "places for one image"),
        ({"fusion": SingleStreamConfig(**SIZES, untied=SMALL, class_token=True)}, "places for one image"),
        ({"fusion": SingleStreamConfig(**SIZES, untied=UntiedConfig(side=3))}, "less than the 4 x 4 cells"),
        ({"fusion": SingleStreamConfig(**SIZES)}, "model.decoder.untied reads the places"),
        (
            {"fusion": SingleStreamConfig(**SIZES, untied=SMALL, form=FormConfig(buckets=8))},
            "two ways to read positions",
        ),
        ({"fusion": MultiwayConfig(**SIZES, normformer=True)}, "multiway has sub_norm"),
    ):
        config = model_of().config.model_copy(update={"text": text, **changed})
        with pytest.raises(ValueError, match=said) as caught:
            build_model(config, {"lm": LmConfig(memory="fused")})
        assert "\n" not in str(caught.value)
    grid = GridConfig(model="resnet18", image_size=32, reduction=16)
    config = model_of().config.model_copy(update={"vision": grid})
    with pytest.raises(ValueError, match="set that objective's memory to fused"):
        build_model(config, {"lm": LmConfig(), "mlm": MlmConfig()})
    with pytest.raises(ValueError, match="texts of 21 tokens"):
        positions()(0, 21)
    with pytest.raises(ValueError, match="images of 8 tokens"):
        positions()(8, 2)


def test_an_image_alone_has_places_too() -> None:
    fused: Tokens = model_of().run([Encode("image")], tiny_batch(2))[Encode("image")]
    assert fused.positions is not None and fused.positions.shape == (1, 16, WIDTH)
    assert VOCABULARY > LENGTH
