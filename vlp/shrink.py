"""`--shrink`: a recipe with every part that it has, each of them tiny, to try it and its data in a minute anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from encoders import GridConfig
from vlp.config import Config, load
from vlp.data.tokenizer import TokenizerConfig
from vlp.model_config import ModelConfig
from vlp.recipes import Layer, Migrate

C = TypeVar("C", bound=Config)

SMALL: dict[str, Callable[[Any], Any]] = {
    "width": lambda value: 32,
    "heads": lambda value: 4,
    "hidden": lambda value: None if value is None else 64,
    "layers": lambda value: 2 if value is None else min(value, 2),
    "depth": lambda value: 2 if value is None else min(value, 2),
    "init": lambda value: None,
    "pretrained": lambda value: False,
    "image_size": lambda value: None if value is None else 32,
    "patch_size": lambda value: value if value == 1 else 4,
    "hybrid": lambda value: None if value is None else "resnet18",
    "stem": lambda value: (8,) * len(value),
    "vocabulary_size": lambda value: None,  # the tokenizer's
    "max_length": lambda value: min(value, 16),
    "fused_first": lambda value: None if value is None else 63,
    "number": lambda value: min(value, 9),
    "image_width": lambda value: None if value is None else 48,
    "image_heads": lambda value: None if value is None else 4,
    "image_hidden": lambda value: None if value is None else 64,
    "cross_width": lambda value: None if value is None else 48,
    "cross_heads": lambda value: None if value is None else 4,
    "pooled_width": lambda value: None if value is None else 24,
    "queue": lambda value: min(value, 20),
    "image_share": lambda value: 0.3,  # some of a few images, and not all
    "micro_batch": lambda value: min(value, 6),
    "global_batch": lambda value: min(value, 12),
    "samples": lambda value: min(value, 240),
    "warmup": lambda value: min(value, 60),
}
"""Sizes by the names of their fields, wherever in the tree they stand."""
SMALL_GRIDS: dict[str, dict[str, Any]] = {
    "resnet152.tv_in1k": {"model": "resnet18"},
    "resnet101.tv_in1k": {"model": "resnet10t", "arguments": {"output_stride": 8}},
    "tf_efficientnet_l2": {"model": "tf_efficientnet_b0"},
    "resnet101": {"model": "resnet18"},
    "swin_base_patch4_window7_224.ms_in22k": {
        "arguments": {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    },
}
"""What is smaller than a network of timm that is large."""


def shrink(config: C) -> C:
    """Return the configuration with small sizes, nothing pretrained, and a tokenizer of the captions' own words."""
    found: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, TokenizerConfig):
            value = TokenizerConfig(size=512, codes=min(value.codes, 9), bins=min(value.bins, 100))
        elif isinstance(value, Config):
            value = shrink(value)
        elif isinstance(value, dict):
            value = {key: shrink(each) if isinstance(each, Config) else each for key, each in value.items()}
        elif name in SMALL:
            value = SMALL[name](value)
        found[name] = value
    if isinstance(config, GridConfig):
        found |= SMALL_GRIDS.get(config.model, {})
    if isinstance(config, ModelConfig) and config.embed.image == "none":  # the space is the tower's own
        found["embed"] = found["embed"].model_copy(update={"width": found["vision"].build().width})
    tokens = {token: None for one in found.get("objectives", {}).values() for token in one.tokens}
    if tokens:
        tokenizer = found["data"].tokenizer.model_copy(update={"added_tokens": tuple(tokens)})
        found["data"] = found["data"].model_copy(update={"tokenizer": tokenizer})
    return type(config)(**found)


def shrunk_layer(cls: type[Config], recipe: str | Path, *, group: str = "", migrate: Migrate | None = None) -> Layer:
    """Return the whole tree of a recipe, shrunk, for flags to be laid over."""
    return Layer(shrink(load(cls, recipe, group=group, migrate=migrate)).model_dump(), f"{recipe} --shrink")
