"""Our encoder-decoder in T5's form equals transformers' T5, filled from its folder by the recipe's `init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from encoders.form import FormConfig
from encoders.region import RegionConfig
from encoders.text import TextConfig
from encoders.types import Batch, Regions, Texts, Tokens, Vocabulary
from objectives.base import Decode, Draw, Fuse
from objectives.lm import LmConfig
from objectives.span_corruption import GIVEN, WRITTEN, SpanCorruptionConfig
from vlp.decoder import DecoderConfig
from vlp.fusion.multiway import MultiwayConfig
from vlp.fusion.single import SingleStream, SingleStreamConfig
from vlp.generate import GenerationConfig, generate_text
from vlp.model import Model, ModelConfig, build_model
from vlp.passes import memory_of

SIZES = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
WORDS = Vocabulary(40, pad=0, cls=0, sep=1, mask=None, bos=0, eos=1)
KINDS = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True)}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    """transformers' T5 with random weights, and ours, filled from its folder."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40,
        feed_forward_proj=request.param,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        decoder_start_token_id=0,
        **SIZES,
    )
    theirs = T5ForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    return theirs, filled(folder, *KINDS[request.param])


def filled(folder: Path, activation: Any, gated: bool, init: bool = True) -> Model:
    source = str(folder) if init else None
    form = FormConfig(norm="rms", bias=False, scaled=False, gated=gated, head_width=6, buckets=8, distance=12)
    text = TextConfig(
        width=16,
        layers=0,
        heads=2,
        hidden=24,
        norm="pre",
        activation=activation,
        eps=1e-6,
        form=form,
        vocabulary_size=40,
        absolute_positions=False,
        segments=0,
        embed_norm=False,
        init=source,
    )
    config = ModelConfig(
        vision=RegionConfig(features=5, boxes=5, width=16),
        text=text,
        fusion=SingleStreamConfig(layers=2, modality_embedding=False, init=source),
        decoder=DecoderConfig(layers=2, memory="both", init=source),
    )
    objectives = {
        "span_corruption": SpanCorruptionConfig(alone=True, head="scaled"),
        "lm": LmConfig(memory="fused", view="lm:answer", head="scaled"),
    }
    return build_model(config, objectives).eval()


