"""UNITER: the recorded cases, and a reference of a few lines for those that are not at hand, at several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import GOLDENS, Weights, random_weights, stand_in, verdict
from torch import Tensor
from torch.nn import functional as F

import vlp
from scripts.goldens.base import Case

SIZES: list[dict[str, int]] = [
    {"width": 24, "heads": 4, "layers": 3, "features": 20, "classes": 11, "hidden": 48},
    {"width": 32, "heads": 2, "layers": 2, "features": 12, "classes": 7, "hidden": 40},
]
TASKS = ("mlm", "mrc", "mrfr", "itm_ot", "itm_rank", "vqa", "nlvr2_paired", "nlvr2_paired_attn")
WORDS, ANSWERS = 120, 10


@pytest.mark.parametrize("name", ["uniter_mlm", "uniter_mrc", "uniter_vqa"])
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=["24", "32"])
def test_tasks(task: str, sizes: dict[str, int], tmp_path: Path) -> None:
    weights = random_weights(shapes(task, **sizes))
    tie(weights)
    given = inputs(task, sizes)
    config = {"num_attention_heads": sizes["heads"], "hidden_act": "gelu"}
    case = stand_in(
        tmp_path / f"uniter_{task}",
        weights,
        given,
        lambda leaves: reference(task, leaves, given, sizes["heads"]),
        config,
        file="model.pt",
        key="model",
    )
    found = verdict(case)
    assert found.passed and found.gradients > 50, found.line()


def test_old_names_and_assumed_heads(tmp_path: Path) -> None:
    weights = random_weights(shapes("vqa", width=128, heads=2, layers=1, features=8, classes=3, hidden=64))
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in weights.items()
    }
    torch.save(older, tmp_path / "model.pt")
    loaded = vlp.load(tmp_path / "model.pt")
    torch.testing.assert_close(loaded.model.vision.norm.weight, weights["uniter.img_embeddings.LayerNorm.weight"])
    assert loaded.model.config.fusion.heads == 2
    assert any("num_attention_heads 2" in note for note in loaded.report.notes)
    assert loaded.config.data.tokenizer.source == "bert-base-cased"


def test_what_is_ignored_and_what_is_unknown(tmp_path: Path) -> None:
    weights = random_weights(shapes("itm_rank", **SIZES[0]))
    torch.save(weights, tmp_path / "model.pt")
    loaded = vlp.load(tmp_path / "model.pt", config={"num_attention_heads": 4})
    assert any(name.startswith("itm_output.weight") for name in loaded.report.ignored)
    assert "rank" in loaded.model.objectives and "itm" not in loaded.model.objectives
    torch.save(weights | {"re_output.weight": torch.zeros(1, 24)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"unexpected re_output\.weight"):
        vlp.load(tmp_path / "model.pt", config={"num_attention_heads": 4})


def test_two_images_in_one_sequence(tmp_path: Path) -> None:
    """UNITER's triplet format: segments alone tell the images apart."""
    weights = random_weights(shapes("nlvr2_paired", **SIZES[0]))
    weights["nlvr2_output.weight"] = weights["nlvr2_output.weight"][:, :24].clone()
    torch.save(weights, tmp_path / "model.pt")
    loaded = vlp.load(tmp_path / "model.pt", config={"num_attention_heads": 4})
    assert loaded.model.config.fusion.images == "pair" and not loaded.model.fusion.order.any()


