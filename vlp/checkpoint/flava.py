"""What FLAVA's checkpoints have in common (Singh et al. 2022): three pre-norm stacks, its losses, its image codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlp.checkpoint.bert_stack import embeddings
from vlp.checkpoint.clip import feed_arguments
from vlp.checkpoint.foreign import Shapes
from vlp.checkpoint.names import Pair
from vlp.data.presets import Preset

IMAGE_BLOCK = "vision.vit.blocks.{n}."
TEXT_BLOCK, FUSED_BLOCK = "text.blocks.{n}.", "fusion.blocks.{n}."
VIT_BLOCK: dict[str, str | tuple[str, ...]] = {
    "norm_before": "norm1",
    "norm_after": "norm2",
    "query_key_value": "attn.qkv",
    "attention_out": "attn.proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
"""Parts of a block as a timm ViT calls them."""
OWN_BLOCK: dict[str, str | tuple[str, ...]] = {
    "norm_before": "attention_norm",
    "norm_after": "feed_norm",
    "query_key_value": ("attention.query", "attention.key", "attention.value"),
    "attention_out": "attention.out",
    "up": "feed.up",
    "down": "feed.down",
}
"""The same as our own stacks call them."""
WORDS = {"source": "bert-base-uncased"}
MAX_LENGTH = 77
CODEBOOK_GROUPS = 4


def vision(
    *,
    positions: tuple[int, ...],
    patches: tuple[int, ...],
    layers: int,
    heads: int,
    hidden: int,
    activation: str,
    eps: float,
    mask_token: bool,
    pooler: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Any]:
    """Return `model.vision` of positions [1, N, D] and patches [D, 3, p, p]."""
    width, _, side, _ = patches
    return {
        "kind": "patch",
        "model": "vit_base_patch16_224",
        "image_size": math.isqrt(positions[1] - 1) * side,
        "patch_size": side,
        "width": width,
        "depth": layers,
        "heads": heads,
        "eps": eps,
        "mask_token": mask_token,
        "pool": "tanh" if pooler else None,
        "position_resize": "bicubic",
        "mean": list(mean),
        "std": list(std),
        "arguments": feed_arguments(width, hidden, activation),
    }


def text(
    *,
    words: tuple[int, ...],
    positions: int,
    segments: int,
    layers: int,
    heads: int,
    hidden: int,
    activation: str,
    eps: float,
    pooler: bool,
) -> dict[str, Any]:
    """Return `model.text` of words [V, D]."""
    return {
        "kind": "text",
        "vocabulary_size": words[0],
        "width": words[1],
        "max_length": positions,
        "segments": segments,
        "layers": layers,
        "heads": heads,
        "hidden": hidden,
        "norm": "pre",
        "activation": activation,
        "eps": eps,
        "pool": "tanh" if pooler else "cls",
    }


def fusion(*, width: int, layers: int, heads: int, hidden: int, activation: str, eps: float) -> dict[str, Any]:
    """Return `model.fusion`: the towers' states before their last norm, projected, behind a class token."""
    return {
        "kind": "single_stream",
        "width": width,
        "layers": layers,
        "heads": heads,
        "hidden": hidden,
        "norm": "pre",
        "activation": activation,
        "eps": eps,
        "modality_embedding": False,
        "before_norm": True,
        "project": "both",
        "class_token": True,
        "pooler": "tanh",
    }


@dataclass(frozen=True)
class Parts:
    """What the three stacks are called in a file."""

    image: str
    text: str
    fused: str


def tree(
    shapes: Shapes, parts: Parts, stacks: Mapping[str, Mapping[str, Any]], preset: Preset, trained: bool
) -> dict[str, Any]:
    """Return what a file is in our words, but for its image codes and further losses.

    Args:
        shapes: of its weights.
        parts: names of its stacks.
        stacks: sizes of each, by those names.
        preset: what images go through.
        trained: whether it holds the pretraining losses, none of which reads the towers' poolers.
    """
    image, words = f"{parts.image}.embeddings.", f"{parts.text}.embeddings."
    seen = vision(
        positions=shapes[image + "position_embeddings"],
        patches=shapes[image + "patch_embeddings.projection.weight"],
        mask_token=image + "mask_token" in shapes,
        pooler=not trained,
        mean=preset.mean,
        std=preset.std,
        **stacks[parts.image],
    )
    read = text(
        words=shapes[words + "word_embeddings.weight"],
        positions=shapes[words + "position_embeddings.weight"][0],
        segments=shapes[words + "token_type_embeddings.weight"][0],
        pooler=not trained,
        **stacks[parts.text],
    )
    fused = fusion(width=shapes[f"{parts.fused}.layernorm.weight"][0], **stacks[parts.fused])
    return {
        "model": {
            "vision": seen,
            "text": read,
            "fusion": fused | {"class_token": f"{parts.fused}.cls_token" in shapes},
            "embed": {"width": shapes["image_projection.weight"][0], "reads": "first"},
            "keep_unread": not trained,
        },
        "objectives": {"itc": {"positives": "diagonal"}},
        "data": {
            "max_length": min(MAX_LENGTH, read["max_length"]),
            "tokenizer": WORDS,
            "transform": preset.transform.model_dump(exclude_defaults=True, exclude={"image_size"}),
        },
    }