@pytest.fixture(scope="module")
def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T, L] longer than the farthest distance, what of them is real, and what is written."""
    generator = torch.Generator().manual_seed(1)
    ids, written = (torch.randint(2, 40, shape, generator=generator) for shape in ((3, 20), (3, 16)))
    keep = torch.ones(3, 20, dtype=torch.bool)
    keep[1, 9:], keep[2, 3:] = False, False
    return ids.masked_fill(~keep, 0), keep, written


def batch_of(ids: Tensor, keep: Tensor, written: Tensor) -> Batch:
    labels = written.clone()
    labels[1, 11:] = -100
    shifted = torch.cat([torch.zeros(3, 1, dtype=torch.int64), written[:, :-1]], 1)
    kept = torch.ones_like(written, dtype=torch.bool)
    read, decoded = Texts(ids, keep), Texts(shifted, kept, "causal", labels=labels)
    return Batch(texts={"clean": read, GIVEN: read, WRITTEN: decoded})


@torch.no_grad()
def test_logits_and_loss(pair, texts):
    theirs, ours = pair
    batch = batch_of(*texts)
    said = batch.texts[WRITTEN]
    expected = theirs(
        input_ids=texts[0], attention_mask=texts[1].long(), decoder_input_ids=said.ids, labels=said.labels
    )
    found = ours.losses(batch, Draw(0), ["span_corruption"])["span_corruption"].loss
    assert found.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    name = Decode(Fuse(None, GIVEN), WRITTEN)
    states = ours.run([name], batch)[name].states
    logits = ours.objectives["span_corruption"].head(states)
    assert torch.allclose(logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert expected.logits.std() > 0.1


@torch.no_grad()
def test_gradients_reach_what_theirs_reach(pair, texts):
    theirs, ours = pair
    batch = batch_of(*texts)
    said = batch.texts[WRITTEN]
    with torch.enable_grad():
        theirs(
            input_ids=texts[0], attention_mask=texts[1].long(), decoder_input_ids=said.ids, labels=said.labels
        ).loss.backward()
        ours.losses(batch, Draw(0), ["span_corruption"])["span_corruption"].loss.backward()
    for part, side in ((ours.fusion, theirs.encoder), (ours.decoder, theirs.decoder)):
        bias = side.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad
        assert torch.allclose(part.buckets.table.weight.grad, bias, atol=1e-6) and bias.abs().max() > 1e-5
    assert torch.allclose(ours.text.word_embedding.grad, theirs.shared.weight.grad, atol=1e-5)
    ours.zero_grad(), theirs.zero_grad()


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_ids(pair, texts, use_cache):
    theirs, ours = pair
    ids, keep, _ = texts
    with torch.no_grad():
        expected = theirs.generate(ids, attention_mask=keep.long(), max_new_tokens=17, do_sample=False, num_beams=1)
        name = Fuse(None, "clean")
        memory = memory_of(ours.run([name], Batch(texts={"clean": Texts(ids, keep)}))[name], "both")
    written, _ = generate_text(ours, memory, WORDS, GenerationConfig(max_length=18), use_cache=use_cache)
    assert [row[: len(one)] for row, one in zip(expected.tolist(), written, strict=True)] == written
    assert max(map(len, written)) > 13  # beyond the farthest distance


@torch.no_grad()
def test_words_beside_an_image_know_only_their_own_distances(pair):
    """A slow twin of the joined encoder: bias among words, none from, to and among regions (VL-T5)."""
    ours = pair[1]
    fusion = ours.fusion
    assert isinstance(fusion, SingleStream) and fusion.buckets is not None
    states = torch.randn(2, 4 + 7, 16)
    image, text = (Tokens(one, None, one[:, 0]) for one in states.split([4, 7], 1))
    found = fusion(image, text)
    bias = torch.zeros(2, 11, 11)
    bias[:, 4:, 4:] = fusion.buckets(7, 7)[0]

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    for block in fusion.blocks:
        normed = rms(states, block.attention_norm.weight)
        parts = (getattr(block.attention, name).weight for name in ("query", "key", "value"))
        query, key, value = ((normed @ w.T).unflatten(-1, (2, 6)).transpose(1, 2) for w in parts)
        mixed = (query @ key.transpose(2, 3) + bias).softmax(-1) @ value
        states = states + mixed.transpose(1, 2).flatten(2) @ block.attention.out.weight.T
        states = states + block.feed(rms(states, block.feed_norm.weight))
    states = rms(states, fusion.final_norm.weight)
    assert torch.allclose(torch.cat([found.image.states, found.text.states], 1), states, atol=1e-5)


def test_written_beside_the_image_with_and_without_cache():
    """A single stream that writes by itself, whose words know their distances also when they come one by one."""
    form = FormConfig(norm="rms", bias=False, buckets=8, distance=12)
    sizes = {"width": 16, "heads": 2, "norm": "pre", "segments": 0, "absolute_positions": False, "embed_norm": False}
    text = TextConfig(layers=0, vocabulary_size=40, form=form, **sizes)
    config = ModelConfig(
        vision=RegionConfig(features=5, boxes=5, width=16),
        text=text,
        fusion=SingleStreamConfig(layers=2, class_token=True, pooler="cls"),
    )
    model = build_model(config, {"lm": LmConfig(memory="beside", head="bare")}).eval()
    with torch.no_grad():
        for table in (model.fusion.buckets.table, model.text.embeddings.word):
            table.weight.normal_()
    image = Tokens(
        torch.randn(3, 4, 16), torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 4]), torch.ones(3)
    )
    settings = GenerationConfig(max_length=20, min_length=20)
    kept, again = (generate_text(model, image, WORDS, settings, use_cache=cache)[0] for cache in (True, False))
    assert kept == again and max(map(len, kept)) == 20


def test_weights_of_another_form_are_refused(pair, tmp_path):
    pair[0].save_pretrained(tmp_path)
    text = TextConfig(width=16, layers=2, heads=2, hidden=24, vocabulary_size=40, init=str(tmp_path))
    with pytest.raises(ValueError, match=r"is a T5, whose layers are of another form; set model.text.norm pre"):
        text.build().load_pretrained()
    theirs = pair[0].config
    activation, gated = KINDS[theirs.feed_forward_proj]
    for others, gates, distance, wanted in (
        ("gelu", gated, 12, rf"set model\.text\.activation {activation} and model\.text\.form\.gated {gated}"),
        (activation, not gated, 12, rf"form\.gated {gated}"),
        (activation, gated, 128, r"distances up to 12; set model\.text\.form\.distance"),
    ):
        form = FormConfig(norm="rms", bias=False, scaled=False, gated=gates, head_width=6, buckets=8, distance=distance)
        stack = TextConfig(
            width=16,
            layers=2,
            heads=2,
            hidden=24,
            norm="pre",
            eps=1e-6,
            activation=others,
            form=form,
            vocabulary_size=40,
            absolute_positions=False,
            segments=0,
            embed_norm=False,
            init=str(tmp_path),
        )
        with pytest.raises(ValueError, match=f"(?i){wanted}"):
            stack.build().load_pretrained()


def test_only_stacks_that_can_have_another_form_take_it():
    text = TextConfig(form=FormConfig(norm="rms"), norm="pre")
    with pytest.raises(ValueError, match=r"multiway has layers of the usual form, but model.text.form is another"):
        MultiwayConfig().beside(text)
    assert MultiwayConfig(form=FormConfig()).beside(text).stack.form == FormConfig()
    with pytest.raises(ValueError, match=r"pool token has no distance to words"):
        TextConfig(pool="token", causal=True, vocabulary_size=9, form=FormConfig(buckets=8)).build()
    with pytest.raises(ValueError, match=r"form.distance 8 is not beyond the 8 buckets"):
        FormConfig(buckets=32, distance=8).new_buckets(2, both_ways=True)


@torch.no_grad()
def test_regions_as_vl_t5_embeds_them():
    """Feature and box each normalised, the image's vector, and the words from the last one backwards."""
    vision = RegionConfig(
        features=5, boxes=5, width=16, rms=True, norm="none", segments="own", segment=0, order=True, eps=1e-6, number=4
    )
    text = TextConfig(width=16, layers=0, heads=2, vocabulary_size=9)
    model = Model(ModelConfig(vision=vision, text=text, fusion=SingleStreamConfig(layers=1)), {})
    encoder, regions = model.vision, Regions(torch.randn(2, 3, 5), torch.rand(2, 3, 5))
    parts = [encoder.project(regions.features), encoder.box(regions.boxes)]
    rms = [F.rms_norm(part, (16,), eps=1e-6) for part in parts]
    order = model.text.word_embedding[[8, 7, 6]]
    assert torch.allclose(encoder(regions).states, sum(rms) + encoder.segment.weight[0] + order, atol=1e-6)
    small = ModelConfig(vision=vision, text=text.model_copy(update={"vocabulary_size": 3}), fusion=SingleStreamConfig())
    with pytest.raises(ValueError, match=r"model.vision.order gives each of 4 regions a word, but the text has 3"):
        Model(small, {})
