"""ViLT's own checkpoints: recorded cases, and stand-ins by a plain reference for those that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from albef_reference import attend, linear, norm, some_texts
from standins import GOLDENS, Weights, random_weights, stand_in, verdict
from torch import Tensor
from torch.nn import functional as F

import vlp
from scripts.goldens.base import Case

RECORDED = ["vilt_infer", "vilt_mlm", "vilt_itm_wpa", "vilt_vqa"]
WIDTH, HEADS, LAYERS, PATCH, SIDE, WORDS, LENGTH = 24, 4, 2, 8, 4, 130, 16
CONFIG = {"num_heads": HEADS, "patch_size": PATCH}
SIZES = ((48, 40), (32, 40), (40, 24))


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()
    assert found.compared > 0.7 * found.recorded, "the rest is padding"


def shapes(modalities: int = 2) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "text_embeddings.word_embeddings.weight": (WORDS, WIDTH),
        "text_embeddings.position_embeddings.weight": (LENGTH, WIDTH),
        "text_embeddings.token_type_embeddings.weight": (2, WIDTH),
        "token_type_embeddings.weight": (modalities, WIDTH),
        "transformer.cls_token": (1, 1, WIDTH),
        "transformer.pos_embed": (1, SIDE**2 + 1, WIDTH),
        "transformer.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "transformer.patch_embed.proj.bias": (WIDTH,),
        **layer("pooler.dense", WIDTH, WIDTH),
    }
    for number in range(LAYERS):
        block = f"transformer.blocks.{number}."
        for part, out, into in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 2 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 2 * WIDTH),
        ):
            found |= layer(f"{block}{part}", out, into)
        found |= gain(f"{block}norm1") | gain(f"{block}norm2")
    return found | gain("transformer.norm") | gain("text_embeddings.LayerNorm")


def layer(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def gain(name: str, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def images(seed: int) -> Tensor:
    """Images of unlike sizes, zeros at padding."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(3, 3, 48, 40)
    for row, (height, width) in enumerate(SIZES):
        pixels[row, :, :height, :width] = torch.randn(3, height, width, generator=generator)
    return pixels


def pooled(weights: Weights, ids: Tensor, keep: Tensor, pixels: Tensor, kind: int = 1) -> Tensor:
    """The model on each pair by itself, without padding -> [M, D]."""
    return torch.cat([pair(weights, *one, kind) for one in zip(ids, keep, pixels, strict=True)])


