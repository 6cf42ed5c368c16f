"""VLMo: the recorded cases, and a reference of a few lines for those that are not at hand, at several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from standins import GOLDENS, Weights, random_weights, stand_in, verdict
from torch import Tensor
from torch.nn import functional as F

import vlp
from objectives.base import Embed
from scripts.goldens.base import Case

SIZES: list[dict[str, Any]] = [
    {"width": 32, "heads": 4, "layers": 4, "first": 3, "grid": 4, "reach": 20, "length": 12},
    {"width": 24, "heads": 2, "layers": 3, "first": 1, "grid": 3, "reach": 9, "length": 9},
    {"width": 32, "heads": 4, "layers": 4, "first": 3, "grid": 4, "reach": None, "length": 12},  # base+
]
WORDS, PATCH, ROWS = 120, 8, 3


@pytest.mark.parametrize("name", ["vlmo_infer", "vlmo_pretrain"])
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()


def shapes(task: str, width: int, heads: int, layers: int, first: int, grid: int, reach: int | None, length: int):
    """Names and shapes of a file of the authors, trained for ``task``."""
    found: dict[str, tuple[int, ...]] = {"transformer.cls_token": (1, 1, width)}
    if reach is None:
        found["transformer.pos_embed"] = (1, grid**2 + 1, width)
    else:
        found["relative_position_bias_table"] = ((2 * grid - 1) ** 2 + 5 + 2 * reach, heads * layers)
    found |= linear("transformer.patch_embed.proj", (width, 3, PATCH, PATCH)) | norm("transformer.norm", width)
    for n in range(layers):
        block = f"transformer.blocks.{n}."
        kinds = ("text", "imag", "vl") if n >= first and task != "textmlm" else ("text", "imag")
        for kind in kinds:
            found |= norm(f"{block}norm2_{kind}", width) | linear(f"{block}mlp_{kind}.fc1", (2 * width, width))
            found |= linear(f"{block}mlp_{kind}.fc2", (width, 2 * width))
        found |= norm(f"{block}norm1", width) | linear(f"{block}attn.proj", (width, width))
        found |= {f"{block}attn.qkv.weight": (3 * width, width)}
        found |= {f"{block}attn.{bias}": (width,) for bias in ("q_bias", "v_bias")}
        if reach is not None:
            found |= {f"{block}gamma_{k}": (width,) for k in (1, 2)}
    found |= {f"text_embeddings.{name}.weight": (rows, width) for name, rows in {
        "word_embeddings": WORDS, "position_embeddings": length, "token_type_embeddings": 2}.items()}  # fmt: skip
    found |= norm("text_embeddings.LayerNorm", width) | linear("pooler.dense", (width, width))
    found["token_type_embeddings.weight"] = (3 if task == "nlvr2" else 2, width)
    return found | head_shapes(task, width)


def head_shapes(task: str, width: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    if task in ("pretrain", "textmlm"):
        found |= {"mlm_score.bias": (WORDS,), "mlm_score.decoder.weight": (WORDS, width)}
        found |= linear("mlm_score.transform.dense", (width, width)) | norm("mlm_score.transform.LayerNorm", width)
    if task in ("pretrain", "irtr"):
        ways = ("", "vl_") if task == "pretrain" else ("",)
        found |= {f"itc_{way}{side}_proj.fc.weight": (width, width) for way in ways for side in ("text", "image")}
        found |= {f"logit_{way}scale": () for way in ways}
    if task == "pretrain":
        found |= linear("itm_score.fc", (2, width))
    if task in ("vqa", "nlvr2"):
        wide, outputs = (width, 10) if task == "vqa" else (2 * width, 2)
        name = "vqa_classifier" if task == "vqa" else "nlvr2_classifier"
        found |= linear(f"{name}.0", (2 * width, wide)) | norm(f"{name}.1", 2 * width)
        found |= linear(f"{name}.3", (outputs, 2 * width))
    return found


def linear(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


class Reference:
    """VLMo on a mapping of weights, text first and padded to its full length, as the authors run it."""

    def __init__(self, w: Weights, size: Mapping[str, Any]) -> None:
        self.w, self.size, self.eps = w, size, 1e-6

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps or self.eps)

    def text(self, ids: Tensor) -> Tensor:
        w = self.w
        found = w["text_embeddings.word_embeddings.weight"][ids] + w["text_embeddings.token_type_embeddings.weight"][0]
        if self.size["reach"] is None:
            found = found + w["text_embeddings.position_embeddings.weight"]
        return self.norm(found, "text_embeddings.LayerNorm", 1e-12) + w["token_type_embeddings.weight"][0]

    def image(self, pixels: Tensor, kind: int = 1) -> Tensor:
        name = "transformer.patch_embed.proj"
        patches = F.conv2d(pixels, self.w[f"{name}.weight"], self.w[f"{name}.bias"], PATCH).flatten(2).transpose(1, 2)
        found = torch.cat([self.w["transformer.cls_token"].expand(len(pixels), -1, -1), patches], 1)
        found = found + self.w.get("transformer.pos_embed", 0)
        return found + self.w["token_type_embeddings.weight"][kind]

    def bias(self, text: int, image: int) -> Tensor | float:
        """Bias of all blocks' heads, pair by pair as the paper's code numbers them."""
        if self.size["reach"] is None:
            return 0.0
        grid, reach, table = self.size["grid"], self.size["reach"], self.w["relative_position_bias_table"]
        offsets = (2 * grid - 1) ** 2

        def row(query: int, key: int) -> int:
            if query < text and key < text:
                if query == 0 or key == 0:
                    return len(table) - (1 if query == key else 3 if query == 0 else 2)
                return offsets + 5 + key - query + reach - 2
            if query < text:
                return offsets + 3
            if key < text:
                return offsets + 4
            query, key = query - text, key - text
            if query == 0 or key == 0:
                return offsets + (2 if query == key else 0 if query == 0 else 1)
            (y, x), (v, u) = divmod(query - 1, grid), divmod(key - 1, grid)
            return (y - v + grid - 1) * (2 * grid - 1) + x - u + grid - 1

        size = text + image
        return table[torch.tensor([[row(q, k) for k in range(size)] for q in range(size)])].permute(2, 0, 1)

    def run(self, x: Tensor, keep: Tensor, text: int, kind: str = "vl", vl_from: int = 99) -> Tensor:
        """All blocks on [text, image]; ``kind`` of the tokens, which from block ``vl_from`` on is "vl"."""
        heads, bias = self.size["heads"], self.bias(text, x.shape[1] - text)
        for n in range(self.size["layers"]):
            block = f"transformer.blocks.{n}."
            w = self.w
            qkv = F.linear(self.norm(x, f"{block}norm1"), w[f"{block}attn.qkv.weight"])
            qkv = qkv + torch.cat([w[f"{block}attn.q_bias"], torch.zeros(x.shape[2]), w[f"{block}attn.v_bias"]])
            q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in qkv.chunk(3, -1))
            score = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            score = score + (bias[n * heads : (n + 1) * heads] if isinstance(bias, Tensor) else 0.0)
            mixed = score.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1) @ v
            scale, feed_scale = (w.get(f"{block}gamma_{k}", 1.0) for k in (1, 2))
            x = x + scale * self.linear(mixed.transpose(1, 2).flatten(2), f"{block}attn.proj")
            one = "vl" if n >= vl_from else kind
            if one == "vl" and f"{block}mlp_vl.fc1.weight" not in w:
                parts = (self.feed(x[:, :text], block, "text"), self.feed(x[:, text:], block, "imag"))
                x = x + feed_scale * torch.cat(parts, 1)
            else:
                x = x + feed_scale * self.feed(x, block, one)
        return self.norm(x, "transformer.norm")

    def feed(self, x: Tensor, block: str, kind: str) -> Tensor:
        hidden = F.gelu(self.linear(self.norm(x, f"{block}norm2_{kind}"), f"{block}mlp_{kind}.fc1"))
        return self.linear(hidden, f"{block}mlp_{kind}.fc2")

    def fuse(self, ids: Tensor, keep: Tensor, pixels: Tensor, kind: int = 1) -> tuple[Tensor, Tensor]:
        """States [text, image] and the pooled first one."""
        image = self.image(pixels, kind)
        keep = torch.cat([keep, keep.new_ones(image.shape[:2])], 1)
        states = self.run(torch.cat([self.text(ids), image], 1), keep, ids.shape[1])
        return states, torch.tanh(self.linear(states[:, 0], "pooler.dense"))

    def one(self, side: str, ids: Tensor, keep: Tensor, pixels: Tensor, vl: bool = False) -> Tensor:
        vl_from = self.size["first"] if vl else 99
        if side == "text":
            return self.run(self.text(ids), keep, ids.shape[1], "text", vl_from)
        image = self.image(pixels)
        return self.run(image, keep.new_ones(image.shape[:2]), 0, "imag", vl_from)

    def words(self, states: Tensor) -> Tensor:
        hidden = F.gelu(self.linear(states, "mlm_score.transform.dense"))
        hidden = self.norm(hidden, "mlm_score.transform.LayerNorm", 1e-12)
        return self.linear(hidden, "mlm_score.decoder") + self.w["mlm_score.bias"]

    def classify(self, pooled: Tensor, name: str) -> Tensor:
        return self.linear(F.gelu(self.norm(self.linear(pooled, f"{name}.0"), f"{name}.1", 1e-5)), f"{name}.3")


def inputs(task: str, size: Mapping[str, Any]) -> dict[str, Tensor]:
    """Recorded inputs as catalogue.json describes them."""
    generator = torch.Generator().manual_seed(5)
    length, side = size["length"], size["grid"] * PATCH
    ids = torch.randint(104, WORDS, (ROWS, length), generator=generator)
    keep = torch.arange(length)[None] < torch.tensor([length, length - 4, length - 2])[:, None]
    chosen = keep & (torch.rand(ROWS, length, generator=generator) < 0.4)
    chosen[:, 1] = True
    found = {
        "text_ids": ids * keep,
        "text_masks": keep.long(),
        "text_labels": torch.full_like(ids, -100),
        "text_ids_mlm": (ids * keep).masked_fill(chosen, 103),
        "text_labels_mlm": ids.masked_fill(~chosen, -100),
    }
    names = ("image_0.0", "image_1.0") if task == "nlvr2" else ("image.0",)
    found |= {name: torch.randn(ROWS, 3, side, side, generator=generator) for name in names}
    return found | ({"answers": torch.tensor([1, 0, 1])} if task == "nlvr2" else {})


def infer(ref: Reference, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ids, keep, pixels = given["text_ids"], given["text_masks"].bool(), given["image.0"]
    states, pooled = ref.fuse(ids, keep, pixels)
    found = {"text_feats": states[:, : ids.shape[1]], "image_feats": states[:, ids.shape[1] :], "cls_feats": pooled}
    for side in ("text", "image"):
        alone, vl = (ref.one(side, ids, keep, pixels, way) for way in (False, True))
        found[f"{side}_only_feats"] = alone
        found[f"{side}_cls"] = F.normalize(ref.linear(alone[:, 0], f"itc_{side}_proj.fc"), dim=-1)
        found[f"{side}_vl_cls"] = F.normalize(ref.linear(vl[:, 0], f"itc_vl_{side}_proj.fc"), dim=-1)
    return found


def contrast(ref: Reference, given: Mapping[str, Tensor], way: str = "") -> Tensor:
    ids, keep, pixels = given["text_ids"], given["text_masks"].bool(), given["image.0"]
    image, text = (
        F.normalize(ref.linear(ref.one(s, ids, keep, pixels, bool(way))[:, 0], f"itc_{way}{s}_proj.fc"), dim=-1)
        for s in ("image", "text")
    )
    return ref.w[f"logit_{way}scale"].exp() * image @ text.T


def both_ways(logits: Tensor) -> Tensor:
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def pretrain(ref: Reference, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ids, keep, pixels = given["text_ids"], given["text_masks"].bool(), given["image.0"]
    logits, vl = contrast(ref, given), contrast(ref, given, "vl_")
    masked = ref.words(ref.fuse(given["text_ids_mlm"], keep, pixels)[0][:, : ids.shape[1]])
    image, text = given["replay.neg_image_idx"], given["replay.neg_text_idx"]
    triples = ((ids, keep, pixels), (ids, keep, pixels[image]), (ids[text], keep[text], pixels))
    matches = torch.cat([ref.linear(ref.fuse(*one)[1], "itm_score.fc") for one in triples])
    label = torch.tensor([1.0, 0.0, 0.0]).repeat_interleave(ROWS)
    return {
        "mlm_logits": masked,
        "itc_i2t_logits": logits,
        "itm_logits": matches,
        "itm_labels": label,
        "loss_mlm": 0.25 * F.cross_entropy(masked.flatten(0, 1), given["text_labels_mlm"].flatten()),
        "loss_itc": (both_ways(logits) + both_ways(vl)) / 2,
        "loss_itm": F.cross_entropy(matches, label.long()),
    }


def finetuned(task: str, ref: Reference, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ids, keep = given["text_ids"], given["text_masks"].bool()
    if task == "irtr":
        logits = contrast(ref, given)
        labels = torch.arange(ROWS)
        scale = ref.w["logit_scale"].exp()
        return {"irtr_i2t_logits": logits, "irtr_t2i_logits": logits.T, "irtr_labels": labels,
                "irtr_logit_scale": scale, "loss_irtr": both_ways(logits)}  # fmt: skip
    if task == "textmlm":
        logits = ref.words(ref.one("text", given["text_ids_mlm"], keep, ids))
        loss = F.cross_entropy(logits.flatten(0, 1), given["text_labels_mlm"].flatten())
        return {"mlm_logits": logits, "mlm_labels": given["text_labels_mlm"], "mlm_ids": given["text_ids_mlm"],
                "loss_mlm": loss}  # fmt: skip
    if task == "vqa":
        logits = ref.classify(ref.fuse(ids, keep, given["image.0"])[1], "vqa_classifier")
        target = torch.linspace(0, 1, 10 * ROWS).view(ROWS, 10).round(decimals=1)
        loss = F.binary_cross_entropy_with_logits(logits, target) * 10
        return {"vqa_logits": logits, "vqa_targets": target, "loss_vqa": loss}
    pooled = [ref.fuse(ids, keep, given[f"image_{i}.0"], i + 1)[1] for i in range(2)]
    logits = ref.classify(torch.cat(pooled, -1), "nlvr2_classifier")
    return {"nlvr2_logits": logits, "nlvr2_labels": given["answers"],
            "loss_nlvr2": F.cross_entropy(logits, given["answers"])}  # fmt: skip


def config_of(task: str, size: Mapping[str, Any]) -> dict[str, Any]:
    """As the authors' configuration says it; heads are not in it."""
    found = {"loss_names": {}, "vocab_size": WORDS, "max_text_len": size["length"], "image_size": size["grid"] * PATCH}
    reach = {} if size["reach"] is None else {"max_text_len_of_initckpt": size["reach"]}
    return found | reach | {"model_arch": "vlmo_tiny"}


