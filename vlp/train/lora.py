"""Low-rank adaptation: big parts stay as they are and learn a small difference (Hu et al. 2022, LoRA; package peft).

What a run leaves behind has the difference added to its weights, so that it loads like any other checkpoint, without
peft; what is trained, apart, is in the training state, from which a run is resumed exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from vlp.config import Config
from vlp.model import Model
from vlp.parts import part_seed


class LoraConfig(Config):
    """Parts whose linear layers learn a low-rank difference, everything else of them frozen (extra `lora`)."""

    rank: int = Field(default=8, ge=1)
    """Of the difference."""
    alpha: int = Field(default=16, ge=1)
    """The difference counts `alpha` / `rank`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On what the difference reads."""
    parts: tuple[str, ...] = ("vision", "text", "fusion")
    """Parts of the model, by the beginning of their parameters' names; the others are trained in full. Leave out one
    that begins anew."""


def adapt(model: Model, config: LoraConfig, seed: int) -> None:
    """Give every linear layer of the parts its difference, zero at first, in place.

    Raises:
        ValueError: a part has no linear layers, or a momentum teacher would have to follow the differences.
        ModuleNotFoundError: peft is not installed.
    """
    import peft

    if model.teacher is not None:
        raise ValueError("train.lora: a momentum teacher follows whole weights; set lora none, or remove the teacher")
    layers = _linears(model)
    chosen = [name for name in layers if _within(name, config.parts)]
    if empty := [part for part in config.parts if not any(_within(name, (part,)) for name in layers)]:
        parts = sorted({name.split(".")[0] for name in layers})
        raise ValueError(f"train.lora.parts {empty} have no linear layer of their own; those that have are {parts}")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    scaled = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=chosen)
    with part_seed(seed, "lora"):
        peft.inject_adapter_in_model(scaled, model)
    # peft has replaced a layer in the first place where it is; others may share it (ALBEF's two images).
    _exchange(model, {layer.get_base_layer(): layer for _, layer in _adapted(model)})
    for name, parameter in model.named_parameters():  # peft has frozen all but the differences
        plain = name.replace(".base_layer.", ".")
        parameter.requires_grad_(plain not in before or (before[plain] and not _within(plain, config.parts)))


def count_trained(model: Model, config: LoraConfig) -> int:
    """Return how many parameters :func:`adapt` would leave to be trained."""
    whole = [one for name, one in model.named_parameters() if one.requires_grad and not _within(name, config.parts)]
    chosen = [layer for name, layer in _linears(model).items() if _within(name, config.parts)]
    sides = sum(layer.in_features + layer.out_features for layer in chosen)
    return sum(one.numel() for one in whole) + config.rank * sides


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can have a difference, shared ones once, by name."""
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def _exchange(model: nn.Module, found: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules into the place of others, wherever these are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in found and parent is not found[child]:
                setattr(parent, name, found[child])


def _within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have a difference, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            yield name, module


def apart(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all layers that have a difference, and it, by name: what :func:`merge` would add up."""
    names = [f"{name}." for name, _ in _adapted(model)]
    return {name: value for name, value in model.state_dict().items() if name.startswith(tuple(names))}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every difference to its layer, in place: the model is then as if it had been trained whole."""
    layers = [layer for _, layer in _adapted(model)]
    for layer in layers:
        layer.merge()
    _exchange(model, {layer: layer.get_base_layer() for layer in layers})
    model.requires_grad_(True)


def merged(model: nn.Module) -> nn.Module:
    """Return a copy with every difference added."""
    found = copy.deepcopy(model)
    merge(found)
    return found