def tower_pairs(parts: Parts, pooler: str) -> tuple[Pair, ...]:
    """Return the names of a file's weights outside layers and losses; ``pooler`` is that of the fused vector there."""
    image = f"{parts.image}.embeddings."
    pairs = [
        Pair(image + "cls_token", "vision.vit.cls_token"),
        Pair(image + "mask_token", "vision.mask_token"),
        Pair(image + "position_embeddings", "vision.vit.pos_embed"),
        Pair(image + "patch_embeddings.projection.{p}", "vision.vit.patch_embed.proj.{p}"),
        Pair(f"{parts.image}.layernorm.{{p}}", "vision.vit.norm.{p}"),
        Pair(f"{parts.image}.pooler.dense.{{p}}", "vision.pooler.{p}"),
        *embeddings(f"{parts.text}.", "text."),
        Pair(f"{parts.text}.layernorm.{{p}}", "text.final_norm.{p}"),
        Pair(f"{parts.text}.pooler.dense.{{p}}", "text.pooler.{p}"),
        Pair(f"{parts.fused}.cls_token", "fusion.class_token"),
        Pair(f"{parts.fused}.layernorm.{{p}}", "fusion.final_norm.{p}"),
        Pair(pooler + "dense.{p}", "fusion.pooler.text.{p}"),
    ]
    for side in ("image", "text"):
        pairs.append(Pair(f"{side}_projection.{{p}}", f"embed.main.{side}.{{p}}"))
        pairs.append(Pair(f"{side}_to_mm_projection.{{p}}", f"fusion.{side}_project.{{p}}"))
    return tuple(pairs)


def losses(codes: int, weights: Mapping[str, float], head: Mapping[str, Any]) -> dict[str, Any]:
    """Return FLAVA's losses: contrast, matching and MMM of pairs; MIM of images and MLM of texts alone.

    Args:
        codes: of the images.
        weights: of the losses, by their names here; 1 where there is none.
        head: activation and epsilon of the heads.
    """
    found: dict[str, dict[str, Any]] = {
        "itc": {"kind": "itc", "positives": "diagonal", "matched": True},
        "itm": {"kind": "itm", "scheme": "given", "masked": True},
        "mmm_image": {"kind": "mim", "codes": codes, "matched": True, **head},
        "mmm_text": {"kind": "mlm", "image": "masked", "tied": False, "matched": True, **head},
        "mim": {"kind": "mim", "codes": codes, "unpaired": True, **head},
        "mlm": {"kind": "mlm", "tied": False, "unpaired": True, **head},
    }
    return {name: one | {"weight": weights.get(name, 1.0)} for name, one in found.items()}


def codebook_pairs(theirs: str, group: str, path: str, blocks: int, kinds: Mapping[str, str]) -> tuple[Pair, ...]:
    """Return the names of the discrete VAE's encoder.

    Args:
        theirs: before every name there.
        group: between a group's name and its blocks' there.
        path: of a block's convolutions there.
        blocks: of a group.
        kinds: weight and bias there -> here.
    """
    named = [("input", "input"), ("output.conv", "output")]
    for number in range(CODEBOOK_GROUPS):
        for block in range(blocks):
            there = f"group_{number + 1}.{group}block_{block + 1}."
            here = f"groups.{number}.{block}."
            named.append((there + "id_path", here + "skip"))
            named += [(f"{there}{path}conv_{n + 1}", f"{here}layers.{n}") for n in range(4)]
    return tuple(
        Pair(f"{theirs}{there}.{kind}", f"codebook.{here}.{ours}")
        for there, here in named
        for kind, ours in kinds.items()
    )
