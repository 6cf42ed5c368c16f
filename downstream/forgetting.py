"""What finetuning made a checkpoint forget: its zero-shot retrieval before, and with the finetuned weights in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from downstream.evaluate import inherited, parts_of
from downstream.retrieval import RetrievalConfig
from downstream.selection import some
from downstream.transfer import same_place
from encoders import RegionConfig
from vlp.checkpoint.native import load_weights
from vlp.config import build
from vlp.data.loader import DataConfig
from vlp.data.reader import open_reader
from vlp.loaded import Loaded
from vlp.model import Model

logger = logging.getLogger(__name__)

IMAGES, FEW = 100, 32
"""Images that are searched; few where a model without embeddings must match all pairs."""
CANDIDATES = 10
"""Of each query, that a matching head scores again."""
METRICS = ("i2t/R@1", "t2i/R@1", "i2t_any/R@1")


def probe(loaded: Loaded, spec: str | tuple[str, ...], finetuned: Model | None = None) -> dict[str, float] | str:
    """Return the recalls of zero-shot retrieval by a checkpoint, or why there are none.

    Args:
        loaded: the checkpoint, on the device where it runs.
        spec: images with captions, as for ``data.val``.
        finetuned: a model whose weights take the place of the checkpoint's own wherever both have them; what
            finetuning left out (the text tower of a captioner) stays the checkpoint's.
    """
    task = RetrievalConfig(k=CANDIDATES)
    if (missing := task.lacks(loaded.model)) is not None:
        return f"the checkpoint lacks {missing}"
    if isinstance(loaded.model.config.vision, RegionConfig):
        return "the checkpoint reads a detector's regions, not images"
    parts = parts_of(loaded, build(DataConfig, inherited(loaded.config).tree["data"]))
    number = IMAGES if loaded.model.space() is not None else FEW
    reader = some(open_reader(spec), number)
    if finetuned is None:
        metrics = task.evaluate(parts, reader).metrics
    else:
        with transplanted(loaded.model, finetuned):
            metrics = task.evaluate(replace(parts, model=loaded.model), reader).metrics
    return {name: metrics[name] for name in METRICS if name in metrics}


@contextmanager
def transplanted(model: Model, source: Model) -> Iterator[None]:
    """Give ``model`` the weights of ``source`` that it has too, for the time of the block."""
    own, new = model.state_dict(), source.state_dict()
    firsts = {tensor.data_ptr(): name for name, tensor in reversed(own.items()) if name in new}  # shared ones once
    shared = {name: new[name] for name in firsts.values() if same_place(name, new[name], own[name])}
    kept = {name: own[name].detach().clone() for name in shared}
    try:
        load_weights(model, shared, strict=False)
        yield
    finally:
        load_weights(model, kept, strict=False)