def shapes(task: str, width: int, heads: int, layers: int, features: int, classes: int, hidden: int):
    """Names and shapes of a file of the authors."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        found.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, size: int = width) -> None:
        found.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    segments = 3 if "nlvr2" in task else 2
    for name, rows in (("word", WORDS), ("position", 40), ("token_type", segments)):
        found[f"uniter.embeddings.{name}_embeddings.weight"] = (rows, width)
    norm("uniter.embeddings.LayerNorm")
    image = "uniter.img_embeddings."
    linear(image + "img_linear", width, features)
    linear(image + "pos_linear", width, 7)
    for name in ("img_layer_norm", "pos_layer_norm", "LayerNorm"):
        norm(image + name)
    found[image + "mask_embedding.weight"] = (2, features)
    for n in range(layers):
        layer = f"uniter.encoder.layer.{n}."
        for part in ("query", "key", "value"):
            linear(f"{layer}attention.self.{part}", width, width)
        linear(layer + "attention.output.dense", width, width)
        linear(layer + "intermediate.dense", hidden, width)
        linear(layer + "output.dense", width, hidden)
        norm(layer + "attention.output.LayerNorm")
        norm(layer + "output.LayerNorm")
    linear("uniter.pooler.dense", width, width)
    if task in ("mlm", "mrc", "mrfr", "itm_ot"):
        found["cls.predictions.bias"], found["cls.predictions.decoder.weight"] = (WORDS,), (WORDS, width)
        linear("cls.predictions.transform.dense", width, width)
        norm("cls.predictions.transform.LayerNorm")
        found["feat_regress.weight"], found["feat_regress.bias"] = (width, features), (features,)
        for head in ("feat_regress", "region_classifier"):
            linear(f"{head}.net.0", width, width)
            norm(f"{head}.net.2")
        linear("region_classifier.net.3", classes, width)
    if "itm" in task or task in ("mlm", "mrc", "mrfr"):
        linear("itm_output", 2, width)
    if task == "itm_rank":
        linear("rank_output", 1, width)
    if task == "vqa":
        linear("vqa_output.0", 2 * width, width)
        norm("vqa_output.2", 2 * width)
        linear("vqa_output.3", ANSWERS, 2 * width)
    if "nlvr2" in task:
        linear("nlvr2_output", 2, 2 * width)
    if task == "nlvr2_paired_attn":
        for one in ("attn1", "attn2"):
            found[f"{one}.in_proj_weight"], found[f"{one}.in_proj_bias"] = (3 * width, width), (3 * width,)
            linear(f"{one}.out_proj", width, width)
        linear("fc.0", width, 2 * width)
        linear("attn_pool.fc.0", 1, width)
    return found


def tie(weights: Weights) -> None:
    if "feat_regress.weight" in weights:
        weights["feat_regress.weight"] = weights["uniter.img_embeddings.img_linear.weight"].clone()
        weights["cls.predictions.decoder.weight"] = weights["uniter.embeddings.word_embeddings.weight"].clone()


def inputs(task: str, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(task))
    pairs = "nlvr2" in task or task == "itm_rank"
    words, regions = ([9, 9, 6, 6], [7, 4, 5, 7]) if pairs else ([12, 7, 9], [5, 7, 4])
    if task == "itm_rank":
        words = [9, 9, 6, 7]
    rows, longest, most = len(words), max(words), max(regions)
    ids = torch.zeros(rows, longest, dtype=torch.long)
    features, boxes = torch.zeros(rows, most, sizes["features"]), torch.zeros(rows, most, 7)
    size = max(n + r for n, r in zip(words, regions, strict=True))
    gather, keep = torch.arange(size).repeat(rows, 1), torch.zeros(rows, size, dtype=torch.long)
    for row, (n, r) in enumerate(zip(words, regions, strict=True)):
        ids[row, :n] = torch.randint(5, WORDS, (n,), generator=generator)
        features[row, :r] = torch.randn(r, sizes["features"], generator=generator)
        boxes[row, :r] = torch.rand(r, 7, generator=generator)
        gather[row, n : n + r] = torch.arange(longest, longest + r)
        keep[row, : n + r] = 1
    if "nlvr2" in task:
        ids[1::2] = ids[::2]
    found = {
        "input_ids": ids, "position_ids": torch.arange(longest)[None], "img_feat": features, "img_pos_feat": boxes,
        "attn_masks": keep, "gather_index": gather,
    }  # fmt: skip
    if task == "mlm":
        found["txt_labels"] = torch.full_like(ids, -1)
        found["txt_labels"][0, 3], found["txt_labels"][2, 5], found["txt_labels"][0, 7] = 44, 55, 66
    if task in ("mrc", "mrfr"):
        masked = torch.zeros(rows, most, dtype=torch.bool)
        masked[0, 1] = masked[1, 0] = masked[1, 4] = masked[2, 2] = True
        found["img_masks"], found["img_feat"] = masked, features.masked_fill(masked[..., None], 0)
        if task == "mrc":
            found["label_targets"] = torch.randn(4, sizes["classes"], generator=generator).softmax(1)
        else:
            found["feat_targets"] = torch.randn(4, sizes["features"], generator=generator)
    if task == "itm_ot":
        found["targets"] = torch.tensor([1, 0, 1])
    if task == "vqa":
        found["targets"] = torch.rand(rows, ANSWERS, generator=generator).round(decimals=1)
    if "nlvr2" in task:
        found["targets"] = torch.tensor([1, 0])
        found["img_type_ids"] = torch.tensor([1, 2, 1, 2])[:, None].expand(rows, most).clone()
    return found


# A reference from the paper and the names of the weights: one row at a time, without padding.


def reference(task: str, w: Weights, given: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)

    def encode(row: int) -> tuple[list[Tensor], int]:
        total = int(given["attn_masks"][row].sum())
        longest = given["input_ids"].shape[1]
        places = given["gather_index"][row, :total]
        n = int((places < longest).sum())
        tables = [w[f"uniter.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
        table = tables[2]
        text = norm(tables[0][given["input_ids"][row, :n]] + tables[1][:n] + table[0], "uniter.embeddings.LayerNorm")
        image, at = "uniter.img_embeddings.", places[n:] - longest
        features = given["img_feat"][row, at]
        if "img_masks" in given:
            features = features + given["img_masks"][row, at, None] * w[image + "mask_embedding.weight"][1]
        seen = norm(linear(features, image + "img_linear"), image + "img_layer_norm")
        seen = seen + norm(linear(given["img_pos_feat"][row, at], image + "pos_linear"), image + "pos_layer_norm")
        kinds = given["img_type_ids"][row, at] if "img_type_ids" in given else torch.ones(len(at), dtype=torch.long)
        x = torch.cat([text, norm(seen + table[kinds], image + "LayerNorm")])
        every = []
        for number in range(sum(name.endswith("intermediate.dense.bias") for name in w)):
            layer = f"uniter.encoder.layer.{number}."
            mixed = attend(*(linear(x, f"{layer}attention.self.{part}") for part in ("query", "key", "value")))
            x = norm(linear(mixed, layer + "attention.output.dense") + x, layer + "attention.output.LayerNorm")
            inner = F.gelu(linear(x, layer + "intermediate.dense"))
            x = norm(linear(inner, layer + "output.dense") + x, layer + "output.LayerNorm")
            every.append(x)
        return every, n

    rows = [encode(row) for row in range(len(given["input_ids"]))]
    pooled = torch.stack([torch.tanh(linear(every[-1][0], "uniter.pooler.dense")) for every, _ in rows])
    return HEADS[task](w, given, rows, pooled, linear, norm, heads)


def mlm(w, given, rows, pooled, linear, norm, heads) -> dict[str, Tensor]:
    labels = given["txt_labels"]
    places = [(r, c) for r in range(len(labels)) for c in range(labels.shape[1]) if labels[r, c] != -1]
    states = torch.stack([rows[r][0][-1][c] for r, c in places])
    states = norm(F.gelu(linear(states, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
    scores = states @ w["uniter.embeddings.word_embeddings.weight"].T + w["cls.predictions.bias"]
    raw = -scores.log_softmax(1)[torch.arange(len(places)), labels[labels != -1]]
    size = given["attn_masks"].shape[1]
    layers = {
        f"layer.{n}": torch.stack([F.pad(every[n], (0, 0, 0, size - len(every[n]))) for every, _ in rows])
        for n in range(len(rows[0][0]))
    }
    return {"scores": scores, "raw": raw, "loss_mlm": raw.mean(), **layers}


def hidden(given, rows) -> Tensor:
    masked = given["img_masks"]
    return torch.stack([rows[r][0][-1][rows[r][1] + int(c)] for r, c in masked.nonzero()])


def mrc(w, given, rows, pooled, linear, norm, heads) -> dict[str, Tensor]:
    states = norm(F.gelu(linear(hidden(given, rows), "region_classifier.net.0")), "region_classifier.net.2")
    pred, target = linear(states, "region_classifier.net.3"), given["label_targets"]
    raw_kl = target * (target.log() - pred.log_softmax(1))
    raw_ce = -pred.log_softmax(1)[torch.arange(len(pred)), target[:, 1:].argmax(1) + 1]
    return {"pred": pred, "raw_kl": raw_kl, "raw_ce": raw_ce, "loss_mrckl": raw_kl.mean(), "loss_mrc": raw_ce.mean()}


def mrfr(w, given, rows, pooled, linear, norm, heads) -> dict[str, Tensor]:
    states = norm(F.gelu(linear(hidden(given, rows), "feat_regress.net.0")), "feat_regress.net.2")
    pred = states @ w["uniter.img_embeddings.img_linear.weight"] + w["feat_regress.bias"]
    raw = (pred - given["feat_targets"]) ** 2
    return {"pred": pred, "raw": raw, "loss_mrfr": raw.mean()}


def itm_ot(w, given, rows, pooled, linear, norm, heads) -> dict[str, Tensor]:
    scores, label = linear(pooled, "itm_output"), given["targets"]
    raw = -scores.log_softmax(1)[torch.arange(len(label)), label]
    distance = torch.stack([transport(every[-1][:n], every[-1][n:]) for every, n in rows])
    pos, neg = distance[label == 1], distance[label == 0]
    loss_ot = 0.1 * (pos.sum() - neg.sum()) / len(label)
    return {"scores": scores, "raw": raw, "ot_pos": pos, "ot_neg": neg, "loss_itm": raw.mean(), "loss_ot": loss_ot}


def transport(words: Tensor, regions: Tensor, beta: float = 0.5) -> Tensor:
    """IPOT of one pair (Xie et al. 2018, algorithm 1)."""
    cost = 1 - F.normalize(words, dim=1) @ F.normalize(regions, dim=1).T
    m, n = cost.shape
    kernel, plan, scale = (-cost.detach().T / beta).exp(), torch.ones(n, m), torch.ones(m, 1) / m
    for _ in range(50):
        q = kernel * plan
        left = 1 / (n * q @ scale)
        scale = 1 / (m * q.T @ left)
        plan = left * q * scale.T
    return (cost.T * plan).sum()


def itm_rank(w, given, rows, pooled, linear, norm, heads) -> dict[str, Tensor]:
    scores = linear(pooled, "rank_output")
    pair = scores.sigmoid().view(2, 2)
    raw = (0.2 + pair[:, 1:] - pair[:, :1]).clamp(min=0)
    return {"scores": scores, "raw": raw, "loss": raw.mean()}


def vqa(w, given, rows, pooled, linear, norm, heads) -> dict[str, Tensor]:
    scores = linear(norm(F.gelu(linear(pooled, "vqa_output.0")), "vqa_output.2"), "vqa_output.3")
    target = given["targets"]
    raw = -(target * F.logsigmoid(scores) + (1 - target) * F.logsigmoid(-scores))
    return {"scores": scores, "raw": raw, "loss": raw.mean() * ANSWERS}


def verdicts(scores: Tensor, label: Tensor) -> dict[str, Tensor]:
    raw = -scores.log_softmax(1)[torch.arange(len(label)), label]
    return {"scores": scores, "raw": raw, "loss": raw.mean()}


def nlvr2_paired(w, given, rows, pooled, linear, norm, heads) -> dict[str, Tensor]:
    return verdicts(linear(pooled.view(2, -1), "nlvr2_output"), given["targets"])


def nlvr2_paired_attn(w, given, rows, pooled, linear, norm, heads) -> dict[str, Tensor]:
    def look(name: str, own: Tensor, other: Tensor) -> Tensor:
        attention = torch.nn.MultiheadAttention(own.shape[1], heads)
        state = {key: w[f"{name}.{key}"] for key, _ in attention.named_parameters()}
        return torch.func.functional_call(attention, state, (own, other, other))[0]

    def pool(states: Tensor) -> Tensor:
        return (F.relu(linear(states, "attn_pool.fc.0")).softmax(0) * states).sum(0)

    found = []
    for left, right in ((rows[0], rows[1]), (rows[2], rows[3])):
        a, b = left[0][-1], right[0][-1]
        both = (("attn1", a, b), ("attn2", b, a))
        mixed = [F.relu(linear(torch.cat([look(name, x, y), x], 1), "fc.0")) for name, x, y in both]
        found.append(torch.cat([pool(x) for x in mixed]))
    return verdicts(linear(torch.stack(found), "nlvr2_output"), given["targets"])


HEADS: dict[str, Any] = {
    "mlm": mlm, "mrc": mrc, "mrfr": mrfr, "itm_ot": itm_ot, "itm_rank": itm_rank, "vqa": vqa,
    "nlvr2_paired": nlvr2_paired, "nlvr2_paired_attn": nlvr2_paired_attn,
}  # fmt: skip
