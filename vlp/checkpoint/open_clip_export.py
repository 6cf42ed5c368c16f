"""Two towers back into open_clip: its own ViT with a text transformer, or a tower of timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vlp.checkpoint.clip import CLIP_WORDS, scalar_pairs
from vlp.checkpoint.clip_export import (
    check_whole,
    end_id,
    first_problem,
    image_tower,
    space_of,
    taken_weights,
    text_config,
    text_tower,
    towers_problem,
    vision_config,
    vit_of,
)
from vlp.checkpoint.export import Exported, Exporter, other_look
from vlp.checkpoint.names import Pair, restore_pairs
from vlp.checkpoint.open_clip import image_names, text_names, trunk_names
from vlp.data.presets import openclip

if TYPE_CHECKING:
    from vlp.loaded import Loaded

_POOLS = {"largest": "argmax", "end": "last", "cls": "first", "eos": "eos", "last": "eos"}
"""Ours -> open_clip's; the last real token is the first end id."""


def _text_cfg(loaded: Loaded) -> dict[str, Any]:
    """open_clip's config of the text tower."""
    text, tower = text_config(loaded), text_tower(loaded)
    words = loaded.model.text.word_embedding.shape[0]
    found: dict[str, Any] = {
        "context_length": text.max_length,
        "vocab_size": words,
        "width": tower.width,
        "heads": tower.heads,
        "layers": tower.layers,
        "mlp_ratio": tower.hidden / tower.width,
        "pool_type": _POOLS[text.pool],
        "norm_kwargs": {"eps": tower.eps},
    }
    if (end := end_id(loaded)) is not None:
        found["eos_id"] = end
    if not text.causal:
        found["no_causal_mask"] = True
    source = loaded.config.data.tokenizer
    if words != CLIP_WORDS:
        # A folder's own files are what open_clip reads, whatever the name.
        found["hf_tokenizer_name"] = "." if source.source == "train" else source.source
        found["tokenizer_kwargs"] = {
            "clean": source.clean if source.clean in ("lower", "canonicalize") else "whitespace"
        }
    return found


def _open_clip(
    state: Mapping[str, Tensor], loaded: Loaded, vision: dict[str, Any], image: tuple[Pair, ...], custom: bool
) -> Exported:
    """The state and config of open_clip's CLIP, or, with a tower of timm or a bias, of its CustomTextCLIP."""
    from open_clip.model import CLIP, CustomTextCLIP

    taken, left_out = taken_weights(state)
    space, tower = space_of(loaded), text_tower(loaded)
    linear = "embed.main.text.bias" in taken
    found = restore_pairs((*image, *text_names("text." if custom else "", linear), *scalar_pairs()), taken)
    model: dict[str, Any] = {"embed_dim": space.width, "vision_cfg": vision, "text_cfg": _text_cfg(loaded)}
    if linear:
        model["text_cfg"]["proj_bias"] = True
    if loaded.model.config.embed.text == "none":
        model["text_cfg"]["proj_type"] = "none"
    if tower.activation == "quick_gelu":
        model["quick_gelu"] = True
    elif tower.activation == "gelu_tanh":
        model["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    if space.logit_bias is not None:
        model["init_logit_bias"] = -10
    check_whole(found, lambda: (CustomTextCLIP if custom else CLIP)(**model), "open_clip's model")
    preset, patch = loaded.config.data.transform, vision_config(loaded)
    settings = {
        "model_cfg": {**model, **({"custom_text": True} if custom else {})},
        "preprocess_cfg": {
            "mean": list(patch.mean or ()),
            "std": list(patch.std or ()),
            "interpolation": preset.interpolation,
            "resize_mode": preset.resize,
            "fill_color": preset.fill,
        },
    }
    left_out += other_look(preset, openclip(settings["preprocess_cfg"]).transform)
    words = (lambda folder: None) if len(state["text.embeddings.word.weight"]) == CLIP_WORDS else None
    return Exported(found, settings, {}, words, left_out)


def _native_problem(loaded: Loaded) -> str | None:
    if problem := towers_problem(loaded):
        return problem
    vision, image, text = vision_config(loaded), image_tower(loaded), text_tower(loaded)
    return first_problem(
        (not vision.class_token or vision.pool not in (None, "class"), "its image is not pooled at a class token"),
        (isinstance(vit_of(loaded).norm_pre, nn.Identity), "its image tower has no norm before the blocks"),
        (text_config(loaded).pool not in _POOLS, f"its texts are pooled by {text_config(loaded).pool}"),
        (not {image.activation, text.activation} <= {"quick_gelu", "gelu", "gelu_tanh"}, "its activation is no GELU"),
        ((image.activation == "quick_gelu") != (text.activation == "quick_gelu"), "one tower alone has QuickGELU"),
        (image.width % image.heads != 0, "its image tower's width is no multiple of its heads"),
    )


def _native(state: Mapping[str, Tensor], loaded: Loaded) -> Exported:
    tower, vision = image_tower(loaded), vision_config(loaded)
    found: dict[str, Any] = {
        "image_size": vision.image_size,
        "patch_size": vit_of(loaded).patch_embed.patch_size[0],
        "layers": tower.layers,
        "width": tower.width,
        "head_width": tower.width // tower.heads,
        "mlp_ratio": tower.hidden / tower.width,
        "norm_kwargs": {"eps": tower.eps},
    }
    if tower.activation == "gelu_tanh":
        found["act_kwargs"] = {"approximate": "tanh"}
    if "vision.vit.blocks.0.ls1.gamma" in state:
        found["ls_init_value"] = 1.0
    custom = "embed.main.text.bias" in state
    return _open_clip(state, loaded, found, image_names(), custom)


def _trunk_problem(loaded: Loaded) -> str | None:
    if problem := towers_problem(loaded):
        return problem
    vision = vision_config(loaded)
    sizes = {"patch_size", "width", "depth", "heads", "eps", "stem", "arguments"}
    changed = sorted(name for name in sizes if getattr(vision, name))
    return first_problem((bool(changed), f"its image tower is timm's {vision.model} with another {', '.join(changed)}"))


def _trunk(state: Mapping[str, Tensor], loaded: Loaded) -> Exported:
    vision, embed = vision_config(loaded), loaded.model.config.embed
    found = {
        "timm_model_name": vision.model,
        "timm_model_pretrained": False,
        "image_size": vision.image_size,
        "timm_pool": {"map": "map", "mean": "avg"}.get(vision.pool or "", "token"),
        "timm_proj": "linear" if embed.image == "linear" else "none",
        "timm_proj_bias": "embed.main.image.bias" in state,
    }
    return _open_clip(state, loaded, found, trunk_names("vision.vit."), custom=True)


_FILES = {"weights": "open_clip_model.safetensors", "settings": "open_clip_config.json"}
EXPORTERS = (
    Exporter("open_clip", "open_clip", _native_problem, _native, **_FILES),
    Exporter("open_clip with a timm tower", "open_clip", _trunk_problem, _trunk, **_FILES),
)
