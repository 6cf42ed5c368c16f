"""BEiT-3: the recorded cases, and a reference of a few lines for those that are not at hand, at several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import tokenizer
from PIL import Image
from standins import GOLDENS, Weights, random_weights, stand_in, verdict
from torch import Tensor
from torch.nn import functional as F

import vlp
from encoders.types import Images, Vocabulary
from scripts.goldens.base import Case
from vlp.generate import GenerationConfig
from vlp.generate_masked import generate_masked

SIZES: list[dict[str, int]] = [
    {"width": 32, "heads": 4, "layers": 3, "grid": 4, "reach": 64, "length": 12},
    {"width": 24, "heads": 3, "layers": 2, "grid": 3, "reach": 20, "length": 9},
]
WORDS, PATCH, ROWS = 120, 8, 3
CLS, PAD, EOS, MASK = 0, 1, 2, 118
SPECIAL = Vocabulary(size=WORDS, pad=PAD, cls=CLS, sep=EOS, mask=MASK, bos=CLS, eos=EOS)
PARTS = {"image": "A", "text": "B"}


@pytest.mark.parametrize("name", ["beit3_vqa", "beit3_retrieval"])
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()


def shapes(task: str, width: int, heads: int, layers: int, grid: int, reach: int, length: int):
    """Names and shapes of a file of the authors, trained for ``task``."""
    found: dict[str, tuple[int, ...]] = {
        "beit3.text_embed.weight": (WORDS, width),
        "beit3.vision_embed.mask_token": (1, 1, width),
        "beit3.vision_embed.cls_token": (1, 1, width),
        "beit3.encoder.embed_positions.A.weight": (grid**2 + 3, width),
        "beit3.encoder.embed_positions.B.weight": (reach, width),
    }
    found |= linear("beit3.vision_embed.proj", width, 3, PATCH, PATCH)
    for n in range(layers):
        layer = f"beit3.encoder.layers.{n}."
        for way in "AB":
            for one in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found |= linear(f"{layer}self_attn.{one}.{way}", width, width)
            for one in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                found |= linear(f"{layer}{one}.{way}", width)
            found |= linear(f"{layer}ffn.{way}.fc1", 2 * width, width) | linear(
                f"{layer}ffn.{way}.fc2", width, 2 * width
            )
            found |= linear(f"{layer}ffn.{way}.ffn_layernorm", 2 * width)
    if task not in ("vqa", "imagecls"):
        found |= linear("beit3.encoder.layer_norm.A", width) | linear("beit3.encoder.layer_norm.B", width)
    return found | head_shapes(task, width)


def head_shapes(task: str, width: int) -> dict[str, tuple[int, ...]]:
    if task == "vqa":
        found = linear("pooler.norm", width) | linear("pooler.dense", width, width) | linear("head.1", 2 * width)
        return found | linear("head.0", 2 * width, width) | linear("head.3", 10, 2 * width)
    if task == "nlvr2":
        found = linear("head.norm1", 4 * width) | linear("head.dense1", 2 * width, 4 * width)
        return found | linear("head.norm2", 2 * width) | linear("head.dense2", 2, 2 * width)
    if task == "imagecls":
        return linear("fc_norm", width) | linear("head", 10, width)
    if task == "retrieval":
        return {"logit_scale": (), "language_head.weight": (width, width), "vision_head.weight": (width, width)}
    found = linear("mlm_head", WORDS, width)
    return found | linear("mim_head", 8192, width) if task == "pretrain" else found


def linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


class Reference:
    """BEiT-3 on a mapping of weights; each modality's tokens are kept apart but in attention's softmax."""

    def __init__(self, w: Weights, size: Mapping[str, int]) -> None:
        self.w, self.size = w, size

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def image(self, pixels: Tensor) -> Tensor:
        name = "beit3.vision_embed.proj"
        patches = F.conv2d(pixels, self.w[f"{name}.weight"], self.w[f"{name}.bias"], PATCH).flatten(2).transpose(1, 2)
        found = torch.cat([self.w["beit3.vision_embed.cls_token"].expand(len(pixels), -1, -1), patches], 1)
        return found + self.w["beit3.encoder.embed_positions.A.weight"][2:]

    def text(self, ids: Tensor) -> Tensor:
        positions = self.w["beit3.encoder.embed_positions.B.weight"][2 : 2 + ids.shape[1]]
        return self.w["beit3.text_embed.weight"][ids] + positions

    def run(self, parts: dict[str, Tensor], seen: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Final states of each part, and all states after each layer; ``seen`` [M, S, S]."""
        sizes, every = [x.shape[1] for x in parts.values()], []
        for n in range(self.size["layers"]):
            layer = f"beit3.encoder.layers.{n}."
            heads: list[Tensor] = []
            for one in ("q_proj", "k_proj", "v_proj"):
                found = [self.linear(self.norm(x, f"{layer}self_attn_layer_norm.{PARTS[m]}"),
                                     f"{layer}self_attn.{one}.{PARTS[m]}") for m, x in parts.items()]  # fmt: skip
                heads.append(torch.cat(found, 1).unflatten(-1, (self.size["heads"], -1)).transpose(1, 2))
            q, k, v = heads
            score = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~seen[:, None], -torch.inf)
            mixed = (score.softmax(-1) @ v).transpose(1, 2).flatten(2).split(sizes, 1)
            for (m, x), own in zip(list(parts.items()), mixed, strict=True):
                way = PARTS[m]
                own = self.norm(own, f"{layer}self_attn.inner_attn_ln.{way}")
                x = x + self.linear(own, f"{layer}self_attn.out_proj.{way}")
                hidden = F.gelu(self.linear(self.norm(x, f"{layer}final_layer_norm.{way}"), f"{layer}ffn.{way}.fc1"))
                hidden = self.norm(hidden, f"{layer}ffn.{way}.ffn_layernorm")
                parts = parts | {m: x + self.linear(hidden, f"{layer}ffn.{way}.fc2")}
            every.append(torch.cat(list(parts.values()), 1))
        if "beit3.encoder.layer_norm.A.weight" in self.w:
            parts = {m: self.norm(x, f"beit3.encoder.layer_norm.{PARTS[m]}") for m, x in parts.items()}
        return parts, every

    def fuse(self, pixels: Tensor, ids: Tensor, keep: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
        """Image and text states; causal: the image sees itself, a word the image and the words before."""
        image, text = self.image(pixels), self.text(ids)
        images, size = image.shape[1], image.shape[1] + ids.shape[1]
        seen = torch.cat([keep.new_ones(len(keep), images), keep], 1)[:, None].expand(-1, size, -1)
        if causal:
            at = torch.arange(size)
            seen = seen & ((at[None] <= at[:, None]) | (at[None] < images))
        found, _ = self.run({"image": image, "text": text}, seen)
        return found["image"], found["text"]

    def alone(self, side: str, x: Tensor, keep: Tensor | None = None) -> Tensor:
        keep = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        return self.run({side: x}, keep[:, None].expand(-1, x.shape[1], -1))[0][side]


def inputs(size: Mapping[str, int]) -> dict[str, Tensor]:
    """All kinds of recorded inputs; a case takes its own."""
    generator = torch.Generator().manual_seed(5)
    length, side = size["length"], size["grid"] * PATCH
    ids = torch.randint(4, 117, (ROWS, length), generator=generator)
    real = torch.tensor([length, length - 4, length - 2])
    keep = torch.arange(length)[None] < real[:, None]
    ids[:, 0] = CLS
    ids[torch.arange(ROWS), real - 1] = EOS
    ids = ids.masked_fill(~keep, PAD)
    chosen = keep & (torch.rand(ROWS, length, generator=generator) < 0.4)
    chosen[:, 0], chosen[:, 1:3] = False, True
    images = {name: torch.randn(ROWS, 3, side, side, generator=generator) for name in ("image", "image_a", "image_b")}
    return images | {
        "text": ids,
        "question": ids,
        "text_ids": ids,
        "masked_ids": ids.masked_fill(chosen, MASK),
        "language_masked_pos": chosen.long(),
        "padding_mask": (~keep).long(),
        "labels": torch.tensor([1, 0, 1]),
    }


TAKES = {
    "vqa": ("image", "question", "padding_mask", "labels"),
    "retrieval": ("image", "text", "padding_mask"),
    "nlvr2": ("image_a", "image_b", "text", "padding_mask", "labels"),
    "imagecls": ("image", "labels"),
    "captioning": ("image", "text_ids", "masked_ids", "language_masked_pos", "padding_mask"),
}


def outputs(task: str, ref: Reference, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    keep = given["padding_mask"] == 0 if "padding_mask" in given else torch.ones(1)
    if task == "vqa":
        image, text = ref.fuse(given["image"], given["question"], keep)
        pooled = torch.tanh(ref.linear(ref.norm(image[:, 0], "pooler.norm"), "pooler.dense"))
        logits = ref.linear(F.gelu(ref.norm(ref.linear(pooled, "head.0"), "head.1")), "head.3")
        parts = {"image": ref.image(given["image"]), "text": ref.text(given["question"])}
        seen = torch.cat([keep.new_ones(ROWS, image.shape[1]), keep], 1)[:, None].expand(
            -1, image.shape[1] + len(keep[0]), -1
        )
        layers = {f"layer.{n}": x for n, x in enumerate(ref.run(parts, seen)[1])}
        return {"logits": logits, "loss": F.binary_cross_entropy_with_logits(logits, given["labels"]) * 10} | layers
    if task == "retrieval":
        image = F.normalize(ref.linear(ref.alone("image", ref.image(given["image"]))[:, 0], "vision_head"), dim=-1)
        text = ref.alone("text", ref.text(given["text"]), keep)
        text = F.normalize(ref.linear(text[:, 0], "language_head"), dim=-1)
        logits, own = ref.w["logit_scale"].exp() * image @ text.T, torch.arange(ROWS)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return {"vision_cls": image, "language_cls": text, "loss": loss}
    if task == "imagecls":
        image = ref.alone("image", ref.image(given["image"]))
        logits = ref.linear(ref.norm(image[:, 1:].mean(1), "fc_norm"), "head")
        return {"logits": logits, "loss": F.cross_entropy(logits, given["labels"])}
    if task == "nlvr2":
        first = [torch.cat([x[:, 0] for x in ref.fuse(given[f"image_{i}"], given["text"], keep)], -1) for i in "ab"]
        hidden = ref.linear(ref.norm(torch.cat(first, -1), "head.norm1"), "head.dense1")
        logits = ref.linear(F.gelu(ref.norm(hidden, "head.norm2")), "head.dense2")
        return {"logits": logits, "loss": F.cross_entropy(logits, given["labels"])}
    return captioning(ref, given, keep)


def captioning(ref: Reference, given: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    masked = given["language_masked_pos"].bool()
    logits = ref.linear(ref.fuse(given["image"], given["masked_ids"], keep, causal=True)[1], "mlm_head")
    target = torch.full((int(masked.sum()), WORDS), 0.1 / (WORDS - 1))
    target.scatter_(1, given["text_ids"][masked][:, None], 0.9)
    losses = F.kl_div(logits[masked].log_softmax(1), target, reduction="none").sum(1)
    best = losses.topk(int(len(losses) * 0.8), largest=False).values
    with torch.no_grad():
        ids = torch.tensor([beam(ref, one[None]) for one in given["image"]])
    return {"logits_masked": logits[masked], "logits_all": logits, "aux_loss_drop_worst": best.mean(),
            "beam3_ids": ids, "loss": losses.mean()}  # fmt: skip


def beam(ref: Reference, pixels: Tensor, beams: int = 3, most: int = 8, penalty: float = 0.6) -> list[int]:
    """One caption as OSCAR and BEiT-3 search it; the text so far ends with a mask, which stays in what it returns."""
    running, ended = [(0.0, [CLS])], [(-1e9, [CLS])]
    for length in range(2, most):
        found = []
        for score, words in running:
            ids = torch.tensor([[*words, MASK]])
            states = ref.fuse(pixels, ids, torch.ones_like(ids, dtype=torch.bool), causal=True)[1]
            logp = ref.linear(states[0, -1], "mlm_head").log_softmax(0)
            found += [(score + float(logp[word]), words, word) for word in range(WORDS)]
        running = []
        for score, words, word in sorted(found, key=lambda one: -one[0])[: 3 * beams]:
            if word == EOS or length + 1 == most:
                ended.append((score / length**penalty, [*words, MASK]))
            else:
                running.append((score, [*words, word]))
            if len(running) == beams:
                break
    best = [*max(ended, key=lambda one: one[0])[1], EOS]
    return best + [PAD] * (most - len(best))


def config_of(size: Mapping[str, int], task: str) -> dict[str, Any]:
    return {
        "img_size": size["grid"] * PATCH,
        "patch_size": PATCH,
        "encoder_embed_dim": size["width"],
        "encoder_attention_heads": size["heads"],
        "encoder_layers": size["layers"],
        "layernorm_eps": 1e-5,
        "normalize_output": task not in ("vqa", "imagecls"),
    }


@pytest.mark.parametrize("size", SIZES, ids=["base", "other"])
@pytest.mark.parametrize("task", TAKES)
def test_stand_in(tmp_path, task: str, size: dict[str, int]) -> None:
    given = {name: inputs(size)[name] for name in TAKES[task]}
    if task == "vqa":
        given["labels"] = torch.linspace(0, 1, 10 * ROWS).view(ROWS, 10).round(decimals=1)
    case = stand_in(
        tmp_path / f"beit3_{task}",
        random_weights(shapes(task, **size)),
        given,
        lambda leaves: outputs(task, Reference(leaves, size), given),
        config_of(size, task),
        file="model.pth",
        key="model",
    )
    found = verdict(case)
    assert found.passed, found.line()


@pytest.mark.parametrize("seed", range(4))
def test_captions_of_all_lengths(tmp_path, seed: int) -> None:
    """Texts that end early, at different places, under both kinds of length penalty."""
    weights = random_weights(shapes("captioning", **SIZES[1]), seed)
    weights["mlm_head.bias"][EOS] += 1.5 + 0.5 * seed
    torch.save({"model": weights}, tmp_path / "beit3.pth")
    model = vlp.load(tmp_path / "beit3.pth", config=config_of(SIZES[1], "captioning")).model
    pixels, ref = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(seed)), Reference(weights, SIZES[1])
    for penalty in (0.6, 2.0):
        config = GenerationConfig(method="beam", beams=3, length_penalty=penalty, score_length="whole", max_length=7)
        found = generate_masked(model, Images(pixels), SPECIAL, config).ids.tolist()
        wanted = [beam(ref, one[None], penalty=penalty) for one in pixels]
        for text, theirs in zip(found, wanted, strict=True):
            end = text.index(EOS) if EOS in text else 6  # theirs have a mask there, also in place of the last word
            assert [*text[:end], MASK, EOS] == theirs[: end + 2]


def load(tmp_path, task: str, **settings: Any) -> vlp.Loaded:
    size = SIZES[0]
    torch.save({"model": random_weights(shapes(task, **size))}, tmp_path / "beit3.pth")
    return vlp.load(tmp_path / "beit3.pth", config=config_of(size, task), settings=settings or None)


def test_pretrained_files_name_what_they_leave_out(tmp_path) -> None:
    loaded = load(tmp_path, "pretrain")
    assert set(loaded.model.objectives) == {"mlm"} and not loaded.report.missing
    assert sorted(one.split(" ")[0] for one in loaded.report.ignored) == [
        "beit3.vision_embed.mask_token", "mim_head.bias", "mim_head.weight"]  # fmt: skip


def test_towers_alone_load(tmp_path) -> None:
    weights = {n: t for n, t in random_weights(shapes("pretrain", **SIZES[0])).items() if n.startswith("beit3.")}
    torch.save({"model": weights}, tmp_path / "beit3.pth")
    loaded = vlp.load(tmp_path / "beit3.pth")
    assert not loaded.model.objectives
    assert any("encoder_attention_heads" in note for note in loaded.report.notes)


def test_positions_follow_the_image_size(tmp_path) -> None:
    loaded = load(tmp_path, "retrieval", model={"vision": {"image_size": 48}})
    stored = random_weights(shapes("retrieval", **SIZES[0]))["beit3.encoder.embed_positions.A.weight"]
    grid = stored[3:].unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    wanted = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).flatten(0, 1)
    torch.testing.assert_close(loaded.model.vision.vit.pos_embed[0], torch.cat([stored[2:3], wanted]))


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_a_caption_is_the_same_without_a_cache(tmp_path, method: str) -> None:
    model = load(tmp_path, "captioning").model
    images = Images(inputs(SIZES[0])["image"])
    config = GenerationConfig(method=method, max_length=10)
    once, again = (generate_masked(model, images, SPECIAL, config, use_cache) for use_cache in (True, False))
    assert torch.equal(once.ids, again.ids)
    torch.testing.assert_close(once.scores, again.scores)


def test_a_captioning_checkpoint_captions(tmp_path) -> None:
    own = tokenizer()
    loaded = replace(load(tmp_path, "captioning"), words=own)
    loaded.model.objectives["seq2seq_mlm"].head.bias.data[own.vocabulary.size :] = -1e4  # words that it has not
    images = [Image.new("RGB", (40, 30), (200, shade, 20)) for shade in (0, 250)]
    how = {"method": "beam", "score_length": "whole", "length_penalty": 0.6, "max_length": 8}
    texts = loaded.caption(images, **how)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    assert loaded.caption(images[1:], **how) == texts[1:]
    with pytest.raises(ValueError, match="cannot write captions"):
        load(tmp_path, "vqa").caption(images)
