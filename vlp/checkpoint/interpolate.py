"""`vlp interpolate`: a model between a pretrained one and the one finetuned from it, which forgets less.

WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 4): weight by weight,
(1 - alpha) * pretrained + alpha * finetuned.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path

import torch

from vlp.checkpoint.export import OWN, convert
from vlp.checkpoint.native import LoadReport, load_weights, weights_of
from vlp.loaded import Loaded

logger = logging.getLogger(__name__)


@torch.no_grad()
def interpolate(first: Loaded, second: Loaded, alpha: float) -> Loaded:
    """Return the model at ``alpha`` of the way from the first model to the second.

    What only the second has (a task's head) stays as it is there, what only the first has is left out. Position
    embeddings of the first are resized where the second reads larger images.

    Args:
        first: the pretrained model.
        second: the one finetuned from it, whose config and tokenizer the result has.
        alpha: 0 = the first, 1 = the second.

    Returns:
        The model; its report tells what the first lacked (``missing``) and what of it was left out (``unexpected``).

    Raises:
        ValueError: alpha is out of range, or the models have weights of different shapes, or none in common.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha {alpha:g} must lie in 0 (the first checkpoint) .. 1 (the second)")
    between = copy.deepcopy(second.model)
    try:
        report = load_weights(between, weights_of(first.model), strict=False)
    except ValueError as error:
        raise ValueError(f"the two checkpoints are not of one model: {error}") from error
    if not report.loaded and not report.resized:
        raise ValueError("the two checkpoints have no weight in common; give a checkpoint and one finetuned from it")
    wanted = weights_of(second.model)
    for name, own in weights_of(between).items():
        if own.is_floating_point():
            own.lerp_(wanted[name], alpha)
        else:
            own.copy_(wanted[name])
    return replace(second, model=between, report=report)


def write_between(first: Loaded, second: Loaded, alpha: float, target: Path, command: str = "") -> LoadReport:
    """Write the model at ``alpha`` of the way from the first to the second as a checkpoint of ours.

    Args:
        first: the pretrained model.
        second: the one finetuned from it.
        alpha: 0 = the first, 1 = the second.
        target: folder to write; it must not exist, or be empty.
        command: that is recorded in the model card.

    Raises:
        ValueError: as :func:`interpolate`, or the target is taken.
    """
    between = interpolate(first, second, alpha)
    convert(between, target, OWN, command)
    for what, names in (("as in the second", between.report.missing), ("left out", between.report.unexpected)):
        if names:
            logger.info("%d weights %s: %s", len(names), what, ", ".join(names[:3]) + (", ..." if names[3:] else ""))
    return between.report
