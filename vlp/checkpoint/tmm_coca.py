"""torchmultimodal's CoCa, alone or with its losses; its poolers are one (the first query contrasts) or cascaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp.checkpoint import tmm_parts
from vlp.checkpoint.clip import feed_arguments, scalar_pairs, square_side, text_tower
from vlp.checkpoint.coca import coca_tree
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State
from vlp.checkpoint.names import Pair, rename_pairs
from vlp.data.presets import meter_clip

_SCALE = "contrastive_loss.logit_scale"
_IMAGE, _TEXT, _UPPER = "vision_encoder.", "text_decoder.", "multimodal_decoder."
_LAYERS = "transformer_decoder."
_CASCADED = "vision_pooler.poolers.1.query"
_OUT = _UPPER + "output_projection.weight"
_EPS = 1e-5
_HEADS = ("vision_n_head", "text_n_head", "fusion_n_head", "pooler_n_head")


def _plain(names: Mapping[str, Any]) -> dict[str, Any]:
    """Take off the name of the model within that with the losses."""
    return {name.removeprefix("model."): value for name, value in names.items()}


def _vision(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    embed = _IMAGE + "embeddings."
    width, _, side, _ = shapes[embed + "conv_projection.weight"]
    found = tmm_parts.stack(shapes, _IMAGE + "encoder.", config, _HEADS[:1])
    class_token = embed + "cls_token" in shapes
    rows = shapes[embed + "position_embeddings"][1] - class_token
    cascaded = _CASCADED in shapes
    number, out = shapes["vision_pooler.poolers.0.query" if cascaded else "vision_pooler.query"]
    preset = meter_clip(224)
    arguments = feed_arguments(width, found["hidden"], "gelu")
    return {
        "kind": "patch",
        "model": "vit_base_patch16_224",
        "image_size": square_side(rows, "position_embeddings") * side,
        "patch_size": side,
        "width": width,
        "depth": found["layers"],
        "heads": found["heads"],
        "eps": tmm_parts.argument(config, "vision_layer_norm_eps", default=_EPS),
        "class_token": class_token,
        "mean": preset.mean,
        "std": preset.std,
        "arguments": arguments | {"final_norm": f"{_IMAGE}encoder.final_layer_norm.weight" in shapes},
        "queries": {
            "layout": "cascaded" if cascaded else "split",
            "number": number,
            "width": out,
            "heads": tmm_parts.argument(config, "pooler_n_head", "n_head", "num_heads", "heads", default=8),
            "eps": tmm_parts.argument(config, "pooler_layer_norm_eps", default=_EPS),
        },
    }


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    shapes = _plain(shapes)
    vision = _vision(shapes, config)
    words = shapes[_TEXT + "embeddings.token_embeddings.weight"]
    token = _TEXT + "embeddings.cls_embedding" in shapes
    pad = tmm_parts.argument(config, "pad_idx", default=0)
    lower = tmm_parts.stack(shapes, _TEXT + _LAYERS, config, _HEADS[1:2])
    text = text_tower(
        words,
        shapes[_TEXT + "embeddings.position_embeddings"][0] - token,
        **lower,
        activation="gelu",
        eps=tmm_parts.argument(config, "text_layer_norm_eps", default=_EPS),
        pool="token" if token else "largest",
    ) | {"padding_id": pad}
    if token:
        text |= {"token_sees": "text_late", "pad": pad or 0}
    decoder = tmm_parts.stack(shapes, _UPPER + _LAYERS, config, _HEADS[2:3]) | {
        "kind": "multimodal",
        "eps": tmm_parts.argument(config, "fusion_layer_norm_eps", default=_EPS),
    }
    transform = meter_clip(224).transform.model_dump(exclude_defaults=True, exclude={"image_size"})
    embed = {"width": shapes["vision_proj.weight"][0], "bias": False}
    tree = coca_tree(vision, text, decoder, embed, transform)
    tree["objectives"]["lm"]["weight"] = 1.0  # it leaves the weighing to its user
    assumed = []
    if tmm_parts.argument(config, *_HEADS) is None:
        assumed.append("heads of width 64 (8 of the poolers), as in its published sizes")
    if _SCALE not in shapes:
        assumed.append("temperature 0.07, without the losses' module")
    return Recipe(tree, tuple(assumed))


def _pooler(theirs: str, ours: str) -> tuple[Pair, ...]:
    return (
        Pair(theirs + "query", ours + "query"),
        Pair(theirs + "ln_q.{p}", ours + "query_norm.{p}"),
        Pair(theirs + "ln_k.{p}", ours + "token_norm.{p}"),
        Pair(theirs + "ln_post.{p}", ours + "norm.{p}"),
        *(
            Pair(there + ".{p}", here + ".{p}")
            for there, here in tmm_parts.attention(theirs + "attn.", ours + "attention.")
        ),
    )


_TABLE = (
    Pair(_IMAGE + "embeddings.cls_token", "vision.vit.cls_token"),
    Pair(_IMAGE + "embeddings.position_embeddings", "vision.vit.pos_embed"),
    Pair(_IMAGE + "embeddings.conv_projection.{p}", "vision.vit.patch_embed.proj.{p}"),
    *tmm_parts.layers(_IMAGE + "encoder.", "vision.vit.", image=True),
    Pair(_IMAGE + "encoder.final_layer_norm.{p}", "vision.vit.norm.{p}"),
    *_pooler("vision_pooler.", "vision.queries.tokens."),
    *_pooler("vision_pooler.poolers.0.", "vision.queries.tokens."),
    *_pooler("vision_pooler.poolers.1.", "vision.queries.contrast."),
    Pair("vision_proj.weight", "embed.main.image.weight"),
    Pair(_TEXT + "embeddings.cls_embedding", "text.token"),
    Pair(_TEXT + "embeddings.token_embeddings.weight", "text.embeddings.word.weight"),
    Pair(_TEXT + "embeddings.position_embeddings", "text.embeddings.position.weight"),
    *tmm_parts.layers(_TEXT + _LAYERS, "text."),
    Pair(_TEXT + "ln_final.{p}", "text.final_norm.{p}"),
    Pair(_TEXT + "text_projection.weight", "embed.main.text.weight"),
    *tmm_parts.layers(_UPPER + _LAYERS, "decoder."),
    *tmm_parts.crosses(_UPPER + _LAYERS, "decoder."),
    Pair(_UPPER + _LAYERS + "final_layer_norm.{p}", "decoder.final_norm.{p}"),
    Pair(_OUT, "objectives.lm.head.weight"),
)
_IGNORED = {r"(text|multimodal)_decoder\.causal_mask": "a buffer"}


def _rename(state: State) -> Renamed:
    plain, stored = _plain(state), {name.removeprefix("model."): name for name in state}
    axes = plain[_SCALE].dim() if _SCALE in plain else 0
    found = rename_pairs((*_TABLE, scalar_pairs(_SCALE, axes=axes)[0]), plain, _IGNORED)
    if _SCALE not in plain:
        found.state["embed.main.logit_scale"] = tmm_parts.first_scale()
    left = {stored[name]: reason for name, reason in found.ignored.items()}
    return Renamed(found.state, left, tuple(stored[name] for name in found.unexpected))


FAMILY = Family(
    "tmm_coca",
    lambda shapes, config: {_OUT, "vision_proj.weight", _TEXT + "text_projection.weight"} <= _plain(shapes).keys(),
    _recipe,
    _rename,
)
