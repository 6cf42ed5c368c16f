"""METER (Dou et al. 2022) as its authors save it: CLIP's ViT or Swin, RoBERTa or BERT, and co-attention; all its tasks.

Sizes come from the weights. The heads of the fusion are ``config["num_heads"]``, those of CLIP's tower
``config["vision_heads"]`` and those of the text tower ``config["text_heads"]``, else width / 64 as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.bert_stack import CROSS, LAYER, embeddings
from vlp.checkpoint.clip import IMAGE_BLOCK, TOWER, image_pairs, patch_tower
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State, count_layers, shapes_of
from vlp.checkpoint.names import Pair, blocks
from vlp.checkpoint.swin import swin_buffers, swin_pairs, swin_side, swin_tower
from vlp.checkpoint.vilt import HEADS, head_objectives, heads_left_out, num_heads, rename_read, swap_modalities
from vlp.data.presets import meter_clip, meter_imagenet

_VISUAL, _SWIN, _TEXT = "vit_model.visual.", "vit_model.", "text_transformer."
_CROSS = "cross_modal_{side}_layers."


def _recognise(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    return "cross_modal_text_transform.weight" in shapes and any(name.startswith("vit_model.") for name in shapes)


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    assumed: list[str] = []
    width, memory = shapes["cross_modal_text_transform.weight"]
    swin = _is_swin(shapes)
    vision = _swin(shapes, config, assumed) if swin else _vision(shapes, config, assumed)
    roberta = _is_roberta(shapes, config)
    length = _positions(shapes) - (2 if roberta else 0)
    tree = {
        "model": {
            "vision": vision,
            "text": {
                "width": memory,
                "layers": count_layers(shapes, rf"{_TEXT}encoder\.layer\.(\d+)\."),
                "heads": _heads(config, "text_heads", memory, assumed),
                "hidden": shapes[f"{_TEXT}encoder.layer.0.intermediate.dense.weight"][0],
                "vocabulary_size": shapes[f"{_TEXT}embeddings.word_embeddings.weight"][0],
                "max_length": length,
                "position_offset": 2 if roberta else 0,
                "segments": shapes[f"{_TEXT}embeddings.token_type_embeddings.weight"][0],
                "eps": 1e-5 if roberta else 1e-12,
            },
            "fusion": {
                "kind": "dual_stream",
                "attention": "co",
                "width": width,
                "layers": count_layers(shapes, r"cross_modal_text_layers\.(\d+)\."),
                "heads": num_heads(config, width, assumed),
                "hidden": shapes["cross_modal_text_layers.0.intermediate.dense.weight"][0],
                "eps": 1e-12,
                "project": True,
                "modality_embedding": True,
                "pooler": "concat",
                "image_pool": "mean" if swin else "first",
                "images": "each" if "nlvr2_classifier.0.weight" in shapes else "one",
            },
        },
        "objectives": head_objectives(shapes, assumed, {"whole_word": False, "eps": 1e-12}),
        "data": {
            "max_length": min(50, length),
            "tokenizer": {"source": "roberta-base" if roberta else "bert-base-uncased"},
            "transform": {"resampler": "pillow", "resize": "shortest"},
        },
    }
    return Recipe(tree, tuple(assumed))


def _is_swin(names: Mapping[str, Any]) -> bool:
    """Whether the vision tower is Swin.

    Raises:
        ValueError: it is neither that nor CLIP's ViT.
    """
    swin = f"{_SWIN}layers.0.blocks.0.attn.relative_position_bias_table" in names
    if not swin and f"{_VISUAL}class_embedding" not in names:
        raise ValueError(
            "METER checkpoint: its vision tower is neither CLIP's ViT nor Swin, which are those it is read with"
        )
    return swin


def _swin(shapes: Shapes, config: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    side, said = swin_side(shapes, _SWIN, config.get("image_size"))
    assumed += said
    return swin_tower(shapes, _SWIN, side, meter_imagenet(side))


def _vision(shapes: Shapes, config: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    """CLIP's tower without its last block; the last norm goes over all tokens."""
    return patch_tower(
        shapes,
        f"{_VISUAL}conv1.weight",
        f"{_VISUAL}positional_embedding",
        layers=count_layers(shapes, rf"{_VISUAL}transformer\.resblocks\.(\d+)\."),
        heads=_heads(config, "vision_heads", shapes[f"{_VISUAL}class_embedding"][0], assumed),
        hidden=shapes[f"{_VISUAL}transformer.resblocks.0.mlp.c_fc.weight"][0],
        activation="quick_gelu",
        eps=1e-5,
        preset=meter_clip(),
    )