@pytest.mark.parametrize("size", SIZES, ids=["base", "other", "plus"])
@pytest.mark.parametrize("task", ["infer", "pretrain", "textmlm", "irtr", "vqa", "nlvr2"])
def test_stand_in(tmp_path, task: str, size: dict[str, Any]) -> None:
    stored = "pretrain" if task == "infer" else task
    weights: Weights = random_weights(shapes(stored, **size))
    weights["text_embeddings.position_ids"] = torch.arange(size["length"])[None]
    given = inputs(task, size)
    if task == "pretrain":
        given |= {"replay.neg_image_idx": torch.tensor([1, 2, 0]), "replay.neg_text_idx": torch.tensor([2, 0, 1])}

    def outputs(leaves: Weights) -> Mapping[str, Tensor]:
        ref = Reference(leaves, size)
        one = {"infer": infer, "pretrain": pretrain}.get(task)
        return one(ref, given) if one else finetuned(task, ref, given)

    name = "vlmo_plus_infer" if task == "infer" and size["reach"] is None else f"vlmo_{task}"
    case = stand_in(tmp_path / name, weights, given, outputs, config_of(task, size), file="model.pt", key="state_dict")
    found = verdict(case)
    assert found.passed, found.line()


def test_a_deepspeed_file_of_another_image_size_loads(tmp_path) -> None:
    """Weights under ``module``, index tables of older files, absolute and relative positions for a larger image."""
    for size in SIZES[::2]:
        weights = {f"module.{n}": t for n, t in random_weights(shapes("irtr", **size)).items()}
        weights["module.relative_position_index"] = torch.zeros(17, 17)
        path = tmp_path / f"mp_rank_{size['reach']}.pt"
        torch.save({"module": weights}, path)
        more = {"model": {"vision": {"image_size": 48}}, "data": {"transform": {"image_size": 48}}}
        loaded = vlp.load(path, config=config_of("irtr", size), settings=more)
        assert len(loaded.report.resized) == 1 and not loaded.report.missing
        assert loaded.model.vision.num_tokens == 37
        assert loaded.model.space() is not None and Embed("image") in loaded.model.needs()


def test_a_file_that_does_not_fit_its_reach_says_so(tmp_path) -> None:
    torch.save({"state_dict": random_weights(shapes("irtr", **SIZES[0]))}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="max_text_len_of_initckpt"):
        vlp.load(tmp_path / "model.pt")
