"""`vlp show`: what a recipe resolves to, what a step computes, and what that costs; without data and without weights.

Everything runs on the meta device: shapes flow, nothing is allocated.
Shapes: B images, T texts (one an image here), L text length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from encoders.region import RegionConfig, RegionEncoder
from encoders.types import Batch, Images, Modality, Regions, Texts, Tokens, Vocabulary
from objectives.answer import Answer
from objectives.base import (
    AGAIN,
    Decode,
    Draw,
    Embed,
    Encode,
    Fuse,
    Fused,
    Pass,
    Results,
    Rows,
    View,
    ViewText,
    draws_of,
)
from objectives.box import Box
from objectives.itm import Itm
from objectives.mrm import Mrm
from objectives.pair_attention import PairAttention
from vlp.config import to_yaml
from vlp.data.batch import hide_patches, pad_texts
from vlp.data.loader import DataConfig
from vlp.data.sources import MAIN, Only, lacking
from vlp.model import Model, build_model
from vlp.parts import parameters_by_part
from vlp.passes import Step, close, row_givers, views
from vlp.run import RunConfig, settle
from vlp.usage import image_views, text_views, usable


@dataclass(frozen=True)
class PlanRow:
    """One pass of the plan."""

    kind: str
    """encode, embed, fuse or decode."""
    what: str
    """What it reads."""
    rows: float
    """Rows per sample."""
    used_by: tuple[str, ...]
    """Objectives that read it, or a pass that reads it."""


@dataclass(frozen=True)
class Plan:
    """What one step computes."""

    rows: list[PlanRow]
    """Its passes, in the order in which they run."""
    calls: dict[str, int]
    """How often each part of the model is called; all fuse rows of a step share as few calls as they can."""


def meta_model(run: RunConfig) -> Model:
    """Build the run's model on the meta device, without its published weights.

    A run that has been trained says how many words its tokenizer found; a recipe, how many it may find at most.

    Raises:
        ValueError: the parts do not fit each other, or the vocabulary's size is not known.
    """
    tokenizer, known = run.data.tokenizer, getattr(run.model.text, "vocabulary_size", None)
    with torch.device("meta"):
        return build_model(
            run.model,
            run.objectives,
            pretrained=False,
            vocabulary_size=tokenizer.size if tokenizer.source == "train" and known is None else None,
        )


def synthetic_batch(
    model: Model,
    size: int,
    length: int,
    device: torch.device | str = "meta",
    seen: int = 0,
    source: str = MAIN,
    only: Only = None,
) -> Batch:
    """Make a batch of ``size`` pairs that no data stand behind, with every view that the objectives read.

    Args:
        model: says which views, pixels and words there are.
        size: B = T.
        length: L of the clean text, special ids included.
        device: of its tensors; on "meta" nothing but shapes.
        seen: samples before this step.
        source: of the data, whose objectives alone are asked.
        only: the one modality that it brings.
    """
    objectives, draw, number = usable(dict(model.named_objectives()), source, lacking(only)), Draw(), torch.arange(size)
    texts = {} if only == "image" else _synthetic_texts(model, text_views(objectives), size, length)
    host = Batch(texts=texts, image_id=number, caption_id=number, position=number, source=source, seen=seen)
    host = replace(host, targets=_synthetic_targets(model, size))
    if only == "text":
        return host.to(device)
    names = sorted(model.image_names(objectives))
    if isinstance(model.vision, RegionEncoder):
        regions = _synthetic_regions(model, model.vision.config, size)
        shown = replace(regions, masked=None)
        return replace(host, images={name: regions if name == "masked" else shown for name in names}).to(device)
    side = model.vision.config.image_size
    # No image is like another: what is normalised over the batch would vanish.
    pixels = torch.arange(size * 3 * side**2, device=device).remainder(251).to(torch.uint8).view(size, 3, side, side)
    hidden = hide_patches(Images(pixels), image_views(objectives), range(size), 1, draw)
    return replace(host, images={name: hidden.get(name, Images(pixels)) for name in names}).to(device)


def synthetic_batches(
    model: Model, data: DataConfig, size: int, length: int, device: torch.device | str = "meta", seen: int = 0
) -> list[Batch]:
    """Make a batch of each source of the data; arguments as of :func:`synthetic_batch`."""
    sources = {MAIN: data.only, **{name: one.only for name, one in data.sources.items()}}
    return [synthetic_batch(model, size, length, device, seen, name, only) for name, only in sources.items()]


def _synthetic_texts(model: Model, views: Mapping[str, View], size: int, length: int) -> dict[str, Texts]:
    """Drawn words, and the views of them."""
    size_of, draw = model.text.word_embedding.shape[0], Draw()
    sentinels = tuple(range(size_of - 1, size_of - 17, -1))
    words = Vocabulary(size_of, pad=0, cls=1, sep=2, mask=3, bos=1, eos=2, sentinels=sentinels)
    ids = [draw.sample("words", position).integers(4, words.size, length) for position in range(size)]
    starts = np.ones(length, dtype=bool)
    starts[[0, -1]] = False
    for row in ids:
        row[[0, -1]] = words.cls, words.sep
    texts = {"clean": pad_texts([ViewText(row) for row in ids], "full", words.pad, length)}
    for name, view in views.items():
        key = draws_of(name, view)
        made = [view.make(row, starts, words, draw.sample(key, position)) for position, row in enumerate(ids)]
        texts[name] = pad_texts(made, view.attention, words.pad, length)
    return texts


def _synthetic_targets(model: Model, size: int) -> dict[str, Tensor]:
    """What the objectives' data would say of each text."""
    found: dict[str, Tensor] = {}
    for objective in model.objectives.values():
        if isinstance(objective, Answer | PairAttention):
            number = len(objective.config.answers)
            found["answer_scores"] = torch.eye(number)[torch.arange(size) % number]
        elif isinstance(objective, Itm) and objective.given:
            found["match"] = torch.arange(size) % 2 == 0
        elif isinstance(objective, Box):
            found["box"] = torch.tensor([0.5, 0.5, 0.5, 0.25]).expand(size, -1)
    return found


