"""transformers' BLIP: captioning, matching (BlipForImageTextRetrieval) and VQA.

The layers are those of BLIP's own files (``blip.py``); transformers' classes read all texts as they are given, without
[ENC]. What the weights do not say stands in config.json, where what is left out is the class's default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from vlp.checkpoint.albef import SIDES
from vlp.checkpoint.bert_stack import (
    decoder_stack,
    read_stack,
    split_stack,
    without_copies,
    word_head,
    word_head_copies,
)
from vlp.checkpoint.blip import DECODER, ENCODER, HEAD, PUBLISHED_WORDS, TEMPERATURE, TOKENIZER, WORDS, text_recipe
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, names_there
from vlp.checkpoint.hf_clip import activation_of, preset_of, section, unstated
from vlp.checkpoint.names import Pair, blocks, rename_pairs
from vlp.data.presets import albef_blip

_VISION = "vision_model."
_PATCHES = _VISION + "embeddings.patch_embedding.weight"
_IGNORED = {r".*embeddings\.position_ids": "counted anew", r"text_encoder\.pooler\..*": "of BERT, never used"}
VISION_TABLE = (
    Pair(_VISION + "embeddings.class_embedding", "vision.vit.cls_token"),
    Pair(_VISION + "embeddings.position_embedding", "vision.vit.pos_embed"),
    Pair(_VISION + "embeddings.patch_embedding.{p}", "vision.vit.patch_embed.proj.{p}"),
    *blocks(
        _VISION + "encoder.layers.{n}.",
        "vision.vit.blocks.{n}.",
        {
            "layer_norm1": "norm1",
            "self_attn.qkv": "attn.qkv",
            "self_attn.projection": "attn.proj",
            "layer_norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
    ),
    Pair(_VISION + "post_layernorm.{p}", "vision.vit.norm.{p}"),
)


def recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    """Whether a file is of these classes: BLIP's text stacks beside transformers' vision tower."""
    return _PATCHES in shapes and (DECODER + WORDS in shapes or ENCODER + WORDS in shapes)


def recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    """Return what a file is in our words."""
    encodes, decodes = ENCODER + WORDS in shapes, DECODER + WORDS in shapes
    text = read_stack(shapes, ENCODER if encodes else DECODER)
    known, notes = section(config, "text_config"), list[str]()
    heads = known.get("num_attention_heads", 8)
    if not known:
        heads = max(1, text.width // 64)
        notes += unstated(config, "text_config", f"{heads} heads in the text layers (64 a head), gelu, epsilon 1e-12")
    stack = {
        "width": text.width,
        "heads": heads,
        "hidden": text.hidden,
        "activation": activation_of(known, "gelu"),
        "eps": known.get("layer_norm_eps", 1e-12),
        "dropout": known.get("hidden_dropout_prob", 0.0),
    }
    vision, transform = _vision(shapes, config, notes)
    words = text_recipe(text, stack) | {"padding_id": known.get("pad_token_id", 0)}
    model: dict[str, Any] = {"vision": vision, "text": words, "fusion": {"kind": "none"}}
    if encodes:
        model["fusion"] = {"kind": "dual_stream", "attention": "cross", **stack, "layers": text.layers}
    if decodes:
        share, memory = ("none", "text") if encodes else ("embeddings", "image")
        layers = read_stack(shapes, DECODER).layers
        model["decoder"] = {"kind": "causal", **stack, "layers": layers, "share": share, "memory": memory}
    if "vision_proj.weight" in shapes:
        model["embed"] = {"width": shapes["vision_proj.weight"][0], "temperature": TEMPERATURE}
        notes.append(f"temperature {TEMPERATURE}")
    data = {"max_length": 35 if encodes else 40, "tokenizer": _words(text.vocabulary, known), "transform": transform}
    tree = {"model": model, "objectives": _objectives(shapes, known, config), "data": data}
    return Recipe(tree, tuple(notes))


def _words(vocabulary: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """`data.tokenizer`: generated texts begin with config.json's bos_token_id, whatever the tokenizer says itself."""
    begin = known.get("bos_token_id", PUBLISHED_WORDS - 2)
    if vocabulary == PUBLISHED_WORDS and begin == PUBLISHED_WORDS - 2:
        return TOKENIZER
    plain = {"source": TOKENIZER["source"]}
    return plain | {"bos_token": begin} if known and begin < vocabulary else plain


