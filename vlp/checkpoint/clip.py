"""What checkpoints of CLIP's kind have in common: two towers as a recipe of ours, and what their weights are called.

CLIP's and SigLIP's image tower is a timm ViT (`patch`), their text tower our own stack (`text`): a fusion can be put on
top of either, and whatever came in from one format goes out in another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.foreign import Shapes
from vlp.checkpoint.names import Pair, added_axes, shaped
from vlp.data.presets import Preset

TOWER = "vision.vit."
IMAGE_BLOCK = TOWER + "blocks.{n}."
TEXT_BLOCK = "text.blocks.{n}."
QUERY_KEY_VALUE = ("attention.query", "attention.key", "attention.value")
IMAGE_PROJECTION, TEXT_PROJECTION = "embed.main.image.", "embed.main.text."
CLIP_WORDS = 49408
"""Words of CLIP's own byte-pair encoding."""
HEAD_WIDTH = 64
"""Width of an attention head in every published tower of CLIP and most of SigLIP."""


def square_side(patches: int, what: str) -> int:
    """Return the rows of a square grid of patches.

    Raises:
        ValueError: they are no square.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(
            f"{what} has positions for {patches} patches, which are no square; vlp reads square images only"
        )
    return side


def patch_tower(
    shapes: Shapes,
    patches: str,
    positions: str,
    *,
    layers: int,
    heads: int,
    hidden: int,
    activation: str,
    eps: float,
    preset: Preset,
    class_token: bool = True,
    resize: str = "bicubic",
    stated: int | None = None,
) -> dict[str, Any]:
    """Return `model.vision` of a CLIP ViT, or of SigLIP's, which has no class token and pools by attention.

    Args:
        shapes: of the stored weights.
        patches: name of the patch embedding's weight [D, 3, p, p].
        positions: name of the position embedding [N, D].
        layers: blocks.
        heads: of the attention.
        hidden: width inside the feed-forward.
        activation: as our config calls it.
        eps: of the layer norms.
        preset: what images go through.
        class_token: False = SigLIP.
        resize: how the family interpolates position embeddings.
        stated: side of the images by the config, which may be more than its whole patches (SigLIP's 384 with patches of
            14 pixels: the last 6 are scaled to, and not seen).
    """
    width, _, side, _ = shapes[patches]
    rows = square_side(shapes[positions][-2] - class_token, positions)
    whole = rows * side
    found = {
        "kind": "patch",
        "model": "vit_base_patch16_clip_224" if class_token else "vit_base_patch16_siglip_224",
        "image_size": stated if isinstance(stated, int) and stated // side == rows else whole,
        "patch_size": side,
        "width": width,
        "depth": layers,
        "heads": heads,
        "eps": eps,
        "class_token": class_token,
        "position_resize": resize,
        "mean": preset.mean,
        "std": preset.std,
        "arguments": feed_arguments(width, hidden, activation),
    }
    return found if class_token else found | {"pool": "map"}


def feed_arguments(width: int, hidden: int, activation: str) -> dict[str, Any]:
    """Return timm's arguments for a feed-forward of this width and activation, as far as they are not its defaults."""
    found: dict[str, Any] = {}
    if hidden != 4 * width:
        ratio = hidden / width
        found["mlp_ratio"] = ratio if int(width * ratio) == hidden else (hidden + 0.5) / width  # timm rounds down
    return found if activation == "gelu" else found | {"act_layer": activation}


def text_tower(
    words: tuple[int, ...],
    length: int,
    *,
    layers: int,
    heads: int,
    hidden: int,
    activation: str,
    eps: float,
    pool: str,
    causal: bool = True,
    eos: int | None = None,
) -> dict[str, Any]:
    """Return `model.text` of a CLIP or SigLIP text transformer with words [V, D] and ``length`` positions."""
    return {
        "kind": "text",
        "vocabulary_size": words[0],
        "width": words[1],
        "max_length": length,
        "layers": layers,
        "heads": heads,
        "hidden": hidden,
        "norm": "pre",
        "activation": activation,
        "eps": eps,
        "segments": 0,
        "embed_norm": False,
        "causal": causal,
        "pool": pool,
        "eos": eos,
    }


def two_towers(
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    embed: Mapping[str, Any] | None,
    objective: Mapping[str, Any],
    preset: Preset,
    tokenizer: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the tree of two towers that meet only in a contrastive objective; without ``embed`` in none."""
    model = {"vision": dict(vision), "text": dict(text), "fusion": {"kind": "none"}}
    transform = preset.transform.model_dump(exclude_defaults=True, exclude={"image_size"})  # the encoder's
    data = {"tokenizer": dict(tokenizer), "transform": transform}
    if "max_length" in text:
        data["max_length"] = text["max_length"]
    if embed is None:
        return {"model": model, "objectives": {}, "data": data}
    return {"model": {**model, "embed": dict(embed)}, "objectives": {objective["kind"]: dict(objective)}, "data": data}


def softmax_loss(**settings: float) -> dict[str, Any]:
    """Return CLIP's own objective, in which only the diagonal is true."""
    return {"kind": "itc", "positives": "diagonal", **settings}


def sigmoid_loss() -> dict[str, Any]:
    """Return SigLIP's own objective."""
    return {"kind": "sigmoid", "positives": "diagonal"}


def clip_words(vocabulary_size: int) -> dict[str, Any]:
    """Return `data.tokenizer` of CLIP's byte-pair encoding, where the vocabulary is of its size."""
    return {"source": "open_clip:ViT-B-32"} if vocabulary_size == CLIP_WORDS else {}


def image_pairs(prefix: str, positions: str, classes: str, norms: tuple[str, str]) -> tuple[Pair, ...]:
    """Return the pairs of a CLIP ViT outside its blocks.

    Args:
        prefix: before every name there.
        positions: name of the position embedding [N, D] there.
        classes: name of the class embedding [D] there.
        norms: names of the norms before and after the blocks there.
    """
    return (
        Pair(prefix + classes, TOWER + "cls_token", **added_axes(2)),
        Pair(prefix + positions, TOWER + "pos_embed", **added_axes(1)),
        Pair(f"{prefix}{norms[0]}.{{p}}", TOWER + "norm_pre.{p}"),
        Pair(f"{prefix}{norms[1]}.{{p}}", TOWER + "norm.{p}"),
    )


def scalar_pairs(scale: str = "logit_scale", bias: str = "logit_bias", axes: int = 0) -> tuple[Pair, ...]:
    """Return the pairs of the log temperature and the bias, stored there with this number of axes."""
    shape = shaped((1,) * axes, (1,))
    return Pair(scale, "embed.main.logit_scale", **shape), Pair(bias, "embed.main.logit_bias", **shape)
