"""Tiny checkpoints for tests: a tokenizer of a few words, and `save`, which writes what a run would."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from helpers import LENGTH, VOCABULARY
from torch import Tensor

from encoders.types import Batch
from objectives.base import Embed, Fuse, Pass
from vlp.checkpoint.card import model_card
from vlp.checkpoint.native import save_checkpoint
from vlp.data.loader import DataConfig
from vlp.data.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from vlp.model import Model
from vlp.run import RunConfig

CAPTIONS = ("a red car", "a dog and a cat", "a red dog", "a car")


@cache
def tokenizer() -> Tokenizer:
    """A WordPiece of at most as many words as the tiny models have."""
    return build_tokenizer(TokenizerConfig(size=64, min_frequency=1), CAPTIONS)


def run_of(model: Model) -> RunConfig:
    """The resolved config that trained ``model``, on data that do not exist."""
    data = DataConfig(train="gone/{000..099}.tar", max_length=LENGTH)  # type: ignore[call-arg]
    return RunConfig(model=model.config, objectives=model.objective_configs, data=data)


def save(folder: Path, model: Model, extra: Mapping[str, bytes | Mapping[str, Tensor]] | None = None) -> Path:
    """Write a checkpoint of ``model`` and return its folder."""
    run, words = run_of(model), tokenizer()
    assert words.vocabulary.size <= VOCABULARY
    save_checkpoint(folder, model, run, words, model_card(run, {}, "vlp pretrain tiny", model), extra)
    return folder


@torch.no_grad()
def outputs(model: Model, batch: Batch) -> list[Tensor]:
    """What the model says of a batch: embeddings and pooled fused vectors, as far as it has them."""
    wanted: list[Pass] = [] if model.space() is None else [Embed("image"), Embed("text")]
    wanted += [] if model.fusion is None else [Fuse()]
    results = model.eval().run(wanted, batch)
    return [results[one].pooled if isinstance(one, Fuse) else results[one] for one in wanted]
