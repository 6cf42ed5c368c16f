"""Two towers of transformers, built here at random sizes and compared value by value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from standins import verdict
from torch import Tensor
from two_towers import WORDS, randomise, texts, write_case

import vlp
from encoders.types import Batch, Images, Texts
from objectives.base import Embed, Encode
from scripts.goldens.base import Case

BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_attention_heads": 4}
CLIP_SIZES: list[dict[str, Any]] = [
    {"text": {"hidden_act": "quick_gelu"}, "vision": {"hidden_act": "quick_gelu"}},
    {"text": {"hidden_act": "gelu", "eos_token_id": 2}, "vision": {"hidden_act": "gelu", "num_hidden_layers": 3}},
    {"text": {"hidden_size": 40, "intermediate_size": 72}, "vision": {"patch_size": 4, "layer_norm_eps": 1e-3}},
    {"text": {"layer_norm_eps": 1e-4}, "vision": {"image_size": 48, "patch_size": 16, "intermediate_size": 50}},
]


def text_config(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {
        "vocab_size": WORDS,
        "max_position_embeddings": 16,
        "eos_token_id": 98,
        "bos_token_id": 97,
        "pad_token_id": 98,
    }
    return {**sizes, **own, **more}


def vision_config(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, "image_size": 32, "patch_size": 8, **more}


def run(model: Any, given: dict[str, Tensor], folder: Path, hidden: bool = True) -> Case:
    """What a model of transformers says, as a case."""
    model.save_pretrained(folder)
    found = model(**given, return_loss=True, output_hidden_states=True)
    text, vision = found.text_model_output, found.vision_model_output
    outputs = {
        "loss": found.loss,
        "logits_per_image": found.logits_per_image,
        "image_embeds": found.image_embeds,
        "text_embeds": found.text_embeds,
        "text_last_hidden_state": text.last_hidden_state,
        "vision_last_hidden_state": vision.last_hidden_state,
    }
    for name, tower in (("text", text), ("vision", vision)):
        for number, states in enumerate(tower.hidden_states or () if hidden else ()):
            outputs[f"{name}_hidden_states.{number}"] = states
    return write_case(folder, given, outputs, found.loss, model)


def passes(case: Case) -> None:
    found = verdict(case)
    assert found.passed, found.line()
    assert found.recorded and found.gradients


@pytest.mark.parametrize("seed", range(len(CLIP_SIZES)))
def test_clip(seed: int, tmp_path: Path) -> None:
    sizes = CLIP_SIZES[seed]
    config = transformers.CLIPConfig(
        text_config=text_config(**sizes["text"]), vision_config=vision_config(**sizes["vision"]), projection_dim=16
    )
    model = randomise(transformers.CLIPModel(config), seed)
    legacy = config.text_config.eos_token_id == 2
    ids, keep = texts(3, 9, pad=0 if legacy else 98, end=98, seed=seed)
    side = config.vision_config.image_size
    given = {"input_ids": ids, "pixel_values": torch.randn(3, 3, side, side)}
    if not legacy:
        given["attention_mask"] = keep
    passes(run(model, given, tmp_path / f"hf_clip_{seed}"))


def test_clip_of_older_files(tmp_path: Path) -> None:
    """transformers 4 also stored counted positions; its configs may say the towers' sizes a second time."""
    config = transformers.CLIPConfig(text_config=text_config(), vision_config=vision_config(), projection_dim=16)
    model = randomise(transformers.CLIPModel(config), 0)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["text_config_dict"], tree["text_config"] = tree["text_config"], {}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    loaded = vlp.load(tmp_path)
    assert len(loaded.report.ignored) == 2 and not loaded.report.missing and not loaded.report.unexpected
    assert loaded.model.config.text.heads == 4
    assert loaded.report.notes == (
        "family hf_clip",
        "assumed: image preprocessing as the family publishes it (no preprocessor_config.json)",
    )


