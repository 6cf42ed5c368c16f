"""Exact contrastive learning over the micro-batches of a step (GradCache, Gao et al. 2021, arXiv:2101.06983).

A contrastive loss compares all pairs of a step, but only one micro-batch fits into memory at a time. So the embeds of
all micro-batches are computed first without gradient and laid behind each other; the loss runs once on them and gives
each embed its gradient; then each micro-batch runs again with gradient and hands its embeds theirs. The second run
repeats the first exactly, because dropout is seeded by the micro-batch (:func:`seed_dropout`). The price is one more
forward of the two towers.
Shapes: B images, T texts of a micro-batch, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from encoders.types import Batch, Images, Texts
from objectives.base import Draw, Embed, LossOutput, Objective, Results
from objectives.collectives import world_size
from objectives.pairs import image_of_text
from vlp.embed import EmbedGradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlp.model import Model

    Precision = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class StepContrast:
    """What the contrastive objectives gave over a whole step of this rank."""

    outputs: dict[str, LossOutput]
    """By objective."""
    counts: dict[str, Tensor]
    """Over how many terms of this rank each objective's mean goes."""
    gradients: dict[int, EmbedGradients]
    """What a micro-batch's embeds receive, by its number."""


def seed_dropout(draw: Draw) -> None:
    """Make dropout a pure function of (run seed, step, candidate group): a forward can be repeated or resumed."""
    key = np.random.SeedSequence((draw.seed, draw.step, draw.group))
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))


def whole_step_objectives(
    model: Model, batches: Sequence[Batch], names: Iterable[str] | None = None
) -> dict[tuple[int, ...], list[str]]:
    """Return the objectives that compare all pooled embeds of a step and read nothing else.

    They stand under the numbers of the micro-batches that train them: all of a source, or of the step; one alone needs
    nothing of this.

    Raises:
        ValueError: some share only a part of their micro-batches.
    """
    chosen = None if names is None else list(names)
    active = [model.active(batch, chosen) for batch in batches]
    found: dict[tuple[int, ...], list[str]] = {}
    for name, objective in model.named_objectives():
        needs = all(isinstance(one, Embed) and not one.tokens for one in objective.needs)
        numbers = tuple(number for number, those in enumerate(active) if name in those)
        if model.objective_configs[name].trains_embed and needs and len(numbers) > 1:
            found.setdefault(numbers, []).append(name)
    used = [number for numbers in found for number in numbers]
    if len(set(used)) < len(used):
        raise ValueError(
            f"objectives {sorted(chain.from_iterable(found.values()))} are trained by sources of which some are the "
            "same; give them one source, or none"
        )
    return found


def contrast_step(
    model: Model,
    batches: Sequence[Batch],
    draws: Sequence[Draw],
    names: Iterable[str] | None,
    totals: Mapping[str, Tensor],
    precision: Precision,
) -> StepContrast:
    """Run the objectives that compare all embeds of a step once over all its micro-batches and all ranks.

    Args:
        model: not wrapped; it is run without gradient.
        batches: this rank's micro-batches.
        draws: each one's randomness.
        names: only these objectives; None: all.
        totals: each objective's count over all ranks and micro-batches.
        precision: the autocast context of a forward.
    """
    whole = StepContrast({}, {}, {})
    for numbers, wanted in whole_step_objectives(model, batches, names).items():
        own, own_draws = [batches[number] for number in numbers], [draws[number] for number in numbers]
        embeds = _all_embeds(model, own, own_draws, wanted, precision)
        outputs, counts, gradients = _contrast(model, own, own_draws[0], wanted, embeds, totals, precision)
        whole.outputs.update(outputs)
        whole.counts.update(counts)
        whole.gradients.update(zip(numbers, gradients, strict=True))
    return whole


def _all_embeds(
    model: Model, batches: Sequence[Batch], draws: Sequence[Draw], names: Sequence[str], precision: Precision
) -> dict[Embed, list[Tensor]]:
    """The embeds that objectives read, [B, E] or [T, E] of each micro-batch, without gradient; the teacher's last."""
    every = sorted((one for one in model.needs(names) if isinstance(one, Embed)), key=repr)
    parts: dict[Embed, list[Tensor]] = {one: [] for one in every}
    for batch, draw in zip(batches, draws, strict=True):
        seed_dropout(draw)
        with torch.no_grad(), precision():
            results = model.run(every, batch)  # the teacher's last, so that dropout draws the same in the second run
        for one in every:
            parts[one].append(results[one])
    return parts


