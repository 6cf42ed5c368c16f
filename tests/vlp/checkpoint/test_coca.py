"""open_clip's CoCa: the recorded case, and models built here at random sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from standins import GOLDENS, verdict
from torch.nn import functional as F
from two_towers import WORDS, randomise, write_case

import vlp
from encoders.types import Batch, Images, Texts
from objectives.base import Decode, Embed, Encode
from scripts.goldens.base import Case
from vlp.generate import DecoderStepper, GenerationConfig, generate, writer_of

SIZES: list[dict[str, Any]] = [
    {},
    {"quick_gelu": True, "text": {"width": 32, "heads": 8}, "multimodal": {"width": 32, "layers": 3}},
    {"vision": {"width": 24, "attn_pooler_queries": 5, "layers": 2}, "multimodal": {"heads": 2, "mlp_ratio": 3.0}},
    {"vision": {"image_size": 48, "patch_size": 16, "attn_pooler_heads": 2}, "correct": True},
    {"vision": {"width": 24, "attentional_pool": "parallel"}},
    {"vision": {"width": 24, "attentional_pool": "cascade"}},
]


def config(sizes: dict[str, Any]) -> dict[str, Any]:
    """open_clip_config.json."""
    width = sizes.get("text", {}).get("width", 24)
    stack = {"context_length": 11, "vocab_size": WORDS, "width": width, "heads": 4}
    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}
    vision |= {"attentional_pool": True, "attn_pooler_queries": 8, "attn_pooler_heads": 4, "output_tokens": True}
    model = {
        "embed_dim": width,
        "multimodal_cfg": stack | {"layers": 2, "mlp_ratio": 2.0, "attn_pooler_heads": 4} | sizes.get("multimodal", {}),
        "text_cfg": stack | {"layers": 3, "mlp_ratio": 2.0, "embed_cls": True, "output_tokens": True},
        "vision_cfg": vision | sizes.get("vision", {}),
    }
    model["text_cfg"] |= sizes.get("text", {})
    return model | ({"quick_gelu": True} if sizes.get("quick_gelu") else {})


def build(sizes: dict[str, Any], seed: int) -> tuple[Any, dict[str, Any]]:
    """A model with noise for weights, and its configuration."""
    found = config(sizes)
    model: Any = randomise(open_clip.CoCa(**found), seed)
    if sizes.get("correct"):
        model.text.correct_cls_mask = True
        found["text_cfg"]["correct_cls_mask"] = True
    return model, {"model_cfg": found}


def texts(seed: int) -> torch.Tensor:
    """Texts that fill the context, and shorter ones."""
    ids = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 97
    for row, last in enumerate((10, 6, 8)):
        ids[row, last], ids[row, last + 1 :] = 98, 0
    return ids


@pytest.mark.parametrize("name", ["openclip_coca"])
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()


def write(model: Any, said: dict[str, Any], folder: Path, seed: int) -> Case:
    side = said["model_cfg"]["vision_cfg"]["image_size"]
    given = {"text": texts(seed), "image": torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(seed))}
    found = model(**given)
    outputs = {name: found[name] for name in ("image_features", "text_features", "logits", "labels", "logit_scale")}
    outputs["image_features"] = outputs["image_features"].reshape(3, -1)  # [B, 1, E] with a query of its own
    contrast, caption = open_clip.loss.CoCaLoss(2.0, 1.0)(**(outputs | {"logits": found["logits"]}))
    outputs |= {"loss_contrastive": contrast, "loss_caption": caption, "loss": contrast + caption}
    case = write_case(folder, given, outputs, contrast + caption, model)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    return case


@pytest.mark.parametrize("seed", range(len(SIZES)))
def test_random(seed: int, tmp_path: Path) -> None:
    case = write(*build(SIZES[seed], seed), tmp_path / "openclip_coca", seed)
    found = verdict(case)
    assert found.passed, found.line()
    assert found.gradients > 100


@pytest.mark.parametrize("correct", [False, True])
def test_padding_changes_nothing(correct: bool, tmp_path: Path) -> None:
    """The token stands at its own place however far a batch is padded, and sees the same."""
    model, said = build({"correct": correct}, 0)
    write(model, said, tmp_path / "openclip_coca", 0)
    ours = vlp.load(tmp_path / "openclip_coca").model
    ids = texts(0)[1:]
    wanted = model.encode_text(ids)
    for length in (9, 10, 11):
        short = ids[:, :length]
        found = ours.run([Embed("text")], Batch(texts={"clean": Texts(short, short != 0)}))[Embed("text")]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def likeliest(model: Any, pixels: torch.Tensor, least: int, most: int) -> torch.Tensor:
    """What open_clip writes with top_k 1; its own loop wants an older transformers."""
    ids = torch.full((len(pixels), 1), 97)
    while ids.shape[1] < most:
        logits = model(pixels, ids, output_labels=False)["logits"][:, -1]
        if ids.shape[1] < least:
            logits[:, 98] = -torch.inf
        word = torch.full_like(ids[:, 0], 98) if ids.shape[1] + 1 == most else logits.argmax(1)
        word = torch.where((ids[:, -1] == 98) | (ids[:, -1] == 0), 0, word)
        ids = torch.cat([ids, word[:, None]], 1)
    return ids


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_writing_step_by_step(method: Any, tmp_path: Path) -> None:
    """With the keys of both halves remembered, and reading everything again: the same; greedily as open_clip does."""
    model, said = build({}, 1)
    write(model, said, tmp_path / "openclip_coca", 1)
    ours = vlp.load(tmp_path / "openclip_coca").model
    pixels = torch.randn(3, 3, 32, 32)
    memory = ours.run([Encode("image")], Batch({"clean": Images(pixels)}))[Encode("image")]
    decoder, writer = writer_of(ours, None)
    prompt = torch.full((3, 1), 97)
    settings = GenerationConfig(method=method, min_length=4, max_length=9, force_end=method == "greedy")
    found = []
    for cached in (True, False):
        stepper = DecoderStepper(decoder, writer.head, memory, use_cache=cached)
        found.append(generate(stepper, prompt, settings, eos=98, pad=0).ids)
    assert torch.equal(*found)
    if method == "greedy":
        assert torch.equal(found[0], likeliest(model, pixels, least=4, most=9))


def test_captions_do_not_see_the_future(tmp_path: Path) -> None:
    model, said = build({}, 2)
    write(model, said, tmp_path / "openclip_coca", 2)
    ours = vlp.load(tmp_path / "openclip_coca").model
    ids = texts(2)[:1]
    other = ids.clone()
    other[0, 6] = 5
    written = Decode(Encode("image"), "clean")
    images = {"clean": Images(torch.randn(1, 3, 32, 32))}
    left, right = (
        ours.run([written], Batch(images, {"clean": Texts(x, x != 0)}))[written].states for x in (ids, other)
    )
    assert torch.equal(left[:, :6], right[:, :6]) and not torch.allclose(left[:, 6:], right[:, 6:])


def test_a_text_tower_that_sees_the_future_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.decoder\.kind multimodal goes on from the text encoder"):
        model, said = build({}, 0)
        write(model, said, tmp_path / "openclip_coca", 0)
        vlp.load(tmp_path / "openclip_coca", settings={"model": {"text": {"causal": False, "pool": "cls"}}})


def test_queries_take_the_place_of_patches(tmp_path: Path) -> None:
    """Other images, other tokens; pooled and tokens are as wide as the queries."""
    model, said = build(SIZES[2], 0)
    write(model, said, tmp_path / "openclip_coca", 0)
    ours = vlp.load(tmp_path / "openclip_coca").model
    tokens = ours.run([Encode("image")], Batch({"clean": Images(torch.randn(2, 3, 32, 32))}))[Encode("image")]
    assert tokens.states.shape == (2, 4, 24) and tokens.pooled.shape == (2, 24)
    embed = ours.run([Embed("image")], Batch({"clean": Images(torch.randn(2, 3, 32, 32))}))[Embed("image")]
    torch.testing.assert_close(embed, F.normalize(embed, dim=-1))
