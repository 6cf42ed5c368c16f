"""What every encoder, fusion, decoder and objective promises, on tiny random members.

Gradients reach every parameter and are finite; padding changes nothing; rows do not see each other; weights come back
from a state dict; a causal text cannot see its future. Only attended positions are compared: what stands at padding is
nobody's contract.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import PIXELS, SIZES, VOCABULARY, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import BertConfig, DistilBertConfig

from encoders import HfTextConfig, PatchConfig, TextConfig
from encoders.types import Batch, Images, Texts, Tokens
from objectives import (
    AnswerConfig,
    AssignConfig,
    ChooseConfig,
    IntraConfig,
    ItcConfig,
    ItmConfig,
    LmConfig,
    MlmConfig,
    ObjectiveConfig,
    RegressConfig,
    SigmoidConfig,
    TokenItcConfig,
)
from objectives.base import Decode, Draw, Encode, Fuse, Fused, Side
from vlp.decoder import DecoderConfig
from vlp.fusion.dual import DualStreamConfig
from vlp.fusion.multiway import MultiwayConfig
from vlp.fusion.single import SingleStreamConfig
from vlp.fusion.sublayers import SublayersConfig
from vlp.model import Model, build_model
from vlp.multimodal import MultimodalConfig

PATCH = {"model": "vit_tiny_patch16_224", "image_size": PIXELS, "patch_size": 4, "width": 32, "depth": 2, "heads": 4}
VISION = {
    "patch": PatchConfig(**PATCH),
    "patch, stem": PatchConfig(**PATCH | {"stem": (8, 16), "patch_size": 1}),
    "patch, no class token": PatchConfig(**PATCH, class_token=False),
    "patch, bare": PatchConfig(**PATCH | {"depth": 0}),
    "patch, pooler": PatchConfig(**PATCH, pool="tanh"),
    "patch, CLIP": PatchConfig(
        **PATCH | {"model": "vit_base_patch16_clip_224", "arguments": {"act_layer": "quick_gelu"}}
    ),
    "patch, SigLIP": PatchConfig(
        **PATCH | {"model": "vit_base_patch16_siglip_224", "class_token": False, "pool": "map"}
    ),
    "patch, NaFlex": PatchConfig(
        **PATCH, class_token=False, pool="map", position_size=PIXELS, position_resize="bilinear_antialias"
    ),
    "patch, queries": PatchConfig(**PATCH, queries={"layout": "split", "number": 5, "width": 32, "heads": 4}),
    "patch, cascaded queries": PatchConfig(**PATCH, queries={"number": 4, "width": 32, "heads": 4}),
}
HF_SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
TEXT = {
    "text, post": TextConfig(**SIZES, vocabulary_size=VOCABULARY, max_length=32),
    "text, pre": TextConfig(**SIZES, vocabulary_size=VOCABULARY, max_length=32, norm="pre", segments=0),
    "text, RoBERTa": TextConfig(**SIZES, vocabulary_size=VOCABULARY, max_length=32, position_offset=2, pool="mean"),
    "text, CLIP": TextConfig(
        **SIZES, vocabulary_size=VOCABULARY, max_length=32, norm="pre", causal=True, pool="last", embed_norm=False,
        activation="quick_gelu",
    ),
    "text, CoCa": TextConfig(
        **SIZES, vocabulary_size=VOCABULARY, max_length=32, norm="pre", causal=True, pool="token", embed_norm=False
    ),
    "text, largest": TextConfig(**SIZES, vocabulary_size=VOCABULARY, max_length=32, causal=True, pool="largest"),
    "text, projected": TextConfig(**SIZES, vocabulary_size=VOCABULARY, max_length=32, project=32),
    "text, pooler": TextConfig(**SIZES, vocabulary_size=VOCABULARY, max_length=32, norm="pre", pool="tanh"),
    "text, bare": TextConfig(**SIZES | {"layers": 0}, vocabulary_size=VOCABULARY, max_length=32),
    "hf_text, BERT": HfTextConfig(architecture=BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **HF_SIZES).to_dict()),
    "hf_text, DistilBERT": HfTextConfig(architecture=DistilBertConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=64, dropout=0.0, attention_dropout=0.0, **HF_SIZES).to_dict()),
}  # fmt: skip
POOLED: frozenset[Side] = frozenset({"pooled"})
FUSIONS = {
    "single_stream, post": SingleStreamConfig(**SIZES),
    "single_stream, pre": SingleStreamConfig(**SIZES, norm="pre", modality_embedding=False, pooler="cls"),
    "single_stream, FLAVA": SingleStreamConfig(**SIZES, norm="pre", project="both", class_token=True),
    "single_stream, GIT": SingleStreamConfig(**SIZES, project="image_norm", pooler="cls"),
    "cross": DualStreamConfig(**SIZES),
    "cross, pre": DualStreamConfig(**SIZES, norm="pre", project=True, modality_embedding=True, pooler="tanh"),
    "co": DualStreamConfig(**SIZES, attention="co"),
    "co, METER": DualStreamConfig(**SIZES, attention="co", pooler="concat", project=True, modality_embedding=True),
    "co, ViLBERT": DualStreamConfig(**SIZES, attention="co", pooler="product", norm="pre"),
    "co, sublayers": SublayersConfig(**SIZES),
    "co, sublayers, pre": SublayersConfig(**SIZES, norm="pre", pooler="product"),
    "co, LXMERT": SublayersConfig(
        **SIZES, sublayers=("tt vv", "t v", "tt", "t", "tv vt shared", "tt vv", "t v"), pooler="relu"
    ),
    "co, VOLTA's ViLBERT": SublayersConfig(
        **SIZES, sublayers=("tt", "t", "tv vt", "t v", "tt vv", "t v", "tv vt", "t v"), pooler="product",
        image_width=48, image_heads=6, image_hidden=40, cross_width=40, cross_heads=5, pooled_width=16,
    ),
    "multiway, VLMo": MultiwayConfig(**SIZES, key_bias=False, layer_scale=0.1, modality_embedding=True),
    "multiway, BEiT-3": MultiwayConfig(**SIZES, decoupled=True, sub_norm=True, pooler_side="image", pooler_norm=True),
}  # fmt: skip
LEFT_TO_RIGHT = [name for name in FUSIONS if not name.startswith("co")]
DECODERS = {
    "own words": DecoderConfig(**SIZES, share="none"),
    "shared words": DecoderConfig(**SIZES, norm="pre"),
    "BLIP": DecoderConfig(**SIZES, share="all_but_self_attention"),
    "CoCa": MultimodalConfig(**SIZES, norm="pre"),
    "CoCa, open_clip": MultimodalConfig(**SIZES, norm="pre", cross="behind", cross_hidden=48),
}
OBJECTIVES: dict[str, dict[str, ObjectiveConfig]] = {
    "itc": {"itc": ItcConfig()},
    "itc, smoothed": {"itc": ItcConfig(label_smoothing=0.1)},
    "sigmoid": {"sigmoid": SigmoidConfig()},
    "token_itc": {"token_itc": TokenItcConfig()},
    "intra": {"itc": ItcConfig(), "intra": IntraConfig(local=False, queue=6)},
    "itc, queue": {"itc": ItcConfig(queue=6, distill=0.4), "itm": ItmConfig()},
    "itm, random": {"itm": ItmConfig()},
    "itm, hard": {"itc": ItcConfig(), "itm": ItmConfig()},
    "itm, three of each": {"itc": ItcConfig(), "itm": ItmConfig(number=3)},
    "itm, replace_image": {"itm": ItmConfig(scheme="replace_image")},
    "mlm": {"mlm": MlmConfig()},
    "mlm, distilled": {"mlm": MlmConfig(distill=0.4)},
    "mlm, untied": {"mlm": MlmConfig(tied=False)},
    "lm": {"lm": LmConfig(label_smoothing=0.1), "itm": ItmConfig()},
    "lm, fused": {"lm": LmConfig(memory="fused")},
    "answer, bce": {"answer": AnswerConfig(answers=("yes", "no", "maybe"))},
    "lm, distilled": {"lm": LmConfig(memory="fused", mean="texts", distill=0.4)},
    "answer, distilled": {"answer": AnswerConfig(answers=("yes", "no"), loss="ce", head="relu", distill=0.4)},
    "assign": {"assign": AssignConfig()},
    "answer, ce": {"answer": AnswerConfig(answers=("yes", "no"), loss="ce")},
    "choose": {"choose": ChooseConfig(choices=2)},
    "regress": {"regress": RegressConfig(loss="mse")},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Vision encoders, text encoders, fusions and decoders through one door: states and pooled at attended positions.


def attended(found: Tokens | Fused) -> list[Tensor]:
    """All outputs, with zeros at padding."""
    if isinstance(found, Fused):
        return [found.pooled, *(x for side in (found.image, found.text) if side is not None for x in attended(side))]
    states = found.states if found.keep is None else found.states * found.keep[..., None]
    return [states, found.pooled]


def check_gradients(module: nn.Module, outputs: list[Tensor]) -> None:
    """Backpropagate through random projections of all outputs."""
    sum((x * torch.randn_like(x)).sum() for x in outputs).backward()  # type: ignore[union-attr]
    check_complete(module)


def check_complete(module: nn.Module) -> None:
    learned = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    missing = [n for n, p in learned if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing, f"no gradient for {missing}"
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def check_same(found: list[Tensor], wanted: list[Tensor], exactly: bool = False) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0 if exactly else 1e-4, atol=0 if exactly else 1e-5)


def check_round_trip(module: nn.Module, other: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> None:
    """A member of the same config with other weights gives the same outputs once it has these."""
    assert any(not torch.equal(a, b) for a, b in zip(run(module), run(other), strict=True))
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    check_same(run(other), run(module), exactly=True)


def texts(rows: int = 3, length: int = 8, extra: int = 0, **more: Any) -> Texts:
    """Texts of unlike length; ``extra`` columns and all other padding hold words that nobody may read."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    keep = torch.arange(length)[None] < torch.arange(length, length - rows, -1)[:, None]
    filler = torch.randint(5, VOCABULARY, (rows, extra))
    return Texts(torch.cat([ids, filler], 1), torch.cat([keep, torch.zeros_like(filler, dtype=torch.bool)], 1), **more)


