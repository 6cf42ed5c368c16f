"""torchmultimodal's FLAVA: the model, or the model with its pretraining losses (and DALL-E's codebook).

Unlike transformers', its fused stack sees the padding of texts, and the norms in the losses' heads have epsilon 1e-5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlp.checkpoint import flava, tmm_parts
from vlp.checkpoint.bert_stack import without_copies
from vlp.checkpoint.clip import scalar_pairs
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, shapes_of
from vlp.checkpoint.names import Pair, rename_pairs
from vlp.data.presets import albef_blip

_SCALE = "loss.contrastive_loss.logit_scale"
_HEADS = {"mim_loss": "mim", "mlm_loss": "mlm", "mmm_loss.mim": "mmm_image", "mmm_loss.mlm": "mmm_text"}
_CODEBOOK = "image_codebook.encoder.blocks."
_POSITIONS = "image_encoder.embeddings.position_embeddings"
_EPS, _HEAD_EPS = 1e-12, 1e-5
_SIDES = (("image", "image"), ("text", "text"), ("mm", "multimodal"))
_NAMED = flava.Parts("image_encoder", "text_encoder", "mm_encoder")


def _plain(names: Mapping[str, Any]) -> dict[str, Any]:
    """Take off the name of the model within that with the losses."""
    return {name.removeprefix("model."): value for name, value in names.items()}


def _trained(names: Mapping[str, Any]) -> bool:
    return any(name.startswith("loss.itm_loss.") for name in names)


def _stack(shapes: Shapes, config: Mapping[str, Any], part: str, name: str) -> dict[str, Any]:
    found = tmm_parts.stack(shapes, f"{part}_encoder.encoder.", config, (f"{name}_num_attention_heads",))
    return found | {"activation": "gelu", "eps": tmm_parts.argument(config, f"{name}_layer_norm_eps", default=_EPS)}


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    plain, trained = _plain(shapes), _trained(shapes)
    preset = albef_blip(224)
    stacks = {f"{part}_encoder": _stack(plain, config, part, name) for part, name in _SIDES}
    tree = flava.tree(plain, _NAMED, stacks, preset, trained)
    model = tree["model"]
    model["fusion"]["mask_text"] = False
    model["text"]["padding_id"] = tmm_parts.argument(config, "pad_token_id", default=0)  # which is seen, not trained
    if _CODEBOOK + "input.w" in plain:
        model["codebook"] = {
            "codes": plain[_CODEBOOK + "output.conv.w"][0],
            "width": plain[_CODEBOOK + "input.w"][0],
            "blocks": _codebook_blocks(plain),
        }
    if trained:
        head = {"eps": tmm_parts.argument(config, "loss_layer_norm_eps", default=_HEAD_EPS)}
        tree["objectives"] = flava.losses(plain["loss.mim_loss.cls.decoder.weight"][0], {}, head)
    said = tmm_parts.argument(config, "image_num_attention_heads")
    return Recipe(tree, () if said else ("heads of width 64, as in its published sizes",))


def _codebook_blocks(shapes: Shapes) -> int:
    return count_layers(shapes, re.escape(_CODEBOOK) + r"group_1\.block_(\d+)\.") - 1


def _table(pooler: str, codebook_blocks: int, axes: int) -> tuple[Pair, ...]:
    """Names of a file's weights there and here; ``pooler`` is that of the fused vector there."""
    pairs = [
        *flava.tower_pairs(_NAMED, pooler),
        Pair("text_encoder.embeddings.layer_norm.{p}", "text.embeddings.norm.{p}"),
        Pair("loss.itm_loss.cls.seq_relationship.{p}", "objectives.itm.head.{p}"),
        scalar_pairs(_SCALE, axes=axes)[0],
        *tmm_parts.layers("image_encoder.encoder.", "vision.vit.", image=True),
        *tmm_parts.layers("text_encoder.encoder.", "text."),
        *tmm_parts.layers("mm_encoder.encoder.", "fusion."),
    ]
    for loss, ours in _HEADS.items():
        theirs, here = f"loss.{loss}.cls.", f"objectives.{ours}.head."
        pairs.append(Pair(theirs + "dense.{p}", here + "dense.{p}"))
        pairs.append(Pair(theirs + "layer_norm.{p}", here + "norm.{p}"))
        pairs.append(Pair(theirs + "decoder.weight", here + "decoder.weight"))
        pairs.append(Pair(theirs + "bias", here + "decoder.bias"))
    kinds = {"w": "weight", "b": "bias"}
    return (*pairs, *flava.codebook_pairs(_CODEBOOK, "", "res_path.", codebook_blocks, kinds))


def _rename(state: State) -> Renamed:
    trained = _trained(state)
    stored = {name.removeprefix("model."): name for name in state}
    unread = {
        name: "no loss reads it"
        for name in stored
        if trained and re.fullmatch(r"(image|text|mm)_encoder\.pooler\..*", name)
    }
    whole, copies = without_copies(
        {name: one for name, one in _plain(state).items() if name not in unread},
        {f"loss.{loss}.cls.decoder.bias": f"loss.{loss}.cls.bias" for loss in _HEADS},
    )
    axes = whole[_SCALE].dim() if _SCALE in whole else 0
    pooler = "loss.itm_loss.pooler." if trained else "mm_encoder.pooler."
    found = rename_pairs(_table(pooler, _codebook_blocks(shapes_of(whole)), axes), whole)
    if not trained and _SCALE not in whole:
        found.state["embed.main.logit_scale"] = tmm_parts.first_scale()
    left = {stored[name]: reason for name, reason in (found.ignored | unread | copies).items()}
    return Renamed(found.state, left, tuple(stored[name] for name in found.unexpected))


FAMILY = Family(
    "tmm_flava",
    lambda shapes, config: (
        {_POSITIONS, "mm_encoder.layernorm.weight", "image_to_mm_projection.weight"} <= _plain(shapes).keys()
    ),
    _recipe,
    _rename,
)