def visual_blocks(theirs: str) -> tuple[Pair, ...]:
    """Return the names of the blocks of OpenAI CLIP's ViT."""
    return blocks(
        f"{theirs}transformer.resblocks.{{n}}.",
        IMAGE_BLOCK,
        {
            "ln_1": "norm1",
            "attn.in_proj_{p}": "attn.qkv.{p}",
            "attn.out_proj": "attn.proj",
            "ln_2": "norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        },
    )


def _positions(shapes: Shapes) -> int:
    return shapes[f"{_TEXT}embeddings.position_embeddings.weight"][0]


def _heads(config: Mapping[str, Any], name: str, width: int, assumed: list[str]) -> int:
    if name not in config:
        assumed.append(f"{name} {max(1, width // 64)}")
    return int(config.get(name, max(1, width // 64)))


def _is_roberta(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    """By the tokenizer's name, else as only BERT has a second segment."""
    if "tokenizer" in config:
        return "roberta" in str(config["tokenizer"])
    return shapes[f"{_TEXT}embeddings.token_type_embeddings.weight"][0] == 1


def cross_names(prefix: str = "") -> tuple[Pair, ...]:
    """Return the names of METER's and BridgeTower's co-attention, which begin with ``prefix``."""
    text, image = (prefix + _CROSS.format(side=side) + "{n}." for side in ("text", "image"))
    return (
        Pair(f"{prefix}token_type_embeddings.weight", "fusion.modality.weight", swap_modalities, swap_modalities),
        *blocks(text, "fusion.blocks.{n}.", LAYER | CROSS),
        *blocks(image, "fusion.image_blocks.{n}.", LAYER | CROSS),
        Pair(f"{prefix}cross_modal_text_pooler.dense.{{p}}", "fusion.pooler.text.{p}"),
        Pair(f"{prefix}cross_modal_image_pooler.dense.{{p}}", "fusion.pooler.image.{p}"),
    )


_CLIP_NAMES = (
    Pair(f"{_VISUAL}conv1.weight", TOWER + "patch_embed.proj.weight"),
    *image_pairs(_VISUAL, "positional_embedding", "class_embedding", ("ln_pre", "ln_post")),
    *visual_blocks(_VISUAL),
)
_NAMES = (
    *embeddings(_TEXT, "text."),
    *blocks(f"{_TEXT}encoder.layer.{{n}}.", "text.blocks.{n}.", LAYER),
    Pair("cross_modal_text_transform.{p}", "fusion.text_project.{p}"),
    Pair("cross_modal_image_transform.{p}", "fusion.image_project.{p}"),
    *cross_names(),
    *HEADS,
)
_IGNORED = {
    r"text_transformer\.embeddings\.position_ids": "counted",
    r"text_transformer\.pooler\..+": "not used by METER",
}
_CLIP_IGNORED = {
    r"vit_model\.(?!visual\.).+": "CLIP's text tower, not used by METER",
    r"vit_model\.visual\.proj": "CLIP's projection, not used by METER",
}
_SWIN_IGNORED = {r"vit_model\.head\..+": "Swin's classifier, not used by METER", **swin_buffers(_SWIN)}


def last_image_layer(state: State, prefix: str = "") -> str:
    """Return the pattern of what only the pooled vector reads: the last image layer and the poolers."""
    last = count_layers(dict.fromkeys(state, ()), rf"{prefix}cross_modal_image_layers\.(\d+)\.") - 1
    return rf"{prefix}(cross_modal_image_layers\.{last}\.|cross_modal_(text|image)_pooler\.).+"


def _rename(state: State) -> Renamed:
    swin = _is_swin(state)
    names = (*_NAMES, *(swin_pairs(shapes_of(state), _SWIN) if swin else _CLIP_NAMES))
    ignored = _IGNORED | (_SWIN_IGNORED if swin else _CLIP_IGNORED)
    return rename_read(names, state, ignored | heads_left_out(state, last_image_layer(state)))


FAMILY = Family("meter", _recognise, _recipe, _rename)