def tokens(rows: int, length: int, extra: int = 0, seed: int = 0, spread: int = 1) -> Tokens:
    """Random states; the last ``spread * row`` positions of a row are padding, and so are ``extra`` more."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, length, 32, generator=generator)
    keep = torch.arange(length + extra)[None] < (length - spread * torch.arange(rows))[:, None]
    states = torch.cat([states, torch.randn(rows, extra, 32)], 1)
    states = torch.where(keep[..., None], states, torch.randn_like(states))
    return Tokens(states.requires_grad_(), keep, states[:, 0])


def pick(tree: Tokens | Texts, rows: Tensor) -> Any:
    """The rows of tokens or texts, in another order."""
    values = {name: value[rows] if isinstance(value, Tensor) else value for name, value in vars(tree).items()}
    return replace(tree, **values)


@pytest.mark.parametrize("name", VISION)
def test_vision_encoder(name: str) -> None:
    encoder, other = VISION[name].build().eval(), VISION[name].build().eval()
    pixels = torch.randint(0, 256, (3, 3, PIXELS, PIXELS), dtype=torch.uint8)
    found = encoder(Images(pixels))
    assert found.states.shape == (3, encoder.num_tokens, encoder.width) and found.pooled.shape == (3, encoder.width)
    check_gradients(encoder, attended(found))
    order = torch.tensor([2, 0, 1])
    check_same(attended(encoder(Images(pixels[order]))), [x[order] for x in attended(found)])
    check_round_trip(encoder, other, lambda one: attended(one(Images(pixels))))
    normalised = (pixels.float() / 255 - encoder.mean) / encoder.std
    check_same(attended(encoder(Images(normalised))), attended(found))


@pytest.mark.parametrize("name", [name for name in VISION if "stem" not in name])  # its convolutions see neighbours
def test_vision_padding(name: str) -> None:
    encoder = VISION[name].build().eval()
    pixels = torch.randint(0, 256, (2, 3, PIXELS, PIXELS), dtype=torch.uint8)
    keep = torch.ones(2, (PIXELS // 4) ** 2, dtype=torch.bool)
    keep[1, -4:] = False  # the last row of patches
    before = encoder(Images(pixels, keep))
    pixels = pixels.clone()
    pixels[1, :, -4:] = 255 - pixels[1, :, -4:]
    check_same(attended(encoder(Images(pixels, keep))), attended(before))


@pytest.mark.parametrize("name", TEXT)
def test_text_encoder(name: str) -> None:
    encoder, other = TEXT[name].build().eval(), TEXT[name].build().eval()
    found = encoder(texts())
    assert found.states.shape == (3, 8, encoder.width) and found.pooled.shape == (3, encoder.width)
    check_gradients(encoder, attended(found))
    padded = encoder(texts(extra=8))
    check_same([padded.states[:, :8] * texts().keep[..., None], padded.pooled], attended(found))
    order = torch.tensor([2, 0, 1])
    check_same(attended(encoder(pick(texts(), order))), [x[order] for x in attended(found)])
    check_round_trip(encoder, other, lambda one: attended(one(texts())))
    assert encoder.word_embedding.shape == (VOCABULARY, encoder.width)


@pytest.mark.parametrize("name", [name for name in TEXT if name.startswith("text")])
@pytest.mark.parametrize("kind", ["causal", "prefix"])
def test_text_encoder_cannot_see_the_future(name: str, kind: Any) -> None:
    encoder = TEXT[name].build().eval()
    view = texts(attention=kind, prefix=torch.full((3,), 3) if kind == "prefix" else None)
    changed = replace(view, ids=view.ids.clone())
    changed.ids[:, 4:] = (changed.ids[:, 4:] + 7) % VOCABULARY
    assert torch.equal(encoder(changed).states[:, :4], encoder(view).states[:, :4])


def test_hf_text_refuses_what_it_would_leak() -> None:
    with pytest.raises(ValueError, match="full attention only"):
        TEXT["hf_text, BERT"].build()(texts(attention="causal"))


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion(name: str) -> None:
    config = FUSIONS[name]
    fusion, other = (config.build(32, 32, POOLED).eval() for _ in range(2))
    image, text, index = tokens(3, 6), tokens(4, 8, seed=1), torch.tensor([0, 1, 1, 2])
    found = fusion(image, text, index)
    assert found.pooled.shape == (4, fusion.pooled_width) and found.text.states.shape == (4, 8, fusion.text_width)
    check_gradients(fusion, attended(found))
    assert image.states.grad is not None and text.states.grad is not None
    assert not image.states.grad[~image.keep].any() and not text.states.grad[~text.keep].any(), "padding was read"
    order = torch.tensor([3, 1, 0, 2])
    check_same(attended(fusion(image, pick(text, order), index[order])), [x[order] for x in attended(found)])
    laid_out = fusion(pick(image, index), text)
    check_same(attended(laid_out), attended(found))
    check_round_trip(fusion, other, lambda one: attended(one(image, text, index)))


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_padding(name: str) -> None:
    fusion = FUSIONS[name].build(32, 32, POOLED).eval()
    found = fusion(tokens(3, 6), tokens(3, 8, seed=1))
    padded = fusion(tokens(3, 6, extra=2), tokens(3, 8, extra=8, seed=1))
    check_same([padded.pooled], [found.pooled])
    check_same([x[:, :8] for x in attended(padded.text)[:1]], attended(found.text)[:1])
    if found.image is not None:
        number = found.image.states.shape[1]  # with a class token of the fusion's own one more
        check_same([x[:, :number] for x in attended(padded.image)[:1]], attended(found.image)[:1])


@pytest.mark.parametrize("name", LEFT_TO_RIGHT)
@pytest.mark.parametrize("kind", ["causal", "prefix"])
def test_fusion_cannot_see_the_future(name: str, kind: Any) -> None:
    fusion = FUSIONS[name].build(32, 32, frozenset()).eval()
    image, text = tokens(2, 6), tokens(2, 8, seed=1)
    prefix = torch.full((2,), 3) if kind == "prefix" else None
    before = fusion(image, text, None, kind, prefix)
    later = replace(text, states=text.states.detach().clone())
    later.states[:, 4:] += 1
    after = fusion(image, later, None, kind, prefix)
    assert torch.equal(after.text.states[:, :4], before.text.states[:, :4])
    assert not torch.equal(after.text.states[:, 4:], before.text.states[:, 4:])
    if before.image is not None:
        assert torch.equal(after.image.states, before.image.states), "the image read the text, which then leaks"
    earlier = replace(text, states=text.states.detach().clone())
    earlier.states[:, 2] += 1
    reads = not torch.equal(fusion(image, earlier, None, kind, prefix).text.states[:, 0], before.text.states[:, 0])
    assert reads == (kind == "prefix"), "within the prefix, and only there, tokens see what follows"
    if before.image is not None:
        reads = not torch.equal(fusion(image, earlier, None, kind, prefix).image.states, before.image.states)
        assert reads == (kind == "prefix"), "the image is part of the prefix, whose tokens all see each other"


@pytest.mark.parametrize("name", [name for name in FUSIONS if name.startswith("co")])
def test_co_attention_refuses_what_it_would_leak(name: str) -> None:
    with pytest.raises(ValueError, match="leak"):
        FUSIONS[name].build(32, 32, POOLED)(tokens(2, 6), tokens(2, 8), None, "causal")


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str) -> None:
    def build() -> nn.Module:
        kind = "text, CLIP" if isinstance(DECODERS[name], MultimodalConfig) else "text, post"
        text, fusion = TEXT[kind].build(), FUSIONS["cross"].build(32, 32, frozenset())
        return DECODERS[name].build(32, text, fusion).eval()

    decoder, other = build(), build()
    memory, index, view = tokens(3, 6), torch.tensor([0, 1, 1, 2]), texts(4, attention="causal")
    found = decoder(view, memory, index)
    decoder.zero_grad()
    (found.states * view.keep[..., None] * torch.randn(4, 8, 32)).sum().backward()
    check_complete(decoder)
    assert not memory.states.grad[~memory.keep].any(), "padding of the memory was read"
    padded = decoder(texts(4, extra=8, attention="causal"), tokens(3, 6, extra=2), index)
    check_same([padded.states[:, :8] * view.keep[..., None]], attended(found)[:1])
    order = torch.tensor([3, 1, 0, 2])
    check_same(attended(decoder(pick(view, order), memory, index[order])), [x[order] for x in attended(found)])
    check_round_trip(decoder, other, lambda one: attended(one(view, memory, index)))
    changed = replace(view, ids=view.ids.clone())
    changed.ids[:, 5:] = (changed.ids[:, 5:] + 7) % VOCABULARY
    assert torch.equal(decoder(changed, memory, index).states[:, :5], found.states[:, :5])


# Objectives: alone and in a model.


def model_for(objectives: dict[str, ObjectiveConfig], fusion: str, seed: int = 0) -> Model:
    model = tiny_model(fusion, objectives, seed=seed)
    if "lm" in objectives and objectives["lm"].memory == "fused":  # ALBEF's VQA decoder reads the fused question
        config = model.config.model_copy(update={"decoder": DecoderConfig(**SIZES, memory="text")})
        return build_model(config, objectives, seed=seed)
    return model


def batch_for(objectives: dict[str, ObjectiveConfig], n: int = 4) -> Batch:
    answer = objectives.get("answer")
    targets = {"chosen": torch.tensor([0.0, 1.0]).repeat(n // 2), "value": torch.linspace(-3, 3, n)}
    if isinstance(answer, AnswerConfig):
        targets["answer_scores"] = torch.eye(len(answer.answers))[torch.arange(n) % len(answer.answers)]
    return replace(tiny_batch(n), targets=targets)


CONTRASTIVE = ("itc", "itc, smoothed", "sigmoid", "token_itc", "intra")
WITHOUT_FUSION = (*CONTRASTIVE, "mlm", "mlm, untied")
WITH_FUSION = [
    (name, fusion)
    for name in OBJECTIVES
    if name not in CONTRASTIVE
    for fusion in ("single_stream", "dual_stream", "co")
]


@pytest.mark.parametrize(("name", "fusion"), [*WITH_FUSION, *((name, "none") for name in WITHOUT_FUSION)])
def test_objective(name: str, fusion: str) -> None:
    objectives = OBJECTIVES[name]
    if fusion == "none" and name not in CONTRASTIVE:
        objectives = {**objectives, "itc": ItcConfig()}  # beside mlm it trains the vision encoder
    model, other = model_for(objectives, fusion), model_for(objectives, fusion, seed=1)
    batch = batch_for(objectives)
    loss, outputs = model(batch, Draw(0))
    loss.backward()
    check_complete(model)
    assert outputs.keys() == objectives.keys()
    for one in objectives:
        chance = model.objectives[one].chance(4)
        assert (chance is None) == (one == "regress") and 0 < (chance or 1) < 10 and outputs[one].loss.item() >= 0
        assert all(not value.requires_grad and value.numel() == 1 for value in outputs[one].metrics.values())
        assert model.counts(batch)[one] > 0
    check_round_trip(model, other, lambda one: losses(one, batch))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in WITHOUT_FUSION])
def test_objective_without_what_it_needs_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="fusion"):
        tiny_model("none", OBJECTIVES[name])


def test_fusion_that_nobody_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="add itm or mlm"):
        tiny_model("dual_stream", OBJECTIVES["itc"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_ignores_padding_and_order(name: str) -> None:
    fusion = "none" if name in CONTRASTIVE else "dual_stream"
    model, batch = model_for(OBJECTIVES[name], fusion), batch_for(OBJECTIVES[name])
    model.eval()
    views = {}
    for view, text in batch.texts.items():
        filler = torch.randint(5, VOCABULARY, (4, 8))
        labels = None if text.labels is None else torch.cat([text.labels, torch.full_like(filler, -100)], 1)
        keep = torch.cat([text.keep, torch.zeros_like(filler, dtype=torch.bool)], 1)
        views[view] = replace(text, ids=torch.cat([text.ids, filler], 1), keep=keep, labels=labels)
    model = lengthened(model)
    check_same(losses(model, replace(batch, texts=views)), losses(model, batch))
    if OBJECTIVES[name].keys() & {
        "itm",
        "assign",
        "choose",
    }:  # whose negatives are drawn by row, or whose rows belong together
        return
    order = torch.tensor([2, 0, 3, 1])
    shuffled = replace(
        batch,
        images={view: Images(images.pixels[order]) for view, images in batch.images.items()},
        texts={view: pick(text, order) for view, text in batch.texts.items()},
        targets={key: value[order] for key, value in batch.targets.items()},
        image_id=batch.image_id[order],
        caption_id=batch.caption_id[order],
    )
    check_same(losses(model, shuffled), losses(model, batch))


def losses(model: nn.Module, batch: Batch) -> list[Tensor]:
    assert isinstance(model, Model)
    return [out.loss.detach() for _, out in sorted(model.losses(batch, Draw(0)).items())]


def lengthened(model: Model) -> Model:
    """The model with room for twice the text: more rows of position embeddings."""
    for part in (model, model.teacher):
        if part is not None:
            assert part.text is not None
            old = part.text.embeddings.position
            new = nn.Embedding(2 * old.num_embeddings, old.embedding_dim)
            with torch.no_grad():
                new.weight[: old.num_embeddings] = old.weight
            part.text.embeddings.position, part.text.embeddings.max_length = new, new.num_embeddings
    return model


@pytest.mark.parametrize("fusion", ["single_stream", "dual_stream"])
def test_model_cannot_see_the_future(fusion: str) -> None:
    model = tiny_model(fusion, ("itm", "lm")).eval()
    batch = tiny_batch(3)
    causal = batch.texts["causal"]
    changed = replace(causal, ids=causal.ids.clone())
    changed.ids[:, 3:] = (changed.ids[:, 3:] + 7) % VOCABULARY
    later = replace(batch, texts={**batch.texts, "causal": changed})
    passes = [Decode(Encode("image")), Fuse(text="causal"), Encode("text", "causal")]
    before, after = model.run(passes, batch), model.run(passes, later)
    for one in passes:
        found, wanted = (r[one].text if isinstance(one, Fuse) else r[one] for r in (after, before))
        assert torch.equal(found.states[:, :3], wanted.states[:, :3]), one
