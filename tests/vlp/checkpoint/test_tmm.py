"""torchmultimodal's FLAVA and CoCa, beside plain references on stand-in weights with its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from standins import random_weights, stand_in, verdict
from tmm_reference import HEADS, coca, flava

import vlp
from vlp.checkpoint.tmm_parts import heads_of

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, before: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, before)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention(name: str, width: int, memory: int, kind: str) -> Shapes:
    if kind == "joint":
        return linear(f"{name}.input_proj", 3 * width, width) | linear(f"{name}.output_proj", width, width)
    names = ("query", "key", "value", "output") if kind == "words" else ("q_proj", "k_proj", "v_proj", "output_proj")
    found = linear(f"{name}.{names[0]}", width, width) | linear(f"{name}.{names[3]}", width, width)
    return found | linear(f"{name}.{names[1]}", width, memory) | linear(f"{name}.{names[2]}", width, memory)


def stack(name: str, width: int, layers: int, kind: str, memory: int | None = None, last: int = 2) -> Shapes:
    found: Shapes = {}
    for number in range(layers):
        layer = f"{name}layer.{number}."
        found |= attention(layer + "attention", width, width, kind) | norm(layer + "attention_layernorm", width)
        if memory is not None:
            found |= attention(layer + "cross_attention", width, memory, kind)
            found |= norm(layer + "cross_attention_layernorm", width)
        found |= norm(layer + "feedforward_layernorm", width)
        found |= linear(layer + "feedforward.model.0", 2 * width, width)
        found |= linear(f"{layer}feedforward.model.{last}", width, 2 * width)
    return found


def flava_shapes(kinds: tuple[str, str, str], last: int) -> Shapes:
    width, model = 24, "model."
    image, text = model + "image_encoder.", model + "text_encoder."
    found: Shapes = {
        image + "embeddings.cls_token": (1, 1, width),
        image + "embeddings.mask_token": (1, 1, width),
        image + "embeddings.position_embeddings": (1, 17, width),
        image + "embeddings.patch_embeddings.projection.weight": (width, 3, 8, 8),
        image + "embeddings.patch_embeddings.projection.bias": (width,),
        text + "embeddings.word_embeddings.weight": (99, width),
        text + "embeddings.position_embeddings.weight": (16, width),
        text + "embeddings.token_type_embeddings.weight": (2, width),
        model + "mm_encoder.cls_token": (1, 1, width),
        "loss.contrastive_loss.logit_scale": (),
    }
    found |= norm(text + "embeddings.layer_norm", width)
    for part, kind in zip(("image", "text", "mm"), kinds, strict=True):
        name = f"{model}{part}_encoder."
        found |= stack(name + "encoder.", width, 2, kind, last=last) | norm(name + "layernorm", width)
        found |= linear(name + "pooler.dense", width, width)
    for side in ("image", "text"):
        found |= linear(f"{model}{side}_projection", 20, width) | linear(
            f"{model}{side}_to_mm_projection", width, width
        )
    for name, words in (("mim_loss", 40), ("mlm_loss", 99), ("mmm_loss.mim", 40), ("mmm_loss.mlm", 99)):
        head = f"loss.{name}.cls."
        found |= linear(head + "dense", width, width) | norm(head + "layer_norm", width)
        found |= {head + "decoder.weight": (words, width), head + "bias": (words,)}
    found |= linear("loss.itm_loss.pooler.dense", width, width)
    return found | linear("loss.itm_loss.cls.seq_relationship", 2, width)


def flava_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 90, (4, 10), generator=generator)
    ids[1, 7:], ids[3, 5:] = 0, 0
    chosen = torch.rand(ids.shape, generator=generator) < 0.3
    chosen[:, 1] = True
    chosen &= ids != 0
    hidden = torch.rand(4, 4, 4, generator=generator) < 0.4
    hidden[:, 0] = True
    return {
        "image": torch.randn(4, 3, 32, 32, generator=generator),
        "text": ids,
        "text_masked": torch.where(chosen, 4, ids),
        "mlm_labels": torch.where(chosen, ids, -1),
        "codes": torch.randint(40, (4, 4, 4), generator=generator),
        "image_patches_mask": hidden,
        "itm_labels": torch.tensor([1, 0, 1, 1]),
    }


FLAVA_CONFIG = {f"{name}_num_attention_heads": HEADS for name in ("image", "text", "multimodal")}


@pytest.mark.parametrize(
    "kinds", [("words", "words", "words"), ("words", "joint", "words"), ("joint", "letters", "joint")]
)
@pytest.mark.parametrize("last", [2, 3])
def test_flava(kinds: tuple[str, str, str], last: int, tmp_path: Path) -> None:
    weights, given = random_weights(flava_shapes(kinds, last)), flava_inputs()
    case = stand_in(
        tmp_path / "tmm_flava_pretrain",
        weights,
        given,
        lambda leaves: flava(leaves, given),
        FLAVA_CONFIG,
        file="model.pt",
        key="model",
    )
    found = verdict(case)
    assert found.passed, found.line()
    assert found.gradients == len(weights)


def test_flava_without_its_losses_keeps_the_poolers(tmp_path: Path) -> None:
    shapes = {n.removeprefix("model."): s for n, s in flava_shapes(("words",) * 3, 2).items() if n.startswith("model.")}
    torch.save(random_weights(shapes), tmp_path / "model.pt")
    loaded = vlp.load(tmp_path / "model.pt", config={"model": FLAVA_CONFIG})
    assert loaded.model.config.vision.heads == HEADS and loaded.model.config.vision.pool == "tanh"
    assert not loaded.report.ignored and not loaded.report.unexpected


def test_flava_brings_its_codebook(tmp_path: Path) -> None:
    """DALL-E's names of it; the biases of the heads may be stored under both their names."""
    shapes, theirs = flava_shapes(("words",) * 3, 2), "image_codebook.encoder.blocks."

    def conv(name: str, out: int, before: int, side: int) -> None:
        shapes.update({f"{theirs}{name}.w": (out, before, side, side), f"{theirs}{name}.b": (out,)})

    conv("input", 8, 3, 7)
    for group, (before, after) in enumerate(((8, 8), (8, 16), (16, 32), (32, 64)), 1):
        for block in (1, 2):
            name, first = f"group_{group}.block_{block}", before if block == 1 else after
            if first != after:
                conv(f"{name}.id_path", after, first, 1)
            for number, (left, right, side) in enumerate(
                ((first, after // 4, 3), (after // 4,) * 2 + (3,), (after // 4,) * 2 + (3,), (after // 4, after, 1)), 1
            ):
                conv(f"{name}.res_path.conv_{number}", right, left, side)
    conv("output.conv", 40, 64, 1)
    weights = random_weights(shapes)
    weights["loss.mim_loss.cls.decoder.bias"] = weights["loss.mim_loss.cls.bias"]
    torch.save(weights, tmp_path / "model.pt")
    loaded = vlp.load(tmp_path / "model.pt", config=FLAVA_CONFIG)
    assert loaded.model.config.codebook.model_dump() == {"codes": 40, "width": 8, "blocks": 2, "init": None}
    assert not loaded.report.unexpected


def coca_shapes(cascaded: bool, token: bool, image_norm: bool, prefix: str = "model.") -> Shapes:
    width, wide = 24, 32
    image, lower, upper = (f"{prefix}{name}." for name in ("vision_encoder", "text_decoder", "multimodal_decoder"))
    found: Shapes = {
        image + "embeddings.position_embeddings": (1, 16 + token, wide),
        image + "embeddings.conv_projection.weight": (wide, 3, 8, 8),
        image + "embeddings.conv_projection.bias": (wide,),
        lower + "embeddings.cls_embedding": (width,),
        lower + "embeddings.token_embeddings.weight": (99, width),
        lower + "embeddings.position_embeddings": (12, width),
        prefix + "vision_proj.weight": (width, width),
        lower + "text_projection.weight": (width, width),
        upper + "output_projection.weight": (99, width),
    }
    if token:
        found[image + "embeddings.cls_token"] = (1, 1, wide)
    found |= stack(image + "encoder.", wide, 2, "joint") | norm(lower + "ln_final", width)
    if image_norm:
        found |= norm(image + "encoder.final_layer_norm", wide)
    found |= stack(lower + "transformer_decoder.", width, 2, "letters")
    found |= stack(upper + "transformer_decoder.", width, 2, "letters", memory=width)
    found |= norm(upper + "transformer_decoder.final_layer_norm", width)
    poolers = (("poolers.0.", wide, 6), ("poolers.1.", width, 1)) if cascaded else (("", wide, 7),)
    for name, memory, number in poolers:
        pooler = f"{prefix}vision_pooler.{name}"
        found |= {f"{pooler}query": (number, width)} | attention(f"{pooler}attn", width, memory, "letters")
        found |= norm(f"{pooler}ln_q", width) | norm(f"{pooler}ln_k", memory) | norm(f"{pooler}ln_post", width)
    return found | ({} if cascaded else {"contrastive_loss.logit_scale": ()})


def coca_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 90, (3, 12), generator=generator)
    ids[1, 6:], ids[2, 10:] = 0, 0  # the first text fills all places
    return {"image": torch.randn(3, 3, 32, 32, generator=generator), "text": ids, "mask": (ids != 0).long()}


COCA_CONFIG: dict[str, Any] = {f"{name}_n_head": HEADS for name in ("vision", "text", "fusion", "pooler")}


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("image_norm", [False, True])
def test_coca(token: bool, image_norm: bool, tmp_path: Path) -> None:
    weights, given = random_weights(coca_shapes(False, token, image_norm)), coca_inputs()
    case = stand_in(
        tmp_path / "tmm_coca",
        weights,
        given,
        lambda leaves: coca(leaves, given),
        COCA_CONFIG,
        file="model.pt",
        key="model",
    )
    found = verdict(case)
    assert found.passed, found.line()
    assert found.gradients == len(weights)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_cascaded_coca(prefix: str, tmp_path: Path) -> None:
    weights, given = random_weights(coca_shapes(True, False, False, prefix)), coca_inputs()
    case = stand_in(
        tmp_path / "tmm_coca_cascaded",
        weights,
        given,
        lambda leaves: coca(leaves, given, prefix),
        COCA_CONFIG,
        file="model.pt",
        key="model",
    )
    found = verdict(case)
    assert found.passed, found.line()


def test_what_a_file_does_not_say_is_said(tmp_path: Path) -> None:
    torch.save(random_weights(coca_shapes(True, False, False)), tmp_path / "model.pt")
    loaded = vlp.load(tmp_path / "model.pt")
    notes = " ".join(loaded.report.notes)
    assert "assumed: heads of width 64" in notes and "assumed: temperature 0.07" in notes
    assert float(loaded.model.space().logit_scale.exp()) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    "config",
    [
        {"vision": {"heads": 4}, "text": {"heads": 2}},
        {"vision_heads": 4, "text": {"width": 24, "heads": 2}},
        {"vit": {"width": 32, "num_heads": 4}, "words": {"hidden_size": 24, "num_attention_heads": 2}},
        {"built of": {"vit": {"heads": 4}}, "words": {"width": 24, "heads": 2}},
        {"words": {"width": 24, "heads": 2}, "built of": {"vit": {"heads": 4}}},
    ],
)
def test_heads_are_found_in_the_arguments_of_either_builder(config: dict[str, Any]) -> None:
    """The authors name no file of settings: a user hands over the arguments as they were, by whatever name."""
    assert heads_of(config, ("vision",), 32) == (4, True)
    assert heads_of(config, ("text",), 24) == (2, True)
    assert heads_of({}, ("vision",), 128) == (2, False)
    assert heads_of({"text_encoder_args": {"num_attention_heads": 12}}, ("vision",), 1024) == (16, False)
