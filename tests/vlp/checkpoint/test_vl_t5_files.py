"""VL-T5's files: transformers' T5 with the regions that its repository's code adds, under the names of its files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recipes import resolved
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

import vlp
from encoders.types import Batch, Regions, Texts, Vocabulary
from objectives.base import Decode, Fuse
from vlp.checkpoint.foreign import State, shapes_of
from vlp.checkpoint.load import settled
from vlp.checkpoint.vl_t5 import FAMILY
from vlp.generate import GenerationConfig, generate_text
from vlp.model import build_model
from vlp.passes import memory_of
from vlp.run import settle

WIDTH, HEADS, WORDS, FEATURES, REGIONS, LENGTH, EPS = 16, 2, 44, 5, 3, 21, 1e-6
VISUAL = "encoder.visual_embedding."


@pytest.fixture(scope="module")
def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=WORDS,
        d_model=WIDTH,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        layer_norm_epsilon=EPS,
        feed_forward_proj="relu",
        decoder_start_token_id=0,
        attn_implementation="eager",
    )
    model = T5ForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        scale = 0.5 if "layer_norm" in name else 1.5 if "bias" in name or "shared" in name else 0.25
        weight.data.normal_(mean=float("layer_norm" in name), std=scale)
    return model


@pytest.fixture(scope="module")
def state(t5: T5ForConditionalGeneration) -> State:
    """What the repository saves: of T5 also the copies of its words, and the regions' embedding."""
    torch.manual_seed(1)
    shapes = {"img_order_embedding.weight": (2, WIDTH)}
    for name, values in (("feat_embedding", FEATURES), ("absolute_vis_pos_embedding", 5)):
        shapes |= {f"{name}.0.weight": (WIDTH, values), f"{name}.0.bias": (WIDTH,), f"{name}.1.weight": (WIDTH,)}
    words = t5.shared.weight.detach()
    copies = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head", VISUAL + "obj_order_embedding")
    own = {name: weight.detach() for name, weight in t5.state_dict().items()}
    return {
        **own,
        **{f"{name}.weight": words for name in copies},
        **{VISUAL + name: torch.randn(shape) for name, shape in shapes.items()},
    }