def _vision(shapes: Shapes, config: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Vision encoder and image transform."""
    known = section(config, "vision_config")
    width, _, patch, _ = shapes[_PATCHES]
    side = math.isqrt(shapes[_VISION + "embeddings.position_embedding"][1] - 1) * patch
    preset, assumed = preset_of(config, albef_blip(side))
    notes += assumed
    heads = known.get("num_attention_heads", 12)
    if not known:
        heads = max(1, width // 64)
        notes += unstated(config, "vision_config", f"{heads} heads in the vision tower (64 a head), gelu, epsilon 1e-5")
    hidden = shapes[_VISION + "encoder.layers.0.mlp.fc1.weight"][0]
    return {
        "kind": "patch",
        "model": "vit_base_patch16_224",
        "image_size": side,
        "patch_size": patch,
        "width": width,
        "depth": count_layers(shapes, re.escape(_VISION) + r"encoder\.layers\.(\d+)\."),
        "heads": heads,
        "eps": known.get("layer_norm_eps", 1e-5),
        "mean": preset.mean,
        "std": preset.std,
        "position_resize": "bicubic",
        "arguments": {"mlp_ratio": hidden / width, "act_layer": activation_of(known, "gelu")},
    }, preset.transform.model_dump(exclude_defaults=True)


def _objectives(shapes: Shapes, text: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The losses whose heads the file holds."""
    found: dict[str, Any] = {}
    if "vision_proj.weight" in shapes:
        found["itc"] = {"positives": "id", "min_scale": 2.0, "max_scale": 1000.0}
    if "itm_head.weight" in shapes:
        found["itm"] = {"exclude": "id", "score": "logit"}
    if HEAD + "transform.dense.weight" in shapes:
        found["lm"] = {
            "label_smoothing": text.get("label_smoothing", 0.0),
            "tied": tied(config),
            "activation": activation_of(text, "gelu"),
        }
        if ENCODER + WORDS in shapes:
            found["lm"] |= {"memory": "fused", "view": "lm:answer"}
    return found


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the output words are the word embedding."""
    return bool(config.get("tie_word_embeddings", True))


def table(shapes: Shapes) -> tuple[Pair, ...]:
    """Return the names of a file's weights there and here."""
    pairs = [*VISION_TABLE, *(Pair(f"{side}_proj.{{p}}", f"embed.main.{mine}.{{p}}") for side, mine in SIDES)]
    if ENCODER + WORDS in shapes:
        pairs += split_stack(ENCODER, "", read_stack(shapes, ENCODER).layers, 0)
    pairs += [*decoder_stack(DECODER, "decoder."), *word_head(HEAD, "objectives.lm.head.")]
    return (*pairs, Pair("itm_head.{p}", "objectives.itm.head.{p}"))


def rename(state: State) -> Renamed:
    """Rename a file's weights to ours; transformers 4 stored the tied words twice."""
    words, output = state.get(DECODER + WORDS), state.get(HEAD + "decoder.weight")
    untied = words is not None and output is not None and not torch.equal(words, output)
    whole, left = without_copies(state, {} if untied else word_head_copies(HEAD, DECODER + WORDS))
    pairs = table({name: tuple(tensor.shape) for name, tensor in whole.items()})
    if untied:
        left = {HEAD + "bias": "not used where the output words are not tied"}
        whole.pop(HEAD + "bias", None)
        pairs = (*pairs, Pair(HEAD + "decoder.{p}", "objectives.lm.head.decoder.{p}"))
    found = rename_pairs(pairs, whole, _IGNORED)
    if "vision_proj.weight" in whole:
        found.state["embed.main.logit_scale"] = torch.tensor([-math.log(TEMPERATURE)])
    return Renamed(found.state, found.ignored | left, names_there(found.unexpected, whole, state))


FAMILY = Family("hf_blip", recognise, recipe, rename)