def _contrast(
    model: Model,
    batches: Sequence[Batch],
    draw: Draw,
    names: Sequence[str],
    parts: Mapping[Embed, list[Tensor]],
    totals: Mapping[str, Tensor],
    precision: Precision,
) -> tuple[dict[str, LossOutput], dict[str, Tensor], list[EmbedGradients]]:
    """Outputs and counts of the objectives, and what the embeds of each micro-batch receive."""
    passes = [one for one in parts if not one.teacher]
    # Leaves of a graph of their own: the loss below reaches the embeds and the temperature, not the model.
    embeds = [torch.cat(parts[one]).requires_grad_() for one in passes]
    known = model.new_results()
    scales, biases = (
        {name: one.detach().clone().requires_grad_() for name, one in found.items()}
        for found in (known.scales, known.biases)
    )
    joined, seen = join_pairs(batches), Results(scales, biases)
    seen.update(zip(passes, embeds, strict=True))
    seen.update({one: torch.cat(parts[one]) for one in parts if one.teacher})
    outputs, counts, terms = {}, {}, []
    with precision():
        for name in names:
            objective = model.objectives[name]
            assert isinstance(objective, Objective)
            outputs[name] = objective(seen, joined, draw)
            count = objective.count(joined)
            counts[name] = (
                count.float() if isinstance(count, Tensor) else torch.full((), count, device=embeds[0].device)
            )
            weighted = model.weights[name] * outputs[name].loss * counts[name]
            terms.append(weighted * world_size() / totals[name].clamp(min=1))
    branches = sorted({one.branch for one in passes})
    learned = [found[branch] for branch in branches for found in (scales, biases) if branch in found]
    found = torch.autograd.grad(torch.stack(terms).sum(), [*embeds, *learned])
    received, rest = found[: len(embeds)], list(found[len(embeds) :])
    spaces = {branch: torch.cat([rest.pop(0) for found in (scales, biases) if branch in found]) for branch in branches}
    cut = [g.split([part.shape[0] for part in parts[one]]) for one, g in zip(passes, received, strict=True)]
    gradients = [
        # The temperature receives its gradient with the last micro-batch, the one whose backward crosses ranks.
        EmbedGradients(
            dict(zip(passes, of_batch, strict=True)),
            spaces if number == len(batches) - 1 else {name: torch.zeros_like(one) for name, one in spaces.items()},
        )
        for number, of_batch in enumerate(zip(*cut, strict=True))
    ]
    return outputs, counts, gradients


def join_pairs(batches: Sequence[Batch]) -> Batch:
    """Lay micro-batches behind each other: their sizes, pairing and ids, without pixels and words."""
    first = batches[0]
    view, text_view = next(iter(first.images)), next(iter(first.texts))
    ids = first.texts[text_view].ids
    num_images, num_texts = sum(b.num_images for b in batches), sum(b.num_texts for b in batches)
    index = None
    if any(b.image_of_text is not None for b in batches):
        starts = [sum(b.num_images for b in batches[:number]) for number in range(len(batches))]
        index = torch.cat([image_of_text(b, ids.device) + start for b, start in zip(batches, starts, strict=True)])
    return Batch(
        images={view: Images(torch.empty(num_images, 3, 0, 0, device=ids.device))},
        texts={text_view: Texts(ids.new_empty(num_texts, 0), ids.new_empty(num_texts, 0, dtype=torch.bool))},
        image_of_text=index,
        image_id=_join([b.image_id for b in batches]),
        caption_id=_join([b.caption_id for b in batches]),
        targets=_join_match(batches),
        position=_join([b.position for b in batches]),
        source=first.source,
        seen=first.seen,
        counts=_join_counts(batches),
    )


def _join_match(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Which pairs are true, where the data have false ones."""
    if any("match" not in b.targets for b in batches):
        return {}
    return {"match": torch.cat([b.targets["match"] for b in batches])}


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _join_counts(batches: Sequence[Batch]) -> tuple[tuple[int, int], ...] | None:
    """Sum (images, texts) of every rank over micro-batches; None where all ranks have the same."""
    if all(batch.counts is None for batch in batches):
        return None
    every = [batch.counts or ((batch.num_images, batch.num_texts),) * world_size() for batch in batches]
    return tuple((sum(i for i, _ in of_rank), sum(t for _, t in of_rank)) for of_rank in zip(*every, strict=True))
