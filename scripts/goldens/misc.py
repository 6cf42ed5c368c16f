"""Cases without a model: image preprocessing, tokenizers, and position embeddings at another image size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from encoders.positions import resize_positions
from scripts.goldens.base import Case, Verdict, compare
from vlp.data import presets
from vlp.data.presets import Preset, hf_processor, openclip
from vlp.data.tokenizer import Tokenizer, TokenizerConfig, TransformersTokenizer, build_tokenizer

_SQUARE = {"size": {"height": 32, "width": 32}}
_HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3}
_MAX_LENGTH, _PAIR_LENGTH = 40, 20  # of the tokenizers' case


def check(case: Case) -> Verdict | None:
    """Compare a case of these kinds; None if it is of none."""
    verdict = Verdict(case.name)
    if case.name == "tokenizers":
        for what, found, wanted in _tokens(case):
            verdict.recorded += 1
            verdict.compared += 1
            if found != wanted:
                verdict.problems.append(f"{what}: {found}, recorded {wanted}")
        return verdict
    known = CASES.get(case.name)
    if known is None:
        return None
    found_tensors = known(case)
    tolerance = {"atol": 5e-5, "rtol": 1e-4} | case.meta.get("tolerance", {})
    for name, wanted_tensor in case.outputs.items():
        verdict.recorded += wanted_tensor.numel()
        if name not in found_tensors:
            verdict.problems.append(f"{name} has no adapter")
            continue
        compare(name, found_tensors[name], wanted_tensor, None, tolerance, verdict)
    return verdict


def _positions(case: Case) -> dict[str, Tensor]:
    # BEiT-3's table begins with two rows that are unused.
    prefix = 3 if case.name.startswith("beit3") else 1
    return {"resized": resize_positions(case.inputs["pos_embed"], (6, 6), prefix)}


def _positions_of_libraries(case: Case) -> dict[str, Tensor]:
    table = case.inputs["pos_embed"]
    bilinear = resize_positions(table, (3, 6), method="bilinear_corners")[1:]
    return {
        "openclip_6x6": resize_positions(table, (6, 6), method="bicubic_antialias"),
        "timm_6x6": resize_positions(table, (6, 6), method="bicubic_antialias"),
        "hf_6x6": resize_positions(table, (6, 6)),
        "hf_4x7": resize_positions(table, (4, 7)),
        "vilt_3x6": bilinear.T.reshape(1, -1, 3, 6),
    }


def _hf(kind: str, **settings: object) -> Preset:
    return hf_processor({"image_processor_type": f"{kind}ImageProcessor", **settings})


def _by_torch(preset: Preset) -> Preset:
    """As the torchvision backend of transformers does it."""
    return preset._replace(transform=preset.transform.model_copy(update={"resampler": "torch"}))


def families() -> dict[str, Preset]:
    """The preset that each recorded preprocessing is."""
    clip = _hf("CLIP", size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    blip = _hf("Blip", **_SQUARE)
    tower = {"size": {"shortest_edge": 32}, "size_divisor": 8, "crop_size": {"shortest_edge": 32}}
    return {
        "albef_blip_xvlm_test": presets.albef_blip(32),
        "beit3_test": presets.beit3(32),
        "vilt_pixelbert": presets.vilt(64),
        "meter_clip": presets.meter_clip(32),
        "meter_imagenet": presets.meter_imagenet(32),
        "openclip_shortest": openclip({"size": 32}),
        "openclip_squash_siglip": openclip({"size": 32, "resize_mode": "squash", **_HALVES}),
        "openclip_longest": openclip({"size": 32, "resize_mode": "longest"}),
        "hf_clip": _by_torch(clip),
        "hf_blip": _by_torch(blip),
        "hf_clip_pil": clip,
        "hf_blip_pil": blip,
        "hf_siglip_pil": _hf("Siglip", **_SQUARE),
        "hf_vilt_pil": _hf("Vilt", size={"shortest_edge": 64}, size_divisor=32),
        "hf_flava_pil": _hf("Flava", crop_size={"height": 32, "width": 32}, **_SQUARE),
        "hf_bridgetower_pil": _hf("BridgeTower", **tower),
    }


def _preprocessing(case: Case) -> dict[str, Tensor]:
    found = {}
    for family, preset in families().items():
        for image in ("a", "b"):
            pixels = preset.pixels(case.inputs[f"image_{image}"].permute(2, 0, 1))
            found[f"{family}.{image}"] = pixels
            # transformers' form of the same: a batch of one image, all of which is image.
            found[f"{family}.{image}.pixel_values"] = pixels[None]
            found[f"{family}.{image}.pixel_mask"] = torch.ones(1, *pixels.shape[1:], dtype=torch.uint8)
    return found


def _tokens(case: Case) -> Iterator[tuple[str, object, object]]:
    """What, found, recorded."""
    recorded = json.loads((case.folder / "tokenizers.json").read_text(encoding="utf-8"))
    clip = recorded["clip_bpe"]
    length = clip["context_length"]
    tokenizer = build_tokenizer(TokenizerConfig(source="open_clip:ViT-B-32", fixed_length=length), ())
    special = tokenizer.vocabulary
    yield "clip_bpe special ids", [special.cls, special.sep, special.pad], [clip["sot"], clip["eot"], clip["pad"]]
    whole = build_tokenizer(TokenizerConfig(source="open_clip:ViT-B-32"), ())
    for text, padded, ids in zip(clip["strings"], clip["padded_ids"], clip["encoded"], strict=True):
        yield f"clip_bpe {text!r:.30}", _ids(tokenizer, text, length), padded
        yield f"clip_bpe {text!r:.30} uncut", _ids(whole, text, 10_000)[1:-1], ids
    bert = recorded["wordpiece"]
    vocabulary = case.folder / "wordpiece_vocab.txt"
    tokenizer = build_tokenizer(TokenizerConfig(source=str(vocabulary)), ())
    assert isinstance(tokenizer, TransformersTokenizer)
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    for text, ids, tokens in zip(bert["strings"], bert["input_ids"], bert["tokens"], strict=True):
        found = _ids(tokenizer, text, _MAX_LENGTH)
        yield f"wordpiece {text!r:.30}", found, ids
        yield f"wordpiece {text!r:.30} tokens", [words[i] for i in found], tokens
    for pair in bert["pairs"]:
        ids, segments = tokenizer.encode_pair(pair["pair"][0], pair["pair"][1], _PAIR_LENGTH)
        shown = f"wordpiece pair {pair['pair'][0]!r:.20}"
        yield shown, ids.tolist(), pair["input_ids"]
        yield f"{shown} segments", segments.tolist(), pair["token_type_ids"]


def _ids(tokenizer: Tokenizer, text: str, max_length: int) -> list[int]:
    return tokenizer.encode(text, max_length)[0].tolist()


CASES: Mapping[str, Callable[[Case], Mapping[str, Tensor]]] = {
    "albef_posembed_resize": _positions,
    "beit3_posembed_resize": _positions,
    "meter_posembed_resize": _positions,
    "posembed_resize_misc": _positions_of_libraries,
    "preprocess": _preprocessing,
}
"""What gives the outputs of each case that consists of tensors."""
