"""ALBEF's checkpoints (Li et al. 2021): pretraining, retrieval, VQA, NLVR2 with its own pretraining, SNLI-VE.

A file holds the momentum twins beside the trained weights (``*_m``) where its training had them. What it does not say
are the heads of the attentions and how it was trained; ``config=`` takes the authors' own keys: those of their YAML,
with ``bert_config`` (the content of config_bert.json) and ``vit`` (arguments of their VisionTransformer) as mappings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.bert_stack import (
    Stack,
    decoder_stack,
    read_stack,
    shared_keys,
    split_model,
    split_stack,
    without_copies,
    word_head,
    word_head_copies,
)
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, names_there
from vlp.checkpoint.names import Pair, rename_pairs
from vlp.data.presets import albef_blip, hf_processor

NUM_NLVR_IMAGES = 2
VISION = "visual_encoder"
VIT = tuple(
    f"{part}.{{p}}"
    for part in (
        "patch_embed.proj",
        "norm",
        *(f"blocks.{{n}}.{layer}" for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    )
)
_TWIN = re.compile(r"(visual_encoder|vision_proj|text_encoder|text_proj|text_decoder|cls_head)_m\.")
_IGNORED = {
    r"text_(encoder|decoder)(_m)?\.(bert\.)?embeddings\.position_ids": "counted anew",
}


def recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    """Whether a file is ALBEF's: BLIP's texts have no token types, X-VLM's images no ``visual_encoder``."""
    return f"{VISION}.pos_embed" in shapes and any(
        f"text_encoder.{prefix}embeddings.token_type_embeddings.weight" in shapes for prefix in ("", "bert.")
    )


def recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    """Return what a file is in our words."""
    text = read_stack(shapes, _text_prefix(shapes))
    vision, assumed = vit_recipe(shapes, VISION, config.get("vit", {}))
    preset = albef_blip(vision["image_size"])
    if processor := config.get("preprocessor_config"):  # beside what `vlp convert` wrote
        preset = hf_processor(processor)
        vision |= {"mean": preset.mean, "std": preset.std}
    stack, more = bert_recipe(text, config)
    model = {"vision": vision, **split_model(shapes, text, stack)}
    model["momentum"] = config.get("momentum", 0.995)
    if _two_images(shapes):
        model["fusion"]["images"] = "alternate"
    task, objectives = _objectives(shapes, config)
    question = task == "vqa"
    data = {
        "max_length": 25 if question else 30,
        "tokenizer": {
            "source": "bert-base-uncased",
            "clean": "albef_question" if question else "albef",
            "max_words": 30,
        },
        "transform": preset.transform.model_dump(exclude_defaults=True),
    }
    return Recipe({"model": model, "objectives": objectives, "data": data}, (*assumed, *more))