def embedded(state: State, features: Tensor, boxes: Tensor) -> Tensor:
    """Regions [B, R, F] with corners x1, y1, x2, y2, which the code takes for x1, x2, y1, y2 -> [B, R, D]."""
    area = (boxes[..., 3] - boxes[..., 2]) * (boxes[..., 1] - boxes[..., 0])
    total = state[VISUAL + "img_order_embedding.weight"][0].expand(*features.shape[:2], -1)
    for name, values in (
        ("feat_embedding", features),
        ("absolute_vis_pos_embedding", torch.cat([boxes, area[..., None]], -1)),
    ):
        weight, bias, norm = (state[f"{VISUAL}{name}.{part}"] for part in ("0.weight", "0.bias", "1.weight"))
        seen = F.linear(values, weight, bias)
        total = total + norm * seen / (seen.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return total + state["shared.weight"][WORDS - 1 - torch.arange(features.shape[1])]


def joined(t5: T5ForConditionalGeneration, state: State, batch: Batch) -> dict[str, Any]:
    """The encoder's states of words, then regions, [B, L + R, D]; words alone have biases by their distance."""
    texts, regions = batch.texts["clean"], batch.images["clean"]
    assert isinstance(regions, Regions)
    states = torch.cat([t5.shared(texts.ids), embedded(state, regions.features, regions.boxes)], 1)
    keep = F.pad(texts.keep, (0, REGIONS), value=True)
    given = t5.encoder.block[0].layer[0].SelfAttention.compute_bias(states.shape[1], states.shape[1])
    wanted = F.pad(given[..., :LENGTH, :LENGTH], (0, REGIONS, 0, REGIONS))
    mask = (wanted - given).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
    found = t5.encoder(inputs_embeds=states, attention_mask=mask)
    return {"encoder_outputs": found, "attention_mask": keep.long()}


def drawn() -> Batch:
    """Two images with a text each, the second one short."""
    generator = torch.Generator().manual_seed(2)
    ids, written = (torch.randint(2, WORDS, (2, length), generator=generator) for length in (LENGTH, 18))
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[1, 6:] = False
    features = torch.randn(2, REGIONS, FEATURES, generator=generator)
    low, side = (torch.rand(2, REGIONS, 2, generator=generator) / 2 for _ in range(2))
    texts = {"clean": Texts(ids.masked_fill(~keep, 0), keep), "a": Texts(written, torch.ones_like(written).bool())}
    return Batch({"clean": Regions(features, torch.cat([low, low + side], -1))}, texts)


@pytest.fixture(scope="module")
def loaded(state: State, tmp_path_factory: pytest.TempPathFactory) -> vlp.Loaded:
    """Of a file as several processes save it."""
    path = tmp_path_factory.mktemp("vl_t5") / "Epoch30.pth"
    torch.save({f"module.{name}": one for name, one in state.items()}, path)
    return vlp.load(path)


@torch.no_grad()
def test_a_file_says_what_t5_with_regions_says(t5: T5ForConditionalGeneration, state: State, loaded: vlp.Loaded):
    batch, wanted = drawn(), Decode(Fuse(), "a")
    assert loaded.report.missing == loaded.report.unexpected == loaded.report.ignored == ()
    reads = joined(t5, state, batch)
    expected = t5(decoder_input_ids=batch.texts["a"].ids, **reads).logits
    results = loaded.model.run([wanted], batch)
    memory = reads["encoder_outputs"].last_hidden_state
    fused = results[Fuse()]
    torch.testing.assert_close(fused.image.states, memory[:, LENGTH:], rtol=1e-5, atol=1e-5)
    seen = batch.texts["clean"].keep
    torch.testing.assert_close(fused.text.states[seen], memory[:, :LENGTH][seen], rtol=1e-5, atol=1e-5)
    found = loaded.model.objectives["lm"].head(results[wanted].states)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


@torch.no_grad()
def test_what_is_written_is_what_t5_writes(t5: T5ForConditionalGeneration, state: State, loaded: vlp.Loaded):
    batch = drawn()
    expected = t5.generate(**joined(t5, state, batch), max_new_tokens=9, do_sample=False, num_beams=1, use_cache=False)
    memory = memory_of(loaded.model.run([Fuse()], batch)[Fuse()], "both")
    words = Vocabulary(WORDS, pad=0, cls=0, sep=1, mask=None, bos=0, eos=1)
    written, _ = generate_text(loaded.model, memory, words, GenerationConfig(max_length=10), objective="lm")
    assert [row[: len(one)] for row, one in zip(expected.tolist(), written, strict=True)] == written


def test_every_name_is_known(state: State):
    ours = FAMILY.rename(state)
    assert ours.unexpected == () and ours.ignored == {}
    older = {name.replace("encoder.", "vis_encoder.") if name[0] == "e" else name: one for name, one in state.items()}
    assert older.keys() != state.keys() and FAMILY.recognise(shapes_of(older), {})
    assert FAMILY.rename(older) == ours and FAMILY.recipe(shapes_of(older), {}) == FAMILY.recipe(shapes_of(state), {})
    across = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    found = FAMILY.rename({**state, across: torch.ones(8, HEADS), "answer_head.0.bias": torch.ones(3)})
    assert found.ignored == {across: "of T5's older files; attention across has no positions"}
    assert found.unexpected == ("answer_head.0.bias",)


def test_words_that_differ_from_their_copies_are_refused(state: State):
    with pytest.raises(ValueError, match=r"are both text.embeddings.word.weight here, but differ"):
        FAMILY.rename({**state, "lm_head.weight": torch.ones(WORDS, WIDTH)})


def test_the_recipe_is_that_of_a_published_file():
    """Sizes of T5-base, 72 words more."""
    run = settle(resolved("pretrain/vl_t5"))
    layer, width = "encoder.block.0.layer.{}.weight", 768
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (32200, width),
        layer.format("0.SelfAttention.relative_attention_bias"): (32, 12),
        layer.format("0.SelfAttention.q"): (width, width),
        layer.format("1.DenseReluDense.wi"): (3072, width),
        VISUAL + "feat_embedding.0.weight": (width, 2048),
        VISUAL + "img_order_embedding.weight": (2, width),
        **{f"{side}.block.11.layer.0.layer_norm.weight": (width,) for side in ("encoder", "decoder")},
    }
    found = settled(FAMILY.recipe(shapes, {}), FAMILY, {})
    with torch.device("meta"):
        theirs, ours = (build_model(one, {}, pretrained=False) for one in (found.model, run.model))
    assert shapes_of(theirs.state_dict()) == shapes_of(ours.state_dict())
    plain = {"dropout": 0.0}
    assert found.model.vision == run.model.vision.model_copy(update=plain)
    stated = run.model.text.form.model_copy(update={"head_width": 64})
    assert found.model.text == run.model.text.model_copy(update={**plain, "hidden": 3072, "init": None, "form": stated})
    assert found.data.max_length == run.data.max_length and found.data.tokenizer.source == run.data.tokenizer.source
