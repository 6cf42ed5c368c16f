"""transformers' ALIGN: an EfficientNet without projection, BERT with one, and a temperature that divides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp.checkpoint.clip import TEXT_PROJECTION, softmax_loss, two_towers
from vlp.checkpoint.foreign import Family, Recipe, Renamed, Shapes, State
from vlp.checkpoint.hf_clip import BERT_NAMES, BUFFERS, bert_tower, preset_of, section, unstated
from vlp.checkpoint.names import Pair, rename_pairs
from vlp.data.presets import hf_processor

_PUBLISHED = {  # of kakaobrain/align-base, whose processor divides by 127.5 and takes the mean off
    "image_processor_type": "EfficientNetImageProcessor",
    "size": {"height": 346, "width": 346},
    "do_center_crop": True,
    "crop_size": {"height": 289, "width": 289},
    "resample": 2,
    "rescale_factor": 1 / 127.5,
    "rescale_offset": True,
    "do_normalize": False,
    "include_top": False,
}
_NAMES = (
    Pair("vision_model.{rest}", "vision.model.{rest}"),
    *BERT_NAMES,
    Pair("text_projection.{p}", TEXT_PROJECTION + "{p}"),
    Pair(
        "temperature",
        "embed.main.logit_scale",
        to_ours=lambda tensor: -tensor.log().reshape(1),
        to_theirs=lambda tensor: (-tensor).exp().reshape(()),
    ),
)
_IGNORED = BUFFERS | {r"text_model\.pooler\..*": "BERT's pooler, which the model does not read"}


def _recipe(shapes: Shapes, config: Mapping[str, Any]) -> Recipe:
    preset, assumed = preset_of(config, hf_processor(_PUBLISHED))
    width = shapes["text_projection.weight"][0]
    vision = {
        "kind": "hf_vision",
        "pretrained": False,
        "architecture": {**section(config, "vision_config"), "model_type": "align_vision_model"},
        "image_size": section(config, "vision_config").get("image_size", 600),
        "width": width,
        "mean": preset.mean,
        "std": preset.std,
    }
    text = bert_tower(shapes, section(config, "text_config"))
    embed = {"width": width, "image": "none", "bias": True, "temperature": 1.0}
    loss = softmax_loss(label_smoothing=0.1, min_scale=1e-3, max_scale=1e3)  # its temperature has no bounds
    tree = two_towers(vision, text, embed, loss, preset, {"source": "kakaobrain/align-base"})
    tree["data"]["max_length"] = min(64, text["max_length"])  # as published
    missing = unstated(config, "vision_config", "the sizes of kakaobrain/align-base")
    return Recipe(tree, (*missing, *assumed))


def _rename(state: State) -> Renamed:
    return rename_pairs(_NAMES, state, _IGNORED)


FAMILY = Family(
    "hf_align",
    lambda shapes, config: {"temperature", "vision_model.embeddings.convolution.weight"} <= shapes.keys(),
    _recipe,
    _rename,
)