def vit_recipe(shapes: Shapes, prefix: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the vision encoder of a file with timm's names behind ``prefix``, and what was assumed."""
    width, _, patch, _ = shapes[f"{prefix}.patch_embed.proj.weight"]
    side = round((shapes[f"{prefix}.pos_embed"][1] - 1) ** 0.5) * patch
    hidden = shapes[f"{prefix}.blocks.0.mlp.fc1.weight"][0]
    heads, assumed = config.get("num_heads"), tuple[str, ...]()
    if heads is None:
        heads = max(1, width // 64)
        assumed = (f"{heads} heads in the vision tower (64 a head)",)
    preset = albef_blip(side)
    return {
        "kind": "patch",
        "model": "vit_base_patch16_224",
        "image_size": side,
        "patch_size": patch,
        "width": width,
        "depth": count_layers(shapes, re.escape(prefix) + r"\.blocks\.(\d+)\."),
        "heads": heads,
        "mean": preset.mean,
        "std": preset.std,
        "position_resize": "bicubic",
        "arguments": {"mlp_ratio": hidden / width},
    }, assumed


def bert_recipe(stack: Stack, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what text tower, fusion and decoder of a BERT stack share, and what was assumed."""
    bert = config.get("bert_config", {})
    bert = bert if isinstance(bert, Mapping) else {}  # in the authors' YAML it is a path
    heads, assumed = bert.get("num_attention_heads"), tuple[str, ...]()
    if heads is None:
        heads = max(1, stack.width // 64)
        assumed = (f"{heads} heads in the text layers (64 a head)",)
    dropout = bert.get("hidden_dropout_prob", 0.1)
    eps = bert.get("layer_norm_eps", 1e-12)
    return {"width": stack.width, "heads": heads, "hidden": stack.hidden, "dropout": dropout, "eps": eps}, assumed


def _text_prefix(shapes: Shapes, twin: str = "") -> str:
    """What stands before the text stack's names: ``bert.`` in pretraining."""
    bert = f"text_encoder{twin}.bert."
    return bert if f"{bert}embeddings.word_embeddings.weight" in shapes else f"text_encoder{twin}."


def _two_images(shapes: Shapes) -> bool:
    """Whether a text has two images: NLVR2 and its pretraining."""
    return "ta_head.weight" in shapes or shapes.get("cls_head.2.weight", (0,))[0] == NUM_NLVR_IMAGES


def _objectives(shapes: Shapes, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the task that a file was trained for, and its objectives."""
    twins = any(_TWIN.match(name) for name in shapes)
    distill = {"distill": config.get("alpha", 0.4)} if twins and config.get("distill", True) else {}
    if "text_decoder.cls.predictions.bias" in shapes:
        return "vqa", {
            "lm": {"memory": "fused", "view": "lm:answer", "mean": "texts", "first_word": "twice", **distill}
        }
    if "ta_head.weight" in shapes:
        return "nlvr_pretrain", {"assign": {"width": shapes["vision_proj.weight"][0]}}
    if "cls_head.0.weight" in shapes:
        answers = ("False", "True") if _two_images(shapes) else ("contradiction", "neutral", "entailment")
        return "classify", {"answer": {"answers": answers, "loss": "ce", "head": "relu", **distill}}
    found: dict[str, Any] = {}
    pretraining = "text_encoder.cls.predictions.bias" in shapes
    if "vision_proj.weight" in shapes:
        found["itc"] = {"queue": shapes.get("image_queue", (0, 0))[1], **distill}
        # Finetuning for retrieval knows equal images by their ids, and bounds the temperature no more.
        found["itc"] |= (
            {"positives": "diagonal", "min_scale": 2.0, "max_scale": 1000.0}
            if pretraining
            else {"positives": "id", "min_scale": 1e-6, "max_scale": 1e6}
        )
    if "itm_head.weight" in shapes:
        found["itm"] = {"exclude": "diagonal" if pretraining else "id", "score": "logit"}
    if pretraining:
        found["mlm"] = {"mask_probability": config.get("mlm_probability", 0.15), **distill}
    return "pretrain" if pretraining else "retrieval", found


def table(prefix: str, layers: int, split: int, twin: str = "", assigns: bool = False) -> tuple[Pair, ...]:
    """Return the names of a file's towers, fusion, decoder and heads there and here.

    Args:
        prefix: what stands before the text stack's names.
        layers: of that stack; 0 = there is none (the momentum teacher of text assignment).
        split: the first of them with cross-attention.
        twin: "_m" those of the momentum teacher.
        assigns: whether it is of text assignment, whose image projection only finds images alike.
    """
    ours = "teacher." if twin else ""
    heads = "teacher.heads." if twin else "objectives."
    pairs = [Pair(f"{VISION}{twin}.{name}", f"{ours}vision.vit.{name}") for name in ("cls_token", "pos_embed", *VIT)]
    if layers:
        pairs += split_stack(prefix, ours, layers, split)
    pairs += word_head(f"text_encoder{twin}.cls.predictions.", f"{heads}mlm.head.")
    pairs += decoder_stack(f"text_decoder{twin}.bert.", f"{ours}decoder.")
    pairs += word_head(f"text_decoder{twin}.cls.predictions.", f"{heads}lm.head.")
    if not assigns:
        pairs += [Pair(f"{side}_proj{twin}.{{p}}", f"{ours}embed.main.{mine}.{{p}}") for side, mine in SIDES]
    pairs += [Pair(f"cls_head{twin}.{{n}}.{{p}}", f"{heads}answer.head.{{n}}.{{p}}")]
    return (*pairs, *((ASSIGN if assigns else ALONE) if not twin else ()))


SIDES = (("vision", "image"), ("text", "text"))
ALONE = (
    Pair("itm_head.{p}", "objectives.itm.head.{p}"),
    Pair(
        "temp",
        "embed.main.logit_scale",
        to_ours=lambda temperature: -temperature.log().reshape(1),
        to_theirs=lambda scale: (-scale).exp().reshape(()),
    ),
    Pair("image_queue", "objectives.itc.queue.image", to_ours=lambda x: x.T, to_theirs=lambda x: x.T),
    Pair("text_queue", "objectives.itc.queue.text", to_ours=lambda x: x.T, to_theirs=lambda x: x.T),
    Pair("queue_ptr", "objectives.itc.queue.pointer"),
    Pair("idx_queue", "objectives.itc.queue.image_id", to_ours=lambda x: x[0], to_theirs=lambda x: x[None]),
)


ASSIGN = (
    Pair("ta_head.{p}", "objectives.assign.head.{p}"),
    Pair("vision_proj.{p}", "objectives.assign.alike.{p}"),
)
_UNUSED = {r"text_proj\.(weight|bias)|temp": "text assignment does not use it"}


def _copies(state: Mapping[str, Any]) -> dict[str, str]:
    """What a file stores twice."""
    found: dict[str, str] = {}
    for twin in ("", "_m"):
        for part in ("text_encoder", "text_decoder"):
            words = f"{part}{twin}.bert.embeddings.word_embeddings.weight"
            found |= word_head_copies(f"{part}{twin}.cls.predictions.", words)
    if _two_images({name: tuple(one.shape) for name, one in state.items()}):
        for twin in ("", "_m"):
            found |= shared_keys(state, f"text_encoder{twin}.encoder.layer.")
    return found


def rename(state: State) -> Renamed:
    """Rename a file's weights to ours."""
    whole, left = without_copies(state, _copies(state))
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    assigns = "ta_head.weight" in shapes
    pairs: list[Pair] = []
    for twin in ("", "_m"):
        prefix = _text_prefix(shapes, twin)
        stored = f"{prefix}embeddings.word_embeddings.weight" in shapes
        sizes = read_stack(shapes, prefix) if stored else None
        pairs += (
            table(prefix, sizes.layers, sizes.split, twin, assigns) if sizes else table(prefix, 0, 0, twin, assigns)
        )
    found = rename_pairs(pairs, whole, _IGNORED | _UNUSED if assigns else _IGNORED)
    return Renamed(found.state, found.ignored | left, names_there(found.unexpected, whole, state))


FAMILY = Family("albef", recognise, recipe, rename)
