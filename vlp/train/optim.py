"""AdamW with decay groups, the learning rate as a function of samples seen, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator
from torch import nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vlp.config import Config
from vlp.train.layer_decay import layer_scales


class OptimConfig(Config):
    """AdamW and its schedule. Durations are in samples, over all ranks."""

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.02, ge=0)
    """Decoupled decay of all parameters with two axes or more; biases, norms and the temperature have none."""
    warmup: int = Field(default=0, ge=0)
    """Samples over which the learning rate rises linearly from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls from then to the last sample."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the last sample."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; none = not clipped."""
    lr_scale: dict[str, float] = Field(default_factory=dict)
    """Multiplies the learning rate of parts, by the beginning of the parameter's name, in which a word may be `*`; the
    longest wins (METER: `fusion: 5.0` and `objectives: 5.0`); 0 freezes (LiT: `vision: 0.0`)."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Multiplies the learning rate once for each block from the heads down (BEiT 0.65 to 0.9); 1 = all alike."""
    fused: bool | None = None
    """One kernel for the whole update; none = on CUDA."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of a moving average of all weights, kept beside the trained ones; none = no average. It is what
    evaluations look at and what vlp.load takes (``average=False``, ``--no-average``: the trained ones)."""

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; lower it")
        if wrong := {name: scale for name, scale in self.lr_scale.items() if scale < 0}:
            raise ValueError(f"lr_scale {wrong} is negative; use 0 to keep a part as it is")
        return self


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """Return AdamW over the trainable parameters, each once, in groups of equal decay and learning rate.

    Each group carries its multiplier as ``lr_scale``.

    Raises:
        ValueError: a part of ``lr_scale`` names no parameter, or nothing is trainable.
    """
    # `named_parameters` gives a shared parameter once, under the name where it appears first.
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter; unfreeze a part")
    check_parts(config.lr_scale, (name for name, _ in model.named_parameters()))
    layers = layer_scales(model, config.layer_decay) if config.layer_decay < 1 else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        scale = scale_of(name, config.lr_scale) * layers.get(name, 1.0)
        groups.setdefault((decay, scale), []).append(parameter)
    fused = named[0][1].device.type == "cuda" if config.fused is None else config.fused
    return AdamW(
        [
            {"params": params, "weight_decay": decay, "lr": config.lr * scale, "lr_scale": scale}
            for (decay, scale), params in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def freeze_parts(model: nn.Module, config: OptimConfig) -> None:
    """Switch off the gradient of every parameter whose ``lr_scale`` is 0: a frozen tower costs no backward."""
    for name, parameter in model.named_parameters():
        if scale_of(name, config.lr_scale) == 0.0:
            parameter.requires_grad_(False)


def check_parts(lr_scale: Iterable[str], names: Iterable[str]) -> None:
    """Refuse parts that are the beginning of no parameter's name.

    Raises:
        ValueError: with all of them, and the parts that there are.
    """
    names = list(names)
    if unknown := sorted(part for part in lr_scale if not any(_within(name, part) for name in names)):
        parts = sorted({name.split(".")[0] for name in names})
        raise ValueError(f"lr_scale {unknown} matches no parameter; the model's parts are {parts}")


def scale_of(name: str, lr_scale: dict[str, float]) -> float:
    """Return the multiplier of the longest part that a parameter lies in, 1 if in none."""
    found = [part for part in lr_scale if _within(name, part)]
    return lr_scale[max(found, key=lambda part: (part.count("."), -part.count("*")))] if found else 1.0


def _within(name: str, part: str) -> bool:
    words, wanted = name.split("."), part.split(".")
    return len(words) >= len(wanted) and all(w in ("*", word) for word, w in zip(words, wanted, strict=False))


def learning_rate(config: OptimConfig, seen: float, total: int) -> float:
    """Return the share of the peak learning rate after ``seen`` of ``total`` samples.

    Raises:
        ValueError: the warmup is longer than the run.
    """
    if config.warmup > total:
        raise ValueError(f"warmup {config.warmup} is longer than the run of {total} samples; shorten it")
    if seen < config.warmup:
        return seen / config.warmup
    done = min((seen - config.warmup) / max(total - config.warmup, 1), 1.0)
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
    lowest = config.min_lr / config.lr
    return lowest + (1 - lowest) * left


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    """Give every group ``rate`` times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def build_average(model: nn.Module, config: OptimConfig) -> AveragedModel | None:
    """Return the moving average of ``model``'s weights, a copy as ``.module``, if the recipe asks for one.

    Its first update copies the weights; each further one moves every weight by the share ``1 - config.ema``.
    """
    if config.ema is None:
        return None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    return average.requires_grad_(False)
