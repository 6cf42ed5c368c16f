"""open_clip's, OpenAI's and torchmultimodal's CLIP against references that are built here at random sizes."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from standins import stand_in, verdict
from torch import Tensor, nn
from torch.nn import functional as F
from two_towers import WORDS, randomise, texts, write_case

import vlp
from encoders.types import Batch, Images, Texts
from objectives.base import Embed
from scripts.goldens.base import Case

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}
TEXT = {"context_length": 12, "vocab_size": WORDS, "width": 24, "heads": 4, "layers": 2, "mlp_ratio": 2.0}
SIGLIP = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "", "timm_proj": "linear"}
MODELS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "quick": {"quick_gelu": True, "vision_cfg": {"patch_size": 16, "width": 48, "head_width": 12}},
    "epsilon": {"vision_cfg": {"norm_kwargs": {"eps": 1e-3}}, "text_cfg": {"norm_kwargs": {"eps": 1e-3}}},
    "scaled": {"vision_cfg": {"ls_init_value": 0.1, "image_size": 48}},
    "first": {"text_cfg": {"pool_type": "first"}},
    "eos": {"text_cfg": {"pool_type": "eos", "eos_id": 98}},
    "custom": {"custom_text": True},
    "siglip": {"custom_text": True, "init_logit_bias": -10, "text_cfg": SIGLIP},
    "siglip2": {
        "custom_text": True,
        "init_logit_bias": -10,
        "text_cfg": SIGLIP | {"act_kwargs": {"approximate": "tanh"}},
    },
    "tanh": {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}},
    "timm": {"custom_text": True, "vision_cfg": TIMM},
    "timm's classifier": {"custom_text": True, "vision_cfg": TIMM | {"timm_proj": None, "timm_pool": "token"}},
    "resnet": {
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "resnet10t", "image_size": 64, "timm_pool": "", "timm_proj": "linear"},
    },
    "mobile": {
        "custom_text": True,
        "text_cfg": {"no_causal_mask": True},
        "vision_cfg": {"timm_model_name": "resnet10t", "image_size": 64, "timm_pool": "avg", "timm_proj": None},
    },
}


def model_config(name: str) -> dict[str, Any]:
    chosen = MODELS[name]
    vision, text = chosen.get("vision_cfg", {}), chosen.get("text_cfg", {})
    vision = vision if "timm_model_name" in vision else VISION | vision
    return {"embed_dim": 16, **chosen, "vision_cfg": vision, "text_cfg": TEXT | text}


def build(config: Mapping[str, Any], seed: int = 0) -> nn.Module:
    kind = CustomTextCLIP if config.get("custom_text") else CLIP
    return randomise(kind(**{name: value for name, value in config.items() if name != "custom_text"}), seed)


def save(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: one.contiguous() for name, one in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    settings = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


def run(model: Any, folder: Path, side: int) -> Case:
    """What a model of open_clip says, as a case."""
    ids, _ = texts(3, 12, pad=0, end=98)
    pixels = torch.randn(3, 3, side, side)
    features = model(pixels, ids)
    image, text, scale = features[:3]
    logits = scale * image @ text.T + (features[3] if len(features) == 4 else 0.0)
    if len(features) == 4:
        loss = open_clip.loss.SigLipLoss()(image, text, scale, features[3])
    else:
        loss = open_clip.loss.ClipLoss()(image, text, scale)
    outputs = {"image_features": image, "text_features": text, "logits_per_image": logits, "loss": loss}
    return write_case(folder, {"image": pixels, "text": ids}, outputs, loss, model)


@pytest.mark.parametrize("name", MODELS)
def test_folder(name: str, tmp_path: Path) -> None:
    config = model_config(name)
    model = build(config)
    case = run(model, save(tmp_path / f"openclip_vit_{name}", model, config), config["vision_cfg"]["image_size"])
    found = verdict(case)
    assert found.passed, found.line()
    loaded = vlp.load(case.folder)
    assert loaded.report.notes == ("family open_clip",), "all is said by the config"
    vision, transform = loaded.model.config.vision, loaded.config.data.transform
    assert (vision.mean, vision.std, transform.resize) == ((0.5,) * 3, (0.25,) * 3, "squash")
    assert loaded.config.data.max_length == 12


def test_bare_state_dict_needs_its_config(tmp_path: Path) -> None:
    config = model_config("quick")
    model = build(config)
    path = tmp_path / "epoch_32.pt"
    torch.save({"epoch": 32, "state_dict": {f"module.{name}": one for name, one in model.state_dict().items()}}, path)
    pixels = torch.randn(2, 3, 32, 32)
    wanted = model.encode_image(pixels, normalize=True)
    for given in (config, {"model_cfg": config}):
        loaded = vlp.load(path, config=given)
        found = loaded.model.run([Embed("image")], Batch({"clean": Images(pixels)}))[Embed("image")]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assumed = vlp.load(path).report.notes
    assert "assumed: no open_clip_config.json: heads of width 64, epsilon 1e-5, gelu" in assumed[1]


def openai_archive(path: Path, config: Mapping[str, Any], model: nn.Module) -> Path:
    """A file as OpenAI publishes its models: half precision, traced, with three numbers among the weights."""
    sides = {"input_resolution": config["vision_cfg"]["image_size"], "context_length": 12, "vocab_size": WORDS}
    for name, value in sides.items():
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    inputs = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 12, dtype=torch.int64))
    with torch.no_grad():
        torch.jit.trace(model, inputs, check_trace=False).half().save(str(path))
    return path


@pytest.mark.filterwarnings("ignore")
def test_openai_archive(tmp_path: Path) -> None:
    config = model_config("quick") | {"vision_cfg": VISION | {"width": 128, "head_width": 64}}
    config |= {"text_cfg": TEXT | {"width": 128, "heads": 2}}
    model = build(config)
    path = openai_archive(tmp_path / "ViT-tiny.pt", config, model)
    loaded = vlp.load(path)
    assert loaded.report.notes[1].endswith("heads of width 64, epsilon 1e-5, quick_gelu, as OpenAI's")
    assert {name.split()[0] for name in loaded.report.ignored} >= {"input_resolution", "context_length", "vocab_size"}
    assert not loaded.report.missing and loaded.report.converted
    ids, keep = texts(3, 12, pad=0, end=98)
    batch = Batch({"clean": Images(torch.randn(3, 3, 32, 32))}, {"clean": Texts(ids, keep.bool())})
    results = loaded.model.run([Embed("image"), Embed("text")], batch)
    half = model.half().float()  # what the file holds
    wanted = half.encode_image(batch.images["clean"].pixels, normalize=True)
    torch.testing.assert_close(results[Embed("image")], wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[Embed("text")], half.encode_text(ids, normalize=True), rtol=1e-3, atol=1e-4)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("ran",)


@pytest.mark.parametrize("what", ["code", "compressed", "cut", "beyond"])
def test_archives_are_read_without_running_anything(what: str, tmp_path: Path, capsys: Any) -> None:
    """An archive with another pickle than torch's, compressed tensors, a storage longer than its bytes."""
    path = tmp_path / "model.pt"
    reference = ("storage", torch.float32, "0", "cpu", 10**9 if what == "beyond" else 4)

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            return reference if found is Ellipsis else None

    content = io.BytesIO()
    Pickler(content, 2).dump(Evil() if what == "code" else [...])
    plain = content.getvalue().replace(b"ctorch\nfloat32\n", b"ctorch\nFloatStorage\n")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", plain[:-3] if what == "cut" else plain)
        archive.writestr("model/constants.pkl", b"")
        packed = zipfile.ZIP_DEFLATED if what == "compressed" else zipfile.ZIP_STORED
        archive.writestr("model/data/0", bytes(2**20 if what == "compressed" else 16), packed)
    reasons = {
        "code": "__builtin__.print",
        "compressed": "is compressed",
        "cut": "pickle data was truncated|ran out of input",
    }
    reason = reasons.get(what, "buffer length")
    with pytest.raises(ValueError, match=rf"(?i)cannot load .*model\.pt: .*({reason}).*; nothing of it was executed"):
        vlp.load(path)
    assert capsys.readouterr().out == ""