def pair(weights: Weights, ids: Tensor, keep: Tensor, pixels: Tensor, kind: int) -> Tensor:
    text = "text_embeddings."
    ids = ids[keep][None]
    words = weights[f"{text}word_embeddings.weight"][ids] + weights[f"{text}token_type_embeddings.weight"][0]
    words = words + weights[f"{text}position_embeddings.weight"][: ids.shape[1]]
    words = norm(weights, f"{text}LayerNorm", words, 1e-12) + weights["token_type_embeddings.weight"][0]
    shown = pixels.abs().sum(0) > 0
    height, width = int(shown[:, 0].sum()), int(shown[0].sum())
    patch = "transformer.patch_embed.proj"
    seen = F.conv2d(pixels[None, :, :height, :width], weights[f"{patch}.weight"], weights[f"{patch}.bias"], PATCH)
    table = weights["transformer.pos_embed"]
    places = table[:, 1:].mT.unflatten(2, (SIDE, SIDE))
    places = F.interpolate(places, seen.shape[2:], mode="bilinear", align_corners=True)
    seen = torch.cat([weights["transformer.cls_token"] + table[:, :1], (seen + places).flatten(2).mT], 1)
    x = torch.cat([words, seen + weights["token_type_embeddings.weight"][kind]], 1)
    for number in range(LAYERS):
        block = f"transformer.blocks.{number}."
        parts = linear(weights, f"{block}attn.qkv", norm(weights, f"{block}norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(weights, f"{block}attn.proj", attend(*parts, HEADS, None))
        inner = F.gelu(linear(weights, f"{block}mlp.fc1", norm(weights, f"{block}norm2", x, 1e-6)))
        x = x + linear(weights, f"{block}mlp.fc2", inner)
    return linear(weights, "pooler.dense", norm(weights, "transformer.norm", x, 1e-6)[:, 0]).tanh()


def authors_inputs(ids: Tensor, keep: Tensor, prefix: str = "text") -> Weights:
    return {f"{prefix}_ids": ids, f"{prefix}_masks": keep.long()}


FILE: dict[str, Any] = {"file": "model.ckpt", "key": "state_dict"}


def test_nlvr2(tmp_path: Path) -> None:
    (ids, keep), answers = some_texts(3), torch.tensor([1, 0, 1])
    first, second = images(2), images(3)

    def reference(weights: Weights) -> Weights:
        both = torch.cat([pooled(weights, ids, keep, first), pooled(weights, ids, keep, second, kind=2)], 1)
        logits = classify(weights, "nlvr2_classifier", both)
        return {"nlvr2_logits": logits, "nlvr2_labels": answers, "loss_nlvr2": F.cross_entropy(logits, answers)}

    head = layer("nlvr2_classifier.0", 2 * WIDTH, 2 * WIDTH) | gain("nlvr2_classifier.1", 2 * WIDTH)
    weights = random_weights(shapes(3) | head | layer("nlvr2_classifier.3", 2, 2 * WIDTH))
    given = {**authors_inputs(ids, keep), "image_0.0": first, "image_1.0": second, "answers": answers}
    found = verdict(stand_in(tmp_path / "vilt_nlvr2", weights, given, reference, CONFIG, **FILE))
    assert found.passed, found.line()
    assert found.compared == found.recorded and found.gradients == len(weights)


def classify(weights: Weights, name: str, x: Tensor) -> Tensor:
    inner = F.gelu(norm(weights, f"{name}.1", linear(weights, f"{name}.0", x), 1e-5))
    return linear(weights, f"{name}.3", inner)


def test_retrieval(tmp_path: Path) -> None:
    texts, pixels = [some_texts(3, seed=seed) for seed in (1, 2, 3)], images(2)

    def reference(weights: Weights) -> Weights:
        scores = [linear(weights, "rank_output", pooled(weights, *one, pixels)) for one in texts]
        score = torch.cat(scores, 1)
        return {"score": score.view(9, 1), "loss_irtr": F.cross_entropy(score, torch.zeros(3, dtype=torch.long))}

    weights = random_weights(shapes() | layer("rank_output", 1, WIDTH) | layer("itm_score.fc", 2, WIDTH))
    prefixes = ("text", "false_text_0", "false_text_1")
    given = {
        name: x for prefix, one in zip(prefixes, texts, strict=True) for name, x in authors_inputs(*one, prefix).items()
    }
    case = stand_in(tmp_path / "vilt_irtr", weights, {**given, "image.0": pixels}, reference, CONFIG, **FILE)
    found = verdict(case)
    assert found.passed, found.line()
    assert found.compared == found.recorded
    ignored = vlp.load(case.weights, config=CONFIG).report.ignored
    assert [name.split(" ")[0] for name in ignored] == ["itm_score.fc.weight", "itm_score.fc.bias"]


def test_what_is_assumed_is_said() -> None:
    loaded = vlp.load(GOLDENS / "vilt_vqa" / "model.ckpt")
    assert "assumed: num_heads 1" in loaded.report.notes
    assert any("answers are numbered" in note for note in loaded.report.notes)
    assert loaded.config.objectives["answer"].answers[:2] == ("answer 0", "answer 1")
    assert loaded.config.data.transform.multiple == 32 and loaded.config.data.transform.crop == "none"
    assert loaded.model.vision.config.mean == (0.5, 0.5, 0.5)


def test_the_answers_may_be_named() -> None:
    answers = [f"colour {number}" for number in range(10)]
    settings = {"objectives": {"answer": {"answers": answers}}}
    loaded = vlp.load(GOLDENS / "vilt_vqa" / "model.ckpt", config=CONFIG, settings=settings)
    assert list(loaded.config.objectives["answer"].answers) == answers
