"""From a table of one's own to data that a task can be finetuned on: columns, split, and what of it is broken."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from downstream.check import Checked, check, leaks
from downstream.columns import guess_columns, named_split
from downstream.selection import some
from encoders import RegionConfig
from objectives.collectives import rank
from vlp.data.loader import DataConfig
from vlp.data.reader import Reader, Sample, open_reader
from vlp.data.split import split_by_image

if TYPE_CHECKING:
    from downstream.finetune import FinetuneConfig

logger = logging.getLogger(__name__)

SHARE = 0.1
"""Of the images, held out where nobody named validation data."""
LOOKED_AT = 2000
"""Samples that are looked at before training; data check looks at all."""
SPLIT = "split.json"


def settle_data(run: FinetuneConfig) -> FinetuneConfig:
    """Return the run with columns found, and with validation data: those that are named, that a column of the table
    names, or that are held out by image. Each is said.

    Raises:
        ValueError: the data cannot be opened.
    """
    task, data = guess_columns(run.task, run.data, run.data.train)
    update: dict[str, Any] = {"task": task}
    if data.train and data.val is None and data.split is None:
        if (named := named_split(data)) is not None:
            data = data.model_copy(update={"where": named.train})
            if named.val is not None:
                data = data.model_copy(update={"val": data.train, "val_where": named.val})
            if named.test is not None and run.test is None:
                update |= {"test": data.train, "test_where": named.test}
            logger.info("split: the table's own, train %s, val %s, test %s", named.train, named.val, named.test)
        if data.val is None:
            data = data.model_copy(update={"split": SHARE})
    return run.model_copy(update={**update, "data": task.settings(data)})


def write_split(data: DataConfig, folder: Path) -> None:
    """Say which samples are held out, and write their keys with the split's hash into the run's folder.

    Nothing is read back: the same data give the same split, and a resumed run refuses others by their fingerprint.
    """
    if data.split is None or data.val is not None or data.train is None:
        return
    whole = open_reader(data.train, image=data.image, text=data.text, root=data.root, where=data.where)
    made = split_by_image(whole, data.split)
    counts = {
        "train": {"samples": len(made.train), "images": made.images[0]},
        "val": {"samples": len(made.val), "images": made.images[1]},
    }
    logger.info(
        "split %s: %s samples of %s images train, %s of %s are held out, by a hash of each image (data.split %g)",
        *(made.hash, len(made.train), made.images[0], len(made.val), made.images[1], data.split),
    )
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        told = {
            "hash": made.hash,
            "data": whole.fingerprint,
            "share": data.split,
            **counts,
            "held_out": made.val.tolist(),
        }
        (folder / SPLIT).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def look_at(run: FinetuneConfig, train: Reader, val: Reader) -> None:
    """Say which samples the task cannot use and which images are in both; a run on too many broken ones is refused.

    Args:
        run: adapted to its task.
        train: training data.
        val: validation data.

    Raises:
        ValueError: more samples are broken than ``data.bad_samples`` allows.
    """
    prepare = run.task.prepare(run)

    def usable(sample: Sample) -> None:
        prepare(sample, np.random.default_rng(0))

    images = not isinstance(run.model.vision, RegionConfig)
    found: Mapping[str, Checked] = {
        name: check(name, some(reader, LOOKED_AT), run.data, usable=usable, images=images)
        for name, reader in (("train", train), ("val", val))
    }
    for name, one in found.items():
        for finding in one.broken[:10]:
            logger.warning("%s %s", name, finding)
        if one.broken:
            logger.warning(
                "%d of %d samples of data.%s are broken and left out; vlp data check names all",
                *(len(one.broken), one.looked, name),
            )
        one.refuse(run.data.bad_samples)
    if leaking := leaks(found["train"], found["val"]):
        first = leaking[0]
        words = "%d images of data.val are in data.train too: sample %s of data.val shows %s; vlp data check names all"
        logger.warning(words, len(leaking), first.keys[0], first.detail)