def test_another_image_size_interpolates_as_open_clip_does(tmp_path: Path) -> None:
    config = model_config("gelu")
    model = build(config)
    save(tmp_path, model, config)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=48).eval()
    loaded = vlp.load(tmp_path, settings={"model": {"vision": {"image_size": 48}}})
    assert "position embeddings resized by bicubic_antialias interpolation" in loaded.report.notes
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        found = loaded.model.run([Embed("image")], Batch({"clean": Images(pixels)}))[Embed("image")]
        torch.testing.assert_close(found, theirs.encode_image(pixels, normalize=True), rtol=1e-4, atol=1e-5)


def test_by_model_and_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tag's own activation and preprocessing, weights from open_clip's cache."""
    config = model_config("quick")
    model = build(config)
    weights = tmp_path / "cache" / "epoch_1.safetensors"
    weights.parent.mkdir()
    save_file({name: one.contiguous() for name, one in model.state_dict().items()}, weights)
    tag = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "quick_gelu": True, "file": str(weights)}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config | {"quick_gelu": False})
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag_name: tag)
    loaded = vlp.load("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert loaded.model.config.text.activation == "quick_gelu"
    assert loaded.model.config.vision.mean == (0.5,) * 3 and loaded.config.data.transform.resize == "shortest"
    pixels = torch.randn(2, 3, 32, 32)
    found = loaded.model.run([Embed("image")], Batch({"clean": Images(pixels)}))[Embed("image")]
    torch.testing.assert_close(found, model.encode_image(pixels, normalize=True), rtol=1e-4, atol=1e-5)


def test_unknown_models_and_tags_are_one_line() -> None:
    for source, message in {
        "open_clip:ViT-B-33/openai": "open_clip has no model 'ViT-B-33'; perhaps you meant ViT-B-32",
        "open_clip:ViT-B-32/openia": "write open_clip:ViT-B-32/TAG with one of openai, laion400m_e31",
        "open_clip:ViT-B-32": "write open_clip:ViT-B-32/TAG with one of openai",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            vlp.load(source)
        assert "\n" not in str(error.value)


def test_local_dir_and_its_tokenizer(tmp_path: Path) -> None:
    config = model_config("gelu") | {"text_cfg": TEXT | {"vocab_size": 49408}}
    save(tmp_path, build(config), config)
    loaded = vlp.load(f"local-dir:{tmp_path}")
    vectors = loaded.embed_texts(["a photo of a cat", "a photo of a cat on a red mat, " * 9])
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a photo of a cat", "a photo of a cat on a red mat, " * 9])
    with torch.no_grad():
        torch.testing.assert_close(vectors, theirs.encode_text(ids, normalize=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "trait", "message"),
    [
        ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool True is not read"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name 'roberta-base' is not read"),
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type 'avg' is not read by vlp; only 'tok' is"),
    ],
)
def test_towers_that_are_not_read_are_refused(part: str, trait: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = model_config("gelu")
    model = build(config)
    save(tmp_path, model, config | {part: config[part] | trait})
    with pytest.raises(ValueError, match=message):
        vlp.load(tmp_path)


def tmm_shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"loss.logit_scale": ()}
    for tower, width in (("encoder_a", 32), ("encoder_b", 24)):
        for n in range(2):
            layer = f"model.{tower}.encoder.layers.{n}."
            found |= {
                layer + "self_attn.in_proj_weight": (3 * width, width),
                layer + "self_attn.in_proj_bias": (3 * width,),
            }
            for name, (rows, columns) in {
                "self_attn.out_proj": (width, width), "linear1": (2 * width, width), "linear2": (width, 2 * width)
            }.items():  # fmt: skip
                found |= {f"{layer}{name}.weight": (rows, columns), f"{layer}{name}.bias": (rows,)}
            found |= {f"{layer}{norm}.{p}": (width,) for norm in ("norm1", "norm2") for p in ("weight", "bias")}
    image, text = "model.encoder_a.", "model.encoder_b."
    found |= {f"{image}{norm}.{p}": (32,) for norm in ("ln_pre", "ln_post") for p in ("weight", "bias")}
    found |= {
        f"{image}conv.weight": (32, 3, 8, 8),
        f"{image}cls_token_embedding": (32,),
        f"{image}projection": (32, 16),
    }
    found |= {f"{image}positional_embedding": (17, 32), f"{text}positional_embedding": (12, 24)}
    found |= {f"{text}token_embedding.weight": (WORDS, 24), f"{text}projection.weight": (16, 24)}
    return found | {f"{text}ln_final.{p}": (24,) for p in ("weight", "bias")}


def tmm_reference(weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchmultimodal's CLIP written with torch's own layers, as its code is."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def stack(x: Tensor, name: str, mask: Tensor | None) -> Tensor:
        layer = nn.TransformerEncoderLayer(
            x.shape[-1],
            4,
            2 * x.shape[-1],
            0.0,
            lambda y: y * torch.sigmoid(1.702 * y),
            norm_first=True,
            batch_first=True,
        ).train()  # the fast path of evaluation does not know this activation
        for n in range(2):
            own = f"{name}.encoder.layers.{n}."
            state = {k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)}
            x = torch.func.functional_call(layer, state, (x, mask))
        return x

    image = F.conv2d(inputs["image"], weights["model.encoder_a.conv.weight"], stride=8).flatten(2).transpose(1, 2)
    classes = weights["model.encoder_a.cls_token_embedding"].expand(len(image), 1, -1)
    image = torch.cat([classes, image], 1) + weights["model.encoder_a.positional_embedding"]
    image = stack(norm(image, "model.encoder_a.ln_pre"), "model.encoder_a", None)
    image = norm(image[:, 0], "model.encoder_a.ln_post") @ weights["model.encoder_a.projection"]
    ids = inputs["text"]
    text = weights["model.encoder_b.token_embedding.weight"][ids] + weights["model.encoder_b.positional_embedding"]
    text = stack(text, "model.encoder_b", torch.full((12, 12), float("-inf")).triu(1))
    text = norm(text, "model.encoder_b.ln_final")[torch.arange(len(ids)), ids.argmax(1)]
    text = text @ weights["model.encoder_b.projection.weight"].T
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = weights["loss.logit_scale"].exp() * image @ text.T
    own = torch.arange(len(ids))
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return {"embeddings_a": image, "embeddings_b": text, "loss": loss}


@pytest.mark.parametrize("config", [{"heads": 4}, {"encoder_a": {"heads": 4}, "encoder_b": {"heads": 4}}])
def test_torchmultimodal(config: dict[str, Any], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) < 2 else shape[-1] ** -0.5)
        + (1.0 if (name.endswith("weight") and len(shape) == 1) or "scale" in name else 0.0)
        for name, shape in tmm_shapes().items()
    }
    ids, _ = texts(3, 12, pad=0, end=98)
    inputs = {"image": torch.randn(3, 3, 32, 32), "text": ids}
    case = stand_in(
        tmp_path / "tmm_clip", weights, inputs, lambda given: tmm_reference(given, inputs), config,
        file="model.pt", key="state_dict",
    )  # fmt: skip
    found = verdict(case)
    assert found.passed, found.line()
    assert found.gradients == len(weights)