def test_clip_without_projections_is_its_towers(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(text_config=text_config(), vision_config=vision_config(), projection_dim=16)
    model = randomise(transformers.CLIPModel(config), 0)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    towers = {name: one for name, one in state.items() if "projection" not in name and name != "logit_scale"}
    save_file(towers, tmp_path / "model.safetensors")
    loaded = vlp.load(tmp_path)
    assert not loaded.model.objectives and loaded.model.space() is None
    pixels = torch.randn(2, 3, 32, 32)
    found = loaded.model.run([Encode("image")], Batch({"clean": Images(pixels)}))[Encode("image")]
    wanted = model.vision_model(pixel_values=pixels)
    torch.testing.assert_close(found.pooled, wanted.pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("kind", ["AltCLIP", "ChineseCLIP"])
def test_other_text_towers(kind: str, hub: bool, tmp_path: Path) -> None:
    """Layers of the image tower are `layer.N` as transformers 5 writes them and `layers.N` on the hub."""
    alt = kind == "AltCLIP"
    text = text_config(**BERT, max_position_embeddings=24, pad_token_id=1 if alt else 0, layer_norm_eps=1e-5)
    text |= {"project_dim": 28, "type_vocab_size": 1} if alt else {"type_vocab_size": 2}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision_config(num_hidden_layers=3), projection_dim=16
    )
    model = randomise(getattr(transformers, f"{kind}Model")(config), 3)
    ids, keep = texts(3, 9, pad=1 if alt else 0, end=2)
    name = "hf_altclip" if alt else "hf_chinese_clip"
    case = run(model, {"input_ids": ids, "attention_mask": keep, "pixel_values": torch.randn(3, 3, 32, 32)},
               tmp_path / name, hidden=not alt)  # fmt: skip
    if hub:
        stored = load_file(case.folder / "model.safetensors")
        on_hub = {name.replace("vision_model.encoder.layer.", "vision_model.encoder.layers."): one
                  for name, one in stored.items()}  # fmt: skip
        save_file(on_hub, case.folder / "model.safetensors")
    passes(case)


@pytest.mark.parametrize("seed", [0, 1])
def test_siglip(seed: int, tmp_path: Path) -> None:
    text = text_config(hidden_act="gelu_pytorch_tanh", pad_token_id=1, max_position_embeddings=10, projection_size=32)
    vision = vision_config(hidden_act=("gelu_pytorch_tanh", "gelu")[seed], intermediate_size=(64, 50)[seed])
    config = transformers.SiglipConfig(text_config=text | {"hidden_size": 32}, vision_config=vision)
    model = randomise(transformers.SiglipModel(config), seed)
    ids, _ = texts(3, 10, pad=1, end=2, seed=seed)
    passes(run(model, {"input_ids": ids, "pixel_values": torch.randn(3, 3, 32, 32)}, tmp_path / "hf_siglip"))


@pytest.mark.parametrize("shapes", [[(4, 6), (3, 5)], [(6, 4), (4, 6), (2, 2)], [(7, 3)]])
def test_siglip_2_of_any_aspect_ratio(shapes: list[tuple[int, int]], tmp_path: Path) -> None:
    """NaFlex: patches of images of unlike sizes; positions of each image's own grid, antialiased."""
    text = text_config(hidden_act="gelu_pytorch_tanh", max_position_embeddings=10, projection_size=32, hidden_size=32)
    vision = vision_config(hidden_act="gelu_pytorch_tanh", num_patches=16)
    config = transformers.Siglip2Config(text_config=text, vision_config=vision)
    model = randomise(transformers.Siglip2Model(config), 0)
    ids, _ = texts(len(shapes), 10, pad=0, end=1)
    patches, mask = torch.randn(len(shapes), 24, 192), torch.zeros(len(shapes), 24, dtype=torch.int32)
    for row, (height, width) in enumerate(shapes):
        mask[row, : height * width] = 1
    given = {"input_ids": ids, "pixel_values": patches, "pixel_attention_mask": mask}
    passes(run(model, {**given, "spatial_shapes": torch.tensor(shapes)}, tmp_path / "hf_siglip2_naflex"))


def test_pictures_of_any_aspect_ratio(tmp_path: Path) -> None:
    """What transformers' processor and model say of pictures, our loaded model says too."""
    text = text_config(max_position_embeddings=10, projection_size=32, hidden_size=32)
    config = transformers.Siglip2Config(text_config=text, vision_config=vision_config(num_patches=16))
    model = randomise(transformers.Siglip2Model(config), 0)
    model.save_pretrained(tmp_path)
    processor = transformers.models.siglip2.image_processing_pil_siglip2.Siglip2ImageProcessorPil(
        patch_size=8, max_num_patches=24
    )
    processor.save_pretrained(tmp_path)
    noise = np.random.default_rng(0)
    images = [
        Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in [(60, 90), (200, 50), (9, 9)]
    ]
    given = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        wanted = model.get_image_features(**given)
    wanted = torch.nn.functional.normalize(getattr(wanted, "pooler_output", wanted), dim=-1)
    torch.testing.assert_close(vlp.load(tmp_path).embed_images(images), wanted, rtol=1e-4, atol=1e-5)


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in [(60, 90), (64, 50), (40, 40)]
    ]


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_pictures_and_words(kind: str, tmp_path: Path) -> None:
    """`embed_images` and `embed_texts` are what transformers' own processor, tokenizer and model give."""
    clip = kind == "CLIP"
    words = clip_tokenizer() if clip else siglip_tokenizer()
    text = text_config(vocab_size=len(words), projection_size=32, hidden_size=32, eos_token_id=words.eos_token_id)
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision_config())
    model = randomise(getattr(transformers, f"{kind}Model")(config), 0)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": 32} if clip else {"size": {"height": 32, "width": 32}}
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**sizes)
    for part in (model, processor, words):
        part.save_pretrained(tmp_path)
    loaded = vlp.load(tmp_path)
    sentences = ["a cat", "the cat sat on the mat " * 5, "a dog"]
    padding = {"padding": True} if clip else {"padding": "max_length"}
    ids = words(sentences, truncation=True, max_length=16, return_tensors="pt", **padding)
    with torch.no_grad():
        image = model.get_image_features(**processor(images=pictures(), return_tensors="pt"))
        given = ids if clip else {"input_ids": ids["input_ids"]}  # SigLIP reads its padding
        said = model.get_text_features(**given)
    for found, wanted in ((loaded.embed_images(pictures()), image), (loaded.embed_texts(sentences), said)):
        wanted = torch.nn.functional.normalize(getattr(wanted, "pooler_output", wanted), dim=-1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def clip_tokenizer() -> Any:
    from vlp.data.tokenizer import OpenClipTokenizer

    return OpenClipTokenizer().as_transformers()


def siglip_tokenizer() -> Any:
    """A tokenizer in the form of Gemma's, which SigLIP 2 takes: nothing before a text, </s> behind it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁cat", -1.5), ("▁the", -1.0), ("▁", -3.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", model_max_length=16
    )


def test_align(tmp_path: Path) -> None:
    text = text_config(**BERT, type_vocab_size=2, pad_token_id=0)
    vision = {"image_size": 64, "in_channels": [32, 16, 24], "out_channels": [16, 24, 40], "kernel_sizes": [3, 3, 5],
              "strides": [1, 2, 2], "num_block_repeats": [1, 1, 2], "expand_ratios": [1, 6, 6], "hidden_dim": 64,
              "width_coefficient": 1.0, "depth_coefficient": 1.0}  # fmt: skip
    config = transformers.AlignConfig(text_config=text, vision_config=vision, projection_dim=40)
    model = randomise(transformers.AlignModel(config), 0)
    ids, keep = texts(3, 9, pad=0, end=2)
    given = {"input_ids": ids, "attention_mask": keep, "pixel_values": torch.randn(3, 3, 64, 64)}
    case = run(model, given, tmp_path / "hf_align", hidden=False)
    passes(case)
    trained = vlp.load(case.folder).model.train()
    norms = [one for one in trained.vision.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    assert norms and not any(one.training for one in norms), "statistics of a loaded batch norm would drift"


def test_another_image_size_interpolates_as_transformers_does(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(text_config=text_config(), vision_config=vision_config(), projection_dim=16)
    model = randomise(transformers.CLIPModel(config), 0)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        wanted = model.get_image_features(pixels, interpolate_pos_encoding=True)
    loaded = vlp.load(tmp_path, settings={"model": {"vision": {"image_size": 48}}})
    assert loaded.report.resized == ("vision.vit.pos_embed",)
    assert "position embeddings resized by bicubic interpolation" in loaded.report.notes
    with torch.no_grad():
        found = loaded.model.run([Embed("image")], Batch({"clean": Images(pixels)}))[Embed("image")]
    wanted = getattr(wanted, "pooler_output", wanted)
    torch.testing.assert_close(found, torch.nn.functional.normalize(wanted, dim=-1), rtol=1e-4, atol=1e-5)


def test_towers_take_a_fusion(tmp_path: Path) -> None:
    """What was loaded are our own towers: a fusion reads their states."""
    config = transformers.CLIPConfig(text_config=text_config(), vision_config=vision_config(), projection_dim=16)
    randomise(transformers.CLIPModel(config), 0).save_pretrained(tmp_path)
    fused = {"kind": "dual_stream", "layers": 1}
    settings = {"model": {"fusion": fused}, "objectives": {"itm": {}}}
    loaded = vlp.load(tmp_path, settings=settings, allow_missing=["fusion.*", "objectives.itm.*"])
    ids, keep = texts(2, 9, pad=98, end=98)
    batch = Batch({"clean": Images(torch.randn(2, 3, 32, 32))}, {"clean": Texts(ids, keep.bool())})
    assert loaded.model.run([vlp.Fuse()], batch)[vlp.Fuse()].pooled.shape == (2, 24)


def test_unknown_activation_is_refused(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        text_config=text_config(hidden_act="silu"), vision_config=vision_config(), projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hidden_act 'silu' of config\.json is not known here"):
        vlp.load(tmp_path)
