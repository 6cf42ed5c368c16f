"""METER's checkpoints: recorded cases, and stand-ins by a plain reference for those that are not here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from albef_reference import Names, attend, bert, bert_layer, linear, norm, some_texts
from standins import GOLDENS, Weights, random_weights, stand_in, verdict
from torch import Tensor
from torch.nn import functional as F

import vlp
from scripts.goldens.base import Case
from vlp.data.presets import IMAGENET_MEAN

RECORDED = ["meter_infer", "meter_mlm", "meter_itm"]
WIDTH, TEXT, MEMORY, HEADS, LAYERS, PATCH, SIDE = 24, 16, 32, 4, 2, 8, 4
TOWERS = {"_bert": {"num_attention_heads": 2}, "_clip": {"heads": 2}}
CONFIG = {"num_heads": HEADS, "tokenizer": "bert-base-uncased", **TOWERS}
FILE: dict[str, Any] = {"file": "model.ckpt", "key": "state_dict"}
VISUAL = "vit_model.visual."


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()
    assert found.compared > 0.7 * found.recorded, "the rest is padding"


def names(modalities: int = 2) -> Names:
    made = Names()
    made.bert("text_transformer.", TEXT, LAYERS, LAYERS, TEXT)
    made.linear("text_transformer.pooler.dense", TEXT, TEXT)
    made.add(f"{VISUAL}class_embedding", MEMORY)
    made.add(f"{VISUAL}positional_embedding", SIDE**2 + 1, MEMORY)
    made.add(f"{VISUAL}conv1.weight", MEMORY, 3, PATCH, PATCH)
    made.add("vit_model.ln_final.weight", 8)
    for number in range(LAYERS):
        block = f"{VISUAL}transformer.resblocks.{number}."
        made.add(f"{block}attn.in_proj_weight", 3 * MEMORY, MEMORY)
        made.add(f"{block}attn.in_proj_bias", 3 * MEMORY)
        made.linear(f"{block}attn.out_proj", MEMORY, MEMORY)
        made.linear(f"{block}mlp.c_fc", 4 * MEMORY, MEMORY)
        made.linear(f"{block}mlp.c_proj", MEMORY, 4 * MEMORY)
        made.norm(f"{block}ln_1", MEMORY)
        made.norm(f"{block}ln_2", MEMORY)
    made.norm(f"{VISUAL}ln_pre", MEMORY)
    made.norm(f"{VISUAL}ln_post", MEMORY)
    made.linear("cross_modal_text_transform", WIDTH, TEXT)
    made.linear("cross_modal_image_transform", WIDTH, MEMORY)
    made.add("token_type_embeddings.weight", modalities, WIDTH)
    for side in ("text", "image"):
        made.bert(f"{side}.", WIDTH, LAYERS, 0, WIDTH)  # its layers become this side's
        for name in [name for name in made.state if name.startswith(f"{side}.")]:
            tensor = made.state.pop(name)
            if ".encoder.layer." in name:
                made.state[name.replace(f"{side}.encoder.layer.", f"cross_modal_{side}_layers.")] = tensor
        made.linear(f"cross_modal_{side}_pooler.dense", WIDTH, WIDTH)
    return made


def visual(weights: Weights, pixels: Tensor) -> Tensor:
    x = F.conv2d(pixels, weights[f"{VISUAL}conv1.weight"], stride=PATCH).flatten(2).mT
    x = torch.cat([weights[f"{VISUAL}class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(weights, f"{VISUAL}ln_pre", x + weights[f"{VISUAL}positional_embedding"], 1e-5)
    for number in range(LAYERS):
        block = f"{VISUAL}transformer.resblocks.{number}."
        y = norm(weights, f"{block}ln_1", x, 1e-5)
        parts = (y @ weights[f"{block}attn.in_proj_weight"].T + weights[f"{block}attn.in_proj_bias"]).chunk(3, -1)
        x = x + linear(weights, f"{block}attn.out_proj", attend(*parts, 2, None))
        inner = linear(weights, f"{block}mlp.c_fc", norm(weights, f"{block}ln_2", x, 1e-5))
        x = x + linear(weights, f"{block}mlp.c_proj", inner * torch.sigmoid(1.702 * inner))
    return norm(weights, f"{VISUAL}ln_post", x, 1e-5)


def infer(
    weights: Weights,
    ids: Tensor,
    keep: Tensor,
    pixels: Tensor,
    kind: int = 1,
    tower: Callable[[Weights, Tensor], Tensor] = visual,
    mean: bool = False,
) -> Weights:
    found = {"vit": tower(weights, pixels)}
    x = linear(weights, "cross_modal_text_transform", bert(weights, "text_transformer.", ids, keep, 2))
    y = linear(weights, "cross_modal_image_transform", found["vit"])
    found |= {"text_transformed": x, "image_transformed": y}
    x, y = x + weights["token_type_embeddings.weight"][0], y + weights["token_type_embeddings.weight"][kind]
    words, places = keep[:, None, :], torch.ones(len(y), 1, y.shape[1], dtype=torch.bool)
    for number in range(LAYERS):
        text, image = (f"cross_modal_{side}_layers.{number}." for side in ("text", "image"))
        x, y = (
            bert_layer(weights, text, x, words, HEADS, y, places),
            bert_layer(weights, image, y, places, HEADS, x, words),
        )
        found |= {f"cross_text_{number}": x, f"cross_image_{number}": y}
    read = {"text": x[:, 0], "image": y.mean(1) if mean else y[:, 0]}
    pooled = [linear(weights, f"cross_modal_{side}_pooler.dense", one).tanh() for side, one in read.items()]
    return found | {"text_feats": x, "image_feats": y, "cls_feats": torch.cat(pooled, 1)}


def authors_inputs(ids: Tensor, keep: Tensor, prefix: str = "text") -> Weights:
    return {f"{prefix}_ids": ids, f"{prefix}_masks": keep.long()}


def images(seed: int) -> Tensor:
    return torch.randn(3, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(seed))


def add_classifier(made: Names, name: str, width: int, outputs: int) -> None:
    made.linear(f"{name}.0", 2 * WIDTH, width)
    made.norm(f"{name}.1", 2 * WIDTH)
    made.linear(f"{name}.3", outputs, 2 * WIDTH)


def classify(weights: Weights, name: str, x: Tensor) -> Tensor:
    inner = F.gelu(norm(weights, f"{name}.1", linear(weights, f"{name}.0", x), 1e-5))
    return linear(weights, f"{name}.3", inner)


def test_with_bert(tmp_path: Path) -> None:
    (ids, keep), pixels = some_texts(3), images(2)
    given = {**authors_inputs(ids, keep), "image.0": pixels}
    case = stand_in(
        tmp_path / "meter_bert_infer", names().state, given, lambda w: infer(w, ids, keep, pixels), CONFIG, **FILE
    )
    found = verdict(case)
    assert found.passed, found.line()
    text = vlp.load(case.weights, config=CONFIG).model.text.config
    assert (text.eps, text.position_offset) == (1e-12, 0)


def test_vqa(tmp_path: Path) -> None:
    (ids, keep), pixels, made = some_texts(3), images(2), names()
    add_classifier(made, "vqa_classifier", 2 * WIDTH, 7)
    targets = torch.rand(3, 7, generator=torch.Generator().manual_seed(4))

    def reference(weights: Weights) -> Weights:
        logits = classify(weights, "vqa_classifier", infer(weights, ids, keep, pixels)["cls_feats"])
        loss = F.binary_cross_entropy_with_logits(logits, targets) * 7
        return {"vqa_logits": logits, "vqa_targets": targets, "loss_vqa": loss}

    given = {**authors_inputs(ids, keep), "image.0": pixels}
    found = verdict(stand_in(tmp_path / "meter_vqa", made.state, given, reference, CONFIG, **FILE))
    assert found.passed, found.line()
    assert found.gradients > 100


def test_nlvr2(tmp_path: Path) -> None:
    (ids, keep), first, second, made = some_texts(3), images(2), images(3), names(3)
    add_classifier(made, "nlvr2_classifier", 4 * WIDTH, 2)
    answers = torch.tensor([0, 1, 1])

    def reference(weights: Weights) -> Weights:
        parts = [infer(weights, ids, keep, one, kind)["cls_feats"] for kind, one in ((1, first), (2, second))]
        logits = classify(weights, "nlvr2_classifier", torch.cat(parts, 1))
        return {"nlvr2_logits": logits, "nlvr2_labels": answers, "loss_nlvr2": F.cross_entropy(logits, answers)}

    given = {**authors_inputs(ids, keep), "image_0.0": first, "image_1.0": second, "answers": answers}
    found = verdict(stand_in(tmp_path / "meter_nlvr2", made.state, given, reference, CONFIG, **FILE))
    assert found.passed, found.line()
    assert found.compared == found.recorded


def test_retrieval(tmp_path: Path) -> None:
    texts, pixels, made = [some_texts(3, seed=seed) for seed in (1, 2, 3)], images(2), names()
    made.linear("rank_output", 1, 2 * WIDTH)
    made.linear("itm_score.fc", 2, 2 * WIDTH)

    def reference(weights: Weights) -> Weights:
        scores = [linear(weights, "rank_output", infer(weights, *one, pixels)["cls_feats"]) for one in texts]
        score = torch.cat(scores, 1)
        return {"score": score.view(9, 1), "loss_irtr": F.cross_entropy(score, torch.zeros(3, dtype=torch.long))}

    prefixes = ("text", "false_text_0", "false_text_1")
    given = {
        name: x for prefix, one in zip(prefixes, texts, strict=True) for name, x in authors_inputs(*one, prefix).items()
    }
    case = stand_in(tmp_path / "meter_irtr", made.state, {**given, "image.0": pixels}, reference, CONFIG, **FILE)
    found = verdict(case)
    assert found.passed, found.line()
    assert found.compared == found.recorded


def test_entailment_and_larger_images(tmp_path: Path) -> None:
    """SNLI-VE's head comes too; positions are resized as METER does it when it loads, which the report says."""
    made = names()
    add_classifier(made, "snli_classifier", 2 * WIDTH, 3)
    torch.save({"state_dict": made.state}, tmp_path / "snli.ckpt")
    settings = {"model": {"vision": {"image_size": 48}}}
    loaded = vlp.load(tmp_path / "snli.ckpt", config={**CONFIG, "vision_heads": 2, "text_heads": 2}, settings=settings)
    assert loaded.config.objectives["entail"].answers == ("contradiction", "neutral", "entailment")
    assert loaded.report.resized == ("vision.vit.pos_embed",)
    assert any("bicubic interpolation" in note for note in loaded.report.notes)
    table = made.state[f"{VISUAL}positional_embedding"]
    grid = table[1:].T.reshape(1, MEMORY, SIDE, SIDE)
    wanted = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False).flatten(2)[0].T
    torch.testing.assert_close(loaded.model.vision.vit.pos_embed[0], torch.cat([table[:1], wanted]))


SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 2}


def test_swin(tmp_path: Path) -> None:
    """Its tower is timm's here, under the authors' names; the pooler reads the mean of the image's states."""
    body = timm.create_model("swin_base_patch4_window7_224", num_classes=0, **SWIN).eval()
    theirs = {name: re.sub(r"layers\.1\.downsample", "layers.0.downsample", name) for name in body.state_dict()}
    made = names()
    for name in [name for name in made.state if name.startswith("vit_model.")]:
        del made.state[name]
    drawn = random_weights({name: tuple(one.shape) for name, one in body.state_dict().items()}, 3)
    made.state |= {f"vit_model.{theirs[name]}": tensor for name, tensor in drawn.items()}
    made.linear("cross_modal_image_transform", WIDTH, 16)
    (ids, keep), pixels = some_texts(3), images(2)

    def reference(weights: Weights) -> Weights:
        own = {name: weights[f"vit_model.{there}"] for name, there in theirs.items()}

        def tower(_: Weights, x: Tensor) -> Tensor:
            return torch.func.functional_call(FeaturesOf(body).eval(), {f"body.{n}": t for n, t in own.items()}, (x,))

        return infer(weights, ids, keep, pixels, tower=tower, mean=True)

    given = {**authors_inputs(ids, keep), "image.0": pixels}
    case = stand_in(tmp_path / "meter_swin_infer", made.state, given, reference, CONFIG, **FILE)
    state = torch.load(case.weights, weights_only=True)["state_dict"]
    state["vit_model.layers.0.blocks.1.attn_mask"] = torch.zeros(16, 4, 4)  # from which the image size follows
    state["vit_model.head.weight"] = torch.zeros(5, 16)
    torch.save({"state_dict": state}, case.weights)
    found = verdict(case)
    assert found.passed, found.line()
    loaded = vlp.load(case.weights, config=CONFIG)
    assert loaded.model.config.vision.image_size == 32 and loaded.model.config.vision.mean == IMAGENET_MEAN
    assert loaded.config.data.transform.resize == "shortest"
    assert {"vit_model.head.weight", "vit_model.layers.0.blocks.1.attn_mask"} <= {
        name.partition(" ")[0] for name in loaded.report.ignored
    }


class FeaturesOf(torch.nn.Module):
    """A Swin's cells, [B, N, D]."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body.forward_features(pixels).flatten(1, 2)


def test_another_tower_is_refused(tmp_path: Path) -> None:
    state = {name: one for name, one in names().state.items() if not name.startswith("vit_model.")}
    torch.save({"state_dict": {**state, "vit_model.patch_embed.proj.bias": torch.zeros(4)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="neither CLIP's ViT nor Swin"):
        vlp.load(tmp_path / "other.ckpt")
