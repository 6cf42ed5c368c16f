"""`vlp convert`: what leaves here is read by transformers and open_clip themselves, and gives the same numbers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from checkpoints import CAPTIONS, save, tokenizer
from helpers import tiny_model
from PIL import Image
from standins import GOLDENS
from test_hf_clip import CLIP_SIZES, text_config, vision_config
from test_open_clip import MODELS, TEXT, build, model_config
from test_open_clip import save as save_open_clip
from torch import Tensor
from two_towers import randomise, texts

import vlp
from encoders import PatchConfig, TextConfig
from encoders.types import Batch, Images, Texts
from objectives import ItcConfig, MlmConfig
from objectives.base import Embed
from vlp.checkpoint.export import convert
from vlp.cli.dispatch import main
from vlp.fusion import NoFusionConfig
from vlp.model import EmbedConfig, ModelConfig, build_model


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published tokenizers are not looked for, which takes minutes where there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def inputs(side: int = 32, length: int = 12, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Pixels and ids without padding, which every library reads alike."""
    ids, _ = texts(rows, length, pad=0, end=98, full=True)
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(0)), ids


def embeds(model: Any, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What our model says."""
    batch = Batch({"clean": Images(pixels)}, {"clean": Texts(ids, torch.ones_like(ids, dtype=torch.bool))})
    with torch.no_grad():
        results = model.run([Embed("image"), Embed("text")], batch)
    return results[Embed("image")], results[Embed("text")]


def read_hf(folder: Path, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers says of a folder: embeds and logits."""
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found = model.eval()(pixel_values=pixels, input_ids=ids)
    return found.image_embeds, found.text_embeds, found.logits_per_image


def read_open_clip(folder: Path, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What open_clip says of a folder."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        logits, _ = model.get_logits(pixels, ids)
        return model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True), logits


READERS = {"hf": read_hf, "open_clip": read_open_clip}


def check(loaded: vlp.Loaded, folder: Path, to: str, pixels: Tensor, ids: Tensor) -> None:
    """Export, let the other library read it, load it back."""
    convert(loaded, folder, to)
    image, text = embeds(loaded.model, pixels, ids)
    space = loaded.model.space()
    with torch.no_grad():
        logits = space.logits(image, text)
    for found, wanted in zip(READERS[to](folder, pixels, ids), (image, text, logits), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    again = vlp.load(folder)
    assert not again.report.missing and not again.report.unexpected
    for found, wanted in zip(embeds(again.model, pixels, ids), (image, text), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    # Of two pixels in the middle transformers takes the upper left one; no padding is filled here.
    before, after = loaded.config.data.transform, again.config.data.transform
    assert after.model_copy(update={"crop": before.crop, "fill": before.fill}) == before
    assert again.model.config.vision.mean == loaded.model.config.vision.mean


@pytest.mark.parametrize("to", ["hf", "open_clip"])
@pytest.mark.parametrize("seed", range(len(CLIP_SIZES)))
def test_clip_of_transformers(seed: int, to: str, tmp_path: Path) -> None:
    sizes = CLIP_SIZES[seed]
    config = transformers.CLIPConfig(
        text_config=text_config(**sizes["text"]),
        vision_config=vision_config(**sizes["vision"]), projection_dim=16,
    )  # fmt: skip
    randomise(transformers.CLIPModel(config), seed).save_pretrained(tmp_path / "in")
    length = config.text_config.max_position_embeddings
    check(vlp.load(tmp_path / "in"), tmp_path / "out", to, *inputs(config.vision_config.image_size, length))


@pytest.mark.parametrize("to", ["hf", "open_clip"])
@pytest.mark.parametrize("name", ["gelu", "quick", "epsilon", "eos"])
def test_clip_of_open_clip(name: str, to: str, tmp_path: Path) -> None:
    config = model_config(name)
    save_open_clip(tmp_path / "in", build(config), config)
    check(vlp.load(tmp_path / "in"), tmp_path / "out", to, *inputs(config["vision_cfg"]["image_size"]))


@pytest.mark.parametrize("name", ["scaled", "first", "custom", "siglip", "tanh", "timm"])
def test_other_models_of_open_clip(name: str, tmp_path: Path) -> None:
    config = model_config(name)
    assert name in MODELS
    save_open_clip(tmp_path / "in", build(config), config)
    check(vlp.load(tmp_path / "in"), tmp_path / "out", "open_clip", *inputs(config["vision_cfg"]["image_size"]))


def test_siglip_of_transformers(tmp_path: Path) -> None:
    text = text_config(hidden_act="gelu_pytorch_tanh", max_position_embeddings=12, hidden_size=32, projection_size=32)
    vision = vision_config(hidden_act="gelu_pytorch_tanh")
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    randomise(transformers.SiglipModel(config), 0).save_pretrained(tmp_path / "in")
    loaded = vlp.load(tmp_path / "in")
    check(loaded, tmp_path / "out", "hf", *inputs())
    with pytest.raises(ValueError, match="image tower is timm's vit_base_patch16_siglip_224 with another arguments"):
        convert(loaded, tmp_path / "other", "open_clip")
    assert not (tmp_path / "other").exists()


@timm.models.register_model
def vit_tests_siglip(pretrained: bool = False, **given: Any) -> Any:
    """A tiny SigLIP tower under a name that timm knows."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
    sizes |= {"class_token": False, "global_pool": "map"}
    return timm.models.vision_transformer._create_vision_transformer("vit_tests_siglip", **{**sizes, **given})


def test_siglip_of_open_clip(tmp_path: Path) -> None:
    text = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    vision = {"timm_model_name": "vit_tests_siglip", "timm_pool": "map", "timm_proj": "none", "image_size": 32}
    config = {"embed_dim": 24, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    save_open_clip(tmp_path / "in", build(config), config)
    check(vlp.load(tmp_path / "in"), tmp_path / "out", "open_clip", *inputs())


def own_clip(**text: Any) -> Any:
    """A model as our own CLIP recipe trains it, with a head that no CLIP format has."""
    stack = {"width": 32, "layers": 2, "heads": 4, "norm": "pre", "activation": "quick_gelu", "eps": 1e-5}
    config = ModelConfig(
        vision=PatchConfig(model="vit_base_patch32_clip_quickgelu_224", image_size=32, patch_size=8, width=32, depth=2,
                           heads=4),
        text=TextConfig(**stack, vocabulary_size=tokenizer().vocabulary.size, max_length=8, segments=0,
                        embed_norm=False, **{"causal": True, "pool": "last", **text}),
        fusion=NoFusionConfig(), embed=EmbedConfig(width=16, bias=False),
    )  # fmt: skip
    return build_model(config, {"itc": ItcConfig(), "mlm": MlmConfig()} if not text else {"itc": ItcConfig()})


@pytest.mark.parametrize("to", ["hf", "open_clip"])
def test_a_model_of_ours(to: str, tmp_path: Path) -> None:
    """With its own tokenizer, whose end of text the format is told, and its preprocessing."""
    save(tmp_path / "in", own_clip())
    loaded = vlp.load(tmp_path / "in")
    left = convert(loaded, tmp_path / "out", to)
    weights = [name for name in left if not name.startswith("data.")]
    assert weights and all(name.startswith("objectives.mlm.") for name in weights)
    assert "data.transform.resampler torch (it has pillow)" in left
    words = list(CAPTIONS)[:3]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    wanted = loaded.embed_images([image]), loaded.embed_texts(words)
    if to == "hf":
        model = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
        processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", use_fast=False)
        given = processor(text=words, images=[image], padding=True, return_tensors="pt")
        with torch.no_grad():
            found = model(input_ids=given["input_ids"], pixel_values=given["pixel_values"],
                          attention_mask=given["attention_mask"])  # fmt: skip
        found = found.image_embeds, found.text_embeds
    else:
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
        ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(words)
        with torch.no_grad():
            found = (
                model.eval().encode_image(preprocess(image)[None], normalize=True),
                model.encode_text(ids, normalize=True),
            )
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], wanted[0], rtol=0.05, atol=0.02)  # torch's resampler against Pillow's


@pytest.mark.parametrize(("name", "to"), [("hf_clip", "open_clip"), ("openclip_vit_quickgelu", "hf")])
def test_the_command(name: str, to: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["convert", str(GOLDENS / name), str(tmp_path / "out"), "--to", to]) == 0
    before, after = vlp.load(GOLDENS / name), vlp.load(tmp_path / "out")
    for found, wanted in zip(embeds(after.model, *inputs()), embeds(before.model, *inputs()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert main(["convert", str(GOLDENS / name), str(tmp_path / "out"), "--to", to]) == 2
    assert "exists and is not empty; name a new folder" in capsys.readouterr().err
    assert main(["convert", str(GOLDENS / name), str(tmp_path / "new"), "--to", "onnx"]) == 2
    assert "--to onnx: unknown format; known are vlp, hf, " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip", "hf_align", "openclip_siglip"])
def test_any_foreign_checkpoint_becomes_ours(name: str, tmp_path: Path, caplog: Any) -> None:
    """Also where its tokenizer is not at hand: it is looked for when text is first needed."""
    settings = {"model": {"vision": {"heads": 4}}} if name == "openclip_siglip" else {}
    loaded = vlp.load(GOLDENS / name, settings=settings)
    with caplog.at_level(logging.WARNING):
        convert(loaded, tmp_path / "own", "vlp")
    again = vlp.load(tmp_path / "own")
    assert again.report.summary() == f"{len(again.report.loaded)} loaded"
    side = loaded.model.config.vision.image_size
    given = inputs(side, loaded.config.data.max_length)
    for found, wanted in zip(embeds(again.model, *given), embeds(loaded.model, *given), strict=True):
        assert torch.equal(found, wanted)
    assert again.config.model_dump() == loaded.config.model_dump() | {"model": loaded.model.config.model_dump()}
    assert "no tokenizer is written" in caplog.text
    with pytest.raises(ValueError, match="tokenizer"):
        again.embed_texts(["a cat"])


def test_clips_words_leave_as_transformers_has_them(tmp_path: Path) -> None:
    config = model_config("gelu") | {"text_cfg": TEXT | {"vocab_size": 49408}}
    save_open_clip(tmp_path / "in", build(config), config)
    loaded = vlp.load(tmp_path / "in")
    convert(loaded, tmp_path / "out", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("a photo of a cat", "DON'T panic: 42 b_c-d!", "Grüße aus Köln", ""):
        assert theirs(text).input_ids == loaded.tokenizer.encode(text, 77)[0].tolist()
    convert(loaded, tmp_path / "own", "vlp")
    assert vlp.load(tmp_path / "own").tokenizer.vocabulary == loaded.tokenizer.vocabulary


def test_models_of_any_aspect_ratio_do_not_become_square(tmp_path: Path) -> None:
    text = text_config(hidden_size=32, projection_size=32)
    config = transformers.Siglip2Config(text_config=text, vision_config=vision_config(num_patches=16))
    transformers.Siglip2Model(config).save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match="hf_siglip: its images keep their aspect ratio"):
        convert(vlp.load(tmp_path / "in"), tmp_path / "out", "hf")


REFUSED = {
    "fusion": (lambda: tiny_model("dual_stream", ("itc", "itm")), "hf", "hf_clip: the model has a fusion"),
    "bert": (lambda: tiny_model("none", ("itc",)), "open_clip", "its text tower is BERT's kind"),
    "both ways": (lambda: own_clip(causal=False), "hf", "hf_clip: its text tower is not causal"),
    "mean": (lambda: own_clip(pool="mean"), "open_clip", "open_clip: its texts are pooled by mean"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_a_format_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    make, to, message = REFUSED[name]
    save(tmp_path / "in", make())
    with pytest.raises(ValueError, match=rf"no format of {to} holds this model .*{message}.*; use --to vlp") as error:
        convert(vlp.load(tmp_path / "in"), tmp_path / "out", to)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
