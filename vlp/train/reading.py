"""What a run reads: its loader, and what its model wants of the data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from encoders.region import RegionEncoder
from objectives.base import AGAIN, WHOLE, Objective, View
from objectives.collectives import rank, world_size
from objectives.mrm import Mrm
from objectives.spans import SpannedView
from vlp.data.asking import ANSWER
from vlp.data.fetch import Fetch, Prepare, image_example, pair_example
from vlp.data.loader import DataConfig, Loader
from vlp.data.regions import NAMES, RegionLayout
from vlp.data.sources import MAIN, Only, lacking, source_seed
from vlp.data.transforms import TrainTransform
from vlp.model import Model
from vlp.train.config import TrainConfig
from vlp.usage import image_views, text_views, usable

if TYPE_CHECKING:
    from vlp.run import Parts

logger = logging.getLogger(__name__)


def micro_batches(config: TrainConfig, world: int) -> int:
    """Return into how many micro-batches each rank cuts its share of a step.

    Raises:
        ValueError: the global batch has fewer samples than there are ranks.
    """
    if config.global_batch < world:
        raise ValueError(
            f"train.global_batch {config.global_batch} is less than the {world} ranks; raise it or use fewer"
        )
    share = -(-config.global_batch // world)
    return -(-share // config.micro_batch)


def open_loader(parts: Parts, prepare: Prepare) -> Loader:
    """Return this rank's loader of the training data.

    Raises:
        ValueError: the global batch has fewer samples than there are ranks, or sources and objectives do not fit.
    """
    config, world = parts.run.train, world_size()
    number = micro_batches(config, world)
    sizes = (config.global_batch, world, number, config.micro_batch)
    logger.info("global batch %d = %d ranks x %d micro-batches x up to %d", *sizes)
    assert parts.reader is not None
    main, sources = parts.run.data, {name: (one, parts.run.data.of(name)) for name, one in parts.sources.items()}
    only = {MAIN: main.only, **{name: data.only for name, (_, data) in sources.items()}}
    trains = trained_by(parts.model, only)
    if sources and config.sample:
        raise ValueError("train.sample draws the objectives, and data.sources the data of a step; set one of the two")
    wanted = {name: _wanted(parts.model, found, main.whole_region, only[name]) for name, found in trains.items()}
    for name, data in {MAIN: main, **{name: data for name, (_, data) in sources.items()}}.items():
        check_spans(wanted[name]["views"], data)
        if name != MAIN or prepare is pair_example:  # a task says itself what is written
            check_answer(wanted[name]["views"], data, "data" if name == MAIN else f"data.sources.{name}")
    fetches = {
        name: Fetch(
            reader,
            None,
            image_example if data.only == "image" else pair_example,
            parts.tokenizer,
            config=data,
            transform=TrainTransform(data.transform),
            seed=source_seed(config.seed, name),
            only=data.only,
            **wanted[name],
        )
        for name, (reader, data) in sources.items()
    }
    return Loader(
        parts.reader,
        image_example if main.only == "image" else prepare,
        parts.tokenizer,
        config=main,
        seed=config.seed,
        global_batch=config.global_batch,
        micro_batches=number,
        rank=rank(),
        world=world,
        sources=fetches,
        **wanted[MAIN],
    )


def check_spans(views: Mapping[str, View], data: DataConfig) -> None:
    """Raise ValueError if a view masks spans that the data do not name."""
    kinds = sorted({kind for view in views.values() if isinstance(view, SpannedView) for kind, _ in view.shares})
    if kinds and data.spans is None:
        raise ValueError(
            f"objectives.mlm.spans masks spans of kinds {kinds}, but data.spans names no field that has them; set it, "
            "or leave out objectives.mlm.spans (data.sources have none: name the objective's source, main)"
        )


def check_answer(views: Mapping[str, View], data: DataConfig, where: str) -> None:
    """Raise ValueError if what is to be written is nothing but the text that is read."""
    if ANSWER in views and data.answer is None and data.instruct is None:
        raise ValueError(
            f"objective lm writes the view {ANSWER}, but {where} says nothing of what that is, and a text would be "
            f"copied; set {where}.answer or {where}.instruct, or name the objective's source"
        )


def trained_by(model: Model, sources: Mapping[str, Only]) -> dict[str, dict[str, Objective]]:
    """Return the objectives that each source trains.

    Args:
        model: with its objectives.
        sources: what each of them brings alone, ``main`` included.

    Raises:
        ValueError: a source trains nothing, or nothing trains an objective.
    """
    every = dict(model.named_objectives())
    for name, one in every.items():
        if one.source not in (None, *sources):
            raise ValueError(
                f"objectives.{name}.source {one.source} is no source of the data; they are {list(sources)}: add it to "
                "data.sources, or remove the objective"
            )
    found = {}
    for source, only in sources.items():
        found[source] = usable(every, source, lacking(only))
        if not found[source]:
            where = "data" if source == MAIN else f"data.sources.{source}"
            what = "pairs" if only is None else f"{only}s alone"
            raise ValueError(
                f"{where}: {what} train none of the objectives {list(every)}; add one, or leave the data out"
            )
    if left := set(every) - {name for objectives in found.values() for name in objectives}:
        raise ValueError(
            f"objectives {sorted(left)} are trained by none of the sources {list(sources)}; add data that bring what "
            "they read to data.sources, or remove them"
        )
    return found


def _wanted(model: Model, objectives: Mapping[str, Objective], whole_region: bool, only: Only) -> dict[str, Any]:
    """What the objectives that a source trains read of it; texts alone have no regions."""
    names = model.image_names(objectives)
    layout = None if only == "text" else region_layout(model, whole_region, names)
    # Views that are read of pixels, but of which no objective hides anything (itm's masked beside MLM alone).
    hidden = dict.fromkeys(sorted(names - {"clean", AGAIN, WHOLE})) | image_views(objectives)
    return {"views": text_views(objectives), "again": AGAIN in names, "image_views": hidden, "regions": layout}


def region_layout(model: Model, whole: bool, names: Iterable[str] | None = None) -> RegionLayout | None:
    """Return what a model reads of a detector's regions; None if it reads pixels.

    Args:
        model: with its objectives.
        whole: the whole image is one more region.
        names: image views that are read; None: those of all objectives.

    Raises:
        ValueError: two objectives hide regions in different ways.
    """
    if not isinstance(model.vision, RegionEncoder):
        return None
    config, predicting = model.vision.config, [one for one in model.objectives.values() if isinstance(one, Mrm)]
    if len(found := {one.view for one in predicting}) > 1:
        raise ValueError(
            f"objectives {[one.name for one in predicting]} hide regions in different ways; give them the same "
            "mask_probability, hide, swap and overlap"
        )
    hide = next(iter(found), None)
    targets = dict.fromkeys(name for one in predicting for name in one.reads if name in NAMES and name != "features")
    views = {name: hide if name == "masked" else None for name in sorted(set(names or model.image_names()) - {"clean"})}
    return RegionLayout(config.boxes, config.number, whole, tuple(targets), views)