def _synthetic_regions(model: Model, config: RegionConfig, size: int) -> Regions:
    """Regions of which every seventh is hidden, with what the detector would say of each."""
    shape = size, config.number
    masked = (torch.arange(size * config.number) % 7 == 0).view(shape)
    at = masked.flatten().nonzero()[:, 0]
    at = torch.cat([at, at.new_full((-len(at) % 8,), -1)])
    targets: dict[str, Tensor] = {}
    for objective in model.objectives.values():
        for name, target in objective.config.targets.items() if isinstance(objective, Mrm) else ():
            targets[name] = torch.full((*shape, target.outputs), 1 / target.outputs)
            if "class" in target.losses:
                targets[name] = torch.zeros(shape, dtype=torch.int64)
            if objective.config.mean == "all":
                targets[f"{name}_scores"] = masked.float()
    features, boxes = torch.ones(*shape, config.features), torch.ones(*shape, config.boxes)
    return Regions(features, boxes, masked=masked, predict_at=at, targets=targets)


@torch.no_grad()
def plan_rows(model: Model, batch: Batch) -> Plan:
    """Run one step's passes and return what ran: encodes as the encoders are called, then the other passes."""
    chosen = model.active(batch)
    draw = Draw()
    found: list[PlanRow] = []
    names = ("vision", "text", "fusion", "decoder")
    calls = {part: 0 for part in names if getattr(model, part) is not None}

    def users(wanted: Callable[[frozenset[Pass]], bool]) -> tuple[str, ...]:
        return tuple(name for name, objective in chosen.items() if wanted(close(objective.needs)))

    def reads(modality: Modality, view: str, teacher: bool, passes: frozenset[Pass]) -> bool:
        return view in views(one for one in passes if one.teacher == teacher)[modality]

    def fuses(_: Modality, view: str, teacher: bool, passes: frozenset[Pass]) -> bool:
        return any(isinstance(one, Fuse) and one.text == view and one.teacher == teacher for one in passes)

    def record(part: str, teacher: bool, module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[f"teacher's {part}" if teacher else part] += 1
        if part in ("vision", "text"):
            given: Mapping[str, Any] = batch.images if part == "vision" else batch.texts
            modality: Modality = "image" if part == "vision" else "text"
            view, begins_anew = _view_of(given, args[0])
            number = batch.num_images if part == "vision" else batch.num_texts
            asked = "clean" if teacher and view == AGAIN else view
            what = _reads(Encode(modality, view, teacher=teacher)) + (", begun as fused texts are" * begins_anew)
            by = users(partial(fuses if begins_anew else reads, modality, asked, teacher))
            found.append(PlanRow("encode", what, number / batch.num_texts, by))

    def give_rows(results: Results) -> dict[str, Rows]:
        return {name: rows for one in chosen.values() for name, rows in one.rows(results, batch, draw).items()}

    hooks = [getattr(model, part).register_forward_pre_hook(partial(record, part, False)) for part in calls]
    for part in names:
        copied = getattr(model.teacher, part, None)
        if copied is not None:
            calls[f"teacher's {part}"] = 0
            hooks.append(copied.register_forward_pre_hook(partial(record, part, True)))
    try:
        results = Step(model, batch).run(model.needs(chosen), give_rows)
    finally:
        for hook in hooks:
            hook.remove()
    for one, result in results.items():
        if not isinstance(one, Encode):
            by = users(lambda passes, one=one: one in passes)  # type: ignore[misc]
            found.append(PlanRow(type(one).__name__.lower(), _reads(one), _num_rows(result) / batch.num_texts, by))
    return Plan(found, calls)


def _view_of(given: Mapping[str, Any], read: Any) -> tuple[str, bool]:
    """Name of the view that an encoder reads, and whether the text begins with another id there (BLIP's [ENC])."""
    found = next((name for name, value in given.items() if value is read), None)
    if found is not None:
        return found, False
    return next(name for name, value in given.items() if value.keep is read.keep), True


def _reads(one: Pass) -> str:
    """Say what a pass reads."""
    if one.teacher:
        return f"{_reads(replace(one, teacher=False))}, by the teacher"
    if isinstance(one, Embed) and one.tokens:
        return f"{one.modality} {one.view}, token by token"
    if isinstance(one, Embed) and not one.unit:
        return f"{one.modality} {one.view}, not of unit norm"
    if isinstance(one, Encode | Embed):
        return f"{one.modality} {one.view}"
    if isinstance(one, Decode):
        return f"text {one.text}, memory {_reads(one.memory)}"
    sides = " + ".join(f"{side} {view}" for side, view in (("image", one.image), ("text", one.text)) if view)
    return f"{sides}, pairs that {one.rows} draws" if one.rows else sides


def _num_rows(result: Tensor | Tokens | Fused) -> int:
    if isinstance(result, Tensor):
        return result.shape[0]
    return result.pooled.shape[0]


def flops(model: Model, batch: Batch) -> tuple[float, dict[str, float]]:
    """Count forward FLOPs per sample, a multiply-add as two: (all objectives at once, each objective alone).

    One that reads the pairs of another is not quite alone.

    ``batch`` must be on the meta device: on CPU the counter misses attention.
    """
    active = model.active(batch)
    shared = count_flops(model, batch, list(active))
    if len(active) == 1:
        return shared, dict.fromkeys(active, shared)
    return shared, {name: count_flops(model, batch, [*row_givers(active, name), name]) for name in active}


@torch.no_grad()
def count_flops(model: Model, batch: Batch, names: list[str]) -> float:
    """Count forward FLOPs per sample of these objectives together."""
    # The counter would hook the backward pass of what modules are given, and without gradients there is none.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with FlopCounterMode(display=False) as counter:
            model.losses(batch, Draw(), names)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops() / max(batch.num_images, batch.num_texts)


def show(run: RunConfig) -> RenderableType:
    """Return what `vlp show` prints: the resolved tree, the plan, parameters by part and FLOPs per sample.

    Raises:
        ValueError: the recipe cannot be built.
    """
    run = settle(run)
    model = meta_model(run)
    size, length = run.train.micro_batch, run.data.max_length
    batch = synthetic_batch(model, size, length, seen=run.train.samples, only=run.data.only)
    return Group(
        Syntax(to_yaml(run), "yaml", background_color="default", word_wrap=True),
        _plan_table(plan_rows(model, batch)),
        *([] if not run.train.sample else [_sampled(run.train.sample)]),
        *([] if not run.data.sources else [_other_sources(model, run.data)]),
        _parameter_table(parameters_by_part(model)),
        _flops_table(*flops(model, batch)),
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column in ("pass", "reads", "for", "part", "") else "right")
    return table


def _plan_table(plan: Plan) -> RenderableType:
    table = _table("One step", "pass", "reads", "rows per sample", "for")
    for row in plan.rows:
        table.add_row(row.kind, row.what, f"{row.rows:g}", ", ".join(row.used_by))
    calls = ", ".join(f"{part} x {number}" for part, number in plan.calls.items())
    fused = sum(row.rows for row in plan.rows if row.kind == "fuse")
    text = f"Calls: {calls}" + (f"; {fused:g} fused rows per sample" if fused else "")
    return Group(table, Text(text))


def _sampled(sample: Mapping[str, float]) -> Text:
    """Say that a step computes a part of the plan."""
    total = sum(sample.values())
    shares = ", ".join(
        f"{group.replace('+', ' with ')} in {100 * ratio / total:.0f} %" for group, ratio in sample.items()
    )
    return Text(f"Each step trains a part of this: {shares} of the steps")


def _other_sources(model: Model, data: DataConfig) -> Text:
    """Say what other data than pairs train."""
    ratios = {MAIN: data.ratio, **{name: one.ratio for name, one in data.sources.items()}}
    of = "samples of each step" if data.mix == "joint" else "steps"
    said = [f"The plan is of data.train, which has {100 * data.ratio / sum(ratios.values()):.0f} % of the {of}"]
    for name, one in data.sources.items():
        trains = ", ".join(usable(dict(model.named_objectives()), name, lacking(one.only)))
        what = f"{one.only}s alone" if one.only else "pairs"
        said.append(
            f"data.sources.{name} ({what}) has {100 * one.ratio / sum(ratios.values()):.0f} % and trains {trains}"
        )
    return Text("; ".join(said))


def _parameter_table(parts: dict[str, int]) -> Table:
    table = _table("Parameters", "part", "millions")
    for part, number in parts.items():
        table.add_row(part, f"{number / 1e6:.2f}")
    table.add_section()
    table.add_row("all", f"{sum(parts.values()) / 1e6:.2f}")
    return table


def _flops_table(shared: float, alone: dict[str, float]) -> Table:
    table = _table("Forward GFLOPs per sample", "", "GFLOPs")
    for name, number in alone.items():
        table.add_row(f"{name} alone", f"{number / 1e9:.2f}")
    table.add_section()
    unshared = sum(alone.values())
    table.add_row("one objective at a time", f"{unshared / 1e9:.2f}")
    table.add_row("one step, passes shared", f"{shared / 1e9:.2f}")
    table.add_row("share", f"{100 * shared / unshared:.0f} %")
    return table
