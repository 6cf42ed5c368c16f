"""What a run reads: its loader, and what its model wants of the data."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from encoders.region import RegionEncoder
from objectives.base import AGAIN
from objectives.collectives import rank, world_size
from objectives.mrm import Mrm
from vlp.data.fetch import Prepare
from vlp.data.loader import Loader
from vlp.data.regions import NAMES, RegionLayout
from vlp.model import Model
from vlp.train.config import TrainConfig

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
        ValueError: the global batch has fewer samples than there are ranks.
    """
    config, world = parts.run.train, world_size()
    number = micro_batches(config, world)
    sizes = (config.global_batch, world, number, config.micro_batch)
    logger.info("global batch %d = %d ranks x %d micro-batches x up to %d", *sizes)
    assert parts.reader is not None
    return Loader(
        parts.reader,
        prepare,
        parts.tokenizer,
        parts.model.text_views(),
        parts.run.data,
        seed=config.seed,
        global_batch=config.global_batch,
        micro_batches=number,
        rank=rank(),
        world=world,
        again=AGAIN in parts.model.image_names(),
        image_views=parts.model.image_views(),
        regions=region_layout(parts.model, parts.run.data.whole_region),
    )


def region_layout(model: Model, whole: bool) -> RegionLayout | None:
    """Return what a model reads of a detector's regions; None if it reads pixels.

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
    views = {name: hide if name == "masked" else None for name in sorted(model.image_names() - {"clean"})}
    return RegionLayout(config.boxes, config.number, whole, tuple(targets), views)
