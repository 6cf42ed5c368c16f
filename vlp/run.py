"""The run's config tree, and its parts assembled: tokenizer, data and model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

from pydantic import Field

from encoders import RegionConfig, TextConfig
from objectives import ObjectiveConfig
from vlp.config import Config
from vlp.data.instruct import check_instructions
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, decode_texts, open_reader
from vlp.data.records import read_words
from vlp.data.sources import MAIN
from vlp.data.split import split_by_image
from vlp.data.tokenizer import Tokenizer, build_tokenizer
from vlp.model import Model, ModelConfig, build_model
from vlp.train.config import TrainConfig

logger = logging.getLogger(__name__)


class RunConfig(Config):
    """One run: a recipe, resolved."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """What is trained."""
    objectives: dict[str, ObjectiveConfig] = Field(default_factory=dict)
    """What it is trained for, by name; an objective's kind defaults to its name."""
    data: DataConfig = Field(default_factory=DataConfig)
    """What it is trained on."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How it is trained."""


R = TypeVar("R", bound=RunConfig)


@dataclass(frozen=True)
class Parts:
    """What a run is assembled from its config."""

    run: RunConfig
    """The config with everything resolved that the parts decided (vocabulary size, mean and std)."""
    model: Model
    tokenizer: Tokenizer
    reader: Reader | None
    """Training data; None where the run names none."""
    sources: Mapping[str, Reader] = field(default_factory=dict)
    """Those of `data.sources`, by name."""


def settle(run: R) -> R:
    """Fill what one part of the tree takes from another: the transform's image size is the vision encoder's.

    Raises:
        ValueError: the tree states the two differently, or instructions write boxes that would move.
    """
    if isinstance(run.model.text, TextConfig) and run.data.max_length > run.model.text.max_length:
        raise ValueError(
            f"data.max_length {run.data.max_length} is more than model.text.max_length {run.model.text.max_length}; "
            "lower the first or raise the second"
        )
    check_instructions(run.data)
    if isinstance(run.model.vision, RegionConfig):
        return run
    if run.data.whole_region:
        raise ValueError(
            f"data.whole_region is for a detector's regions, but model.vision.kind is {run.model.vision.kind}; "
            "leave it out, or use kind region"
        )
    side, wanted = run.model.vision.image_size, run.data.transform.image_size
    if wanted is not None and wanted != side:
        raise ValueError(
            f"data.transform.image_size {wanted} is not model.vision.image_size {side}; leave the first one out"
        )
    transform = run.data.transform.model_copy(update={"image_size": side})
    return run.model_copy(update={"data": run.data.model_copy(update={"transform": transform})})


def captions(reader: Reader, data: DataConfig) -> Iterator[str]:
    """Yield the data's texts, reading no image files; samples that cannot be read are left to the loader to count."""
    for index in range(len(reader)):
        try:
            raw = read_words(reader, index)
            yield from decode_texts(raw, text=data.text)
            if data.alternates is not None:
                yield from decode_texts(raw, text=data.alternates)
            if data.pairing is not None and data.pairing.second not in (None, "captions"):
                yield from decode_texts(raw, text=data.pairing.second)
        except BadSample:
            continue


def assemble(run: RunConfig, *, tokenizer: Tokenizer | None = None, pretrained: bool = True) -> Parts:
    """Open the training data, make the tokenizer and build the model.

    Args:
        run: the config.
        tokenizer: an existing one (resume, finetuning) instead of the recipe's.
        pretrained: fill parts from published weights where the recipe says so.

    Raises:
        ValueError: something is missing or does not fit; one line each.
    """
    run = settle(run)
    reader = open_training_data(run.data) if run.data.train else None
    check_sources(run)
    sources = {} if reader is None else {name: open_training_data(run.data.of(name)) for name in run.data.sources}
    if tokenizer is None:
        every = {} if reader is None else {MAIN: reader, **sources}
        texts = chain.from_iterable(captions(one, run.data.of(name)) for name, one in every.items())
        tokenizer = build_tokenizer(run.data.tokenizer, texts)
    model = build_model(
        run.model, run.objectives, vocabulary_size=tokenizer.vocabulary.size, seed=run.train.seed, pretrained=pretrained
    )
    objectives: Mapping[str, ObjectiveConfig] = model.objective_configs
    run = run.model_copy(update={"model": model.config, "objectives": dict(objectives)})
    return Parts(run, model, tokenizer, reader, sources)


def check_sources(run: RunConfig) -> None:
    """Refuse a run of which a source names no data.

    Raises:
        ValueError: with the flags that name them all, and those that do without.
    """
    missing = [name for name, one in run.data.sources.items() if not one.train]
    if run.data.train and missing:
        unfed = [name for name, one in run.objectives.items() if one.source in missing]
        without = [f"--data.sources.{name} none" for name in missing] + [f"--objectives.{name} none" for name in unfed]
        raise ValueError(
            " and ".join(f"data.sources.{name}.train" for name in missing)
            + f" {'is' if len(missing) == 1 else 'are'} not set; name the data with "
            + " ".join(f"--data.sources.{name}.train DATA" for name in missing)
            + f", or do without: {' '.join(without)}"
        )


def open_training_data(data: DataConfig) -> Reader:
    """Open the reader of ``data.train``, without what ``data.split`` holds out."""
    assert data.train is not None
    image = () if data.only == "text" else data.image
    reader = open_reader(data.train, image=image, text=data.text, root=data.root, where=data.where)
    if data.split is None or data.val is not None:
        return reader
    return split_by_image(reader, data.split).of(reader, "train")


def open_validation_data(data: DataConfig) -> Reader:
    """Open the reader of ``data.val``, or of what ``data.split`` holds out of ``data.train``.

    Raises:
        ValueError: neither is named, or cannot be opened.
    """
    if data.val is None and data.split is not None and data.train is not None:
        reader = open_reader(data.train, image=data.image, text=data.text, root=data.root, where=data.where)
        return split_by_image(reader, data.split).of(reader, "val")
    if not data.val:
        raise ValueError("data.val is not set; name the data with --data.val (shards, a table or a folder)")
    where = data.val_where if data.val_where is not None else data.where
    return open_reader(data.val, image=data.image, text=data.text, root=data.root, where=where)
