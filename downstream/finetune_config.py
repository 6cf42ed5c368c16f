"""What a finetuning is told: task, checkpoint, data, what is chosen for the user, and how the best one is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from downstream import AnyTask
from downstream.choose import Chosen
from downstream.evaluate import inherited
from objectives import ObjectiveConfig
from vlp.checkpoint.load import LoadedConfig
from vlp.config import Config, Layer, build
from vlp.loaded import Loaded
from vlp.run import RunConfig


class TuneConfig(Config):
    """How the best checkpoint of a finetuning is found, and what else is watched."""

    every: int | None = Field(None, ge=1)
    """Samples between two evaluations on the validation data, by which the best checkpoint is kept; none = once an
    epoch, twenty times at most, where settings are chosen (`auto`) or the validation data found here; else never, and
    the last one is kept."""
    patience: int = Field(5, ge=1)
    """Evaluations in a row without a better score after which the run ends."""
    samples: int = Field(1000, ge=1)
    """Validation samples that these evaluations use, at even distances; before and after, all are used."""
    probe: str | tuple[str, ...] | None = "emoji:fluent3d"
    """Images with captions (a hundred are used) on which zero-shot retrieval is scored before and after, so that
    forgetting is seen; none = it is not."""


class FinetuneConfig(RunConfig):
    """A run that begins at a checkpoint and trains for one task."""

    task: AnyTask
    """What it is trained for."""
    init: str = ""
    """Checkpoint to begin from: as for vlp.load."""
    init_options: dict[str, Any] = Field(default_factory=dict)
    """What vlp.load takes beside it: tokenizer and config of a foreign checkpoint."""
    objectives: dict[str, ObjectiveConfig] = Field(default_factory=dict)
    """Settings of the task's objective, and objectives to train beside it; the task adds what it needs."""
    test: str | tuple[str, ...] | None = None
    """Data that are scored before and after, in the forms of data.val; none = data.val, by which the best checkpoint is
    chosen too."""
    test_where: dict[str, Any] | None = None
    """Only samples of `test` whose fields have these values; none = as data.where."""
    auto: tuple[Chosen, ...] = ()
    """Settings of `train` that are chosen from the data, the model and the memory, and said with the reason."""
    tune: TuneConfig = Field(default_factory=TuneConfig)
    """Best checkpoint, early stopping, forgetting."""


def checkpoint_layer(config: LoadedConfig) -> Layer:
    """Return what a finetuning takes from its checkpoint, to lie below recipe and flags: the model, and how its images
    and texts are prepared. Its objectives are the task's to keep or drop.
    """
    return Layer({"model": config.model.model_dump(), **inherited(config, training=True).tree}, "checkpoint")


def finetune_config(loaded: Loaded, init: str, *layers: Layer | Mapping[str, Any]) -> FinetuneConfig:
    """Return the config of a finetuning: the checkpoint's model, and ``layers`` (recipe, settings) over it.

    Raises:
        ConfigError: with all problems of the layers.
    """
    return build(FinetuneConfig, checkpoint_layer(loaded.config), *layers, {"init": init})
