"""`vlp recipes`: the survey's table, from the recipes themselves.

Sizes and costs are counted on the meta device, as `vlp show` does. What deviates from the publication and what is
lacking stands in a recipe's head comment: paragraphs that begin with "Deviation" or "Lacks", statements divided by
semicolons and full stops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from encoders import GridConfig, HfVisionConfig, PatchConfig, RegionConfig, TextConfig
from objectives.base import Draw
from vlp.config import load
from vlp.fusion import NoFusionConfig, SublayersConfig
from vlp.fusion.dual import DualStreamConfig
from vlp.fusion.multiway import MultiwayConfig
from vlp.fusion.single import SingleStreamConfig
from vlp.model import ModelConfig
from vlp.parts import parameters_by_part
from vlp.recipes import find_recipe
from vlp.run import RunConfig, settle
from vlp.show import meta_model, synthetic_batch

WRITING = ("lm", "prefix_lm", "seq2seq_mlm")
"""Kinds of objectives that make a stack without a decoder write."""
PAIRS = 4
"""Pairs of the batch that costs are counted with; a cost per pair does not depend on it."""


@dataclass(frozen=True)
class Entry:
    """A recipe's line in the survey's table."""

    name: str
    vision: str
    """Vision feature."""
    text: str
    """Text feature."""
    streams: str
    architecture: str
    objectives: str
    parameters: int
    """Of all that is trained or frozen, without a momentum teacher."""
    flops: float
    """Forward FLOPs of a step for each pair, a multiply-add as two; where objectives are drawn, their mean."""
    deviations: tuple[str, ...]
    """Statements of the head comment."""
    lacks: tuple[str, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as the table shows it."""
        sizes = f"{self.parameters / 1e6:.1f}", f"{self.flops / 1e9:.1f}"
        words = self.vision, self.text, self.streams, self.architecture, self.objectives
        return (self.name, *words, *sizes, f"{len(self.deviations)} / {len(self.lacks)}")


HEADERS = (
    *("recipe", "vision feature", "text feature", "streams", "architecture", "objectives"),
    *("M weights", "GFLOPs a pair", "deviates / lacks"),
)


def survey(name: str) -> Entry:
    """Return a pretraining recipe's line.

    Raises:
        ValueError: there is no such recipe, or it cannot be built.
    """
    run = settle(load(RunConfig, name, group="pretrain"))
    parts = parameters_by_part(model := meta_model(run))
    model.requires_grad_(False)  # else the counter fails on inputs that are parameters (SigLIP)
    batch = synthetic_batch(model, PAIRS, run.data.max_length, seen=run.train.samples)
    drawn = run.train.sample or {"+".join(run.objectives): 1.0}

    @torch.no_grad()
    def cost(names: str) -> float:
        with FlopCounterMode(display=False) as counter:
            model.losses(batch, Draw(), names.split("+"))
        return counter.get_total_flops() / PAIRS

    deviations, lacks = statements(find_recipe(name, group="pretrain"))
    return Entry(
        Path(name).stem,
        vision_feature(run.model),
        text_feature(model.config),
        streams(run.model),
        architecture(run),
        (", or " if run.train.sample else ", ").join(run.train.sample or run.objectives),
        sum(number for part, number in parts.items() if part != "teacher"),
        sum(ratio * cost(names) for names, ratio in drawn.items()) / sum(drawn.values()),
        deviations,
        lacks,
    )


def vision_feature(model: ModelConfig) -> str:
    """Where image tokens come from."""
    vision = model.vision
    if isinstance(vision, RegionConfig):
        return f"{vision.number} regions"
    if isinstance(vision, GridConfig):
        return f"grid of {short(vision.model)}" + ("" if vision.dictionary is None else ", by a dictionary")
    if isinstance(vision, HfVisionConfig):
        return "a transformers model"
    assert isinstance(vision, PatchConfig)
    stem = " behind a CNN" if vision.stem or vision.hybrid else ""
    return f"patches{stem}" if vision.depth == 0 else f"patches{stem}, {short(vision.model)}"


def short(model: str) -> str:
    """The part of a timm model's name that says what it is."""
    return re.sub(r"_(patch\d+|window\d+|clip|quickgelu|siglip|\d{3})(?=_|$)|\..*|^tf_", "", model)


def text_feature(model: ModelConfig) -> str:
    """Where word tokens come from."""
    if not isinstance(model.text, TextConfig):
        return "a transformers model"
    layers = model.text.layers
    return "embedded words" if layers == 0 else f"{'all' if layers is None else layers} layers"


def streams(model: ModelConfig) -> str:
    """Where the two meet."""
    fusion = model.fusion
    if isinstance(fusion, NoFusionConfig):
        return "dual, apart"
    if isinstance(fusion, SingleStreamConfig):
        return "single"
    if isinstance(fusion, MultiwayConfig):
        return "single, multiway"
    if isinstance(fusion, DualStreamConfig):
        return f"dual, {fusion.attention}"
    return "dual, co" if isinstance(fusion, SublayersConfig) else f"dual, {fusion.kind}"


def architecture(run: RunConfig) -> str:
    """Encoder-only, or with something that writes."""
    if run.model.decoder is not None:
        return "encoder-decoder"
    writes = any(one.kind in WRITING for one in run.objectives.values())
    return "encoder that writes" if writes else "encoder"


def statements(recipe: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what a recipe's head comment says of deviations, and of what is lacking."""
    found: dict[str, list[str]] = {"Deviation": [], "Lacks": []}
    kind = None
    paragraphs: list[tuple[str, list[str]]] = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if re.match(r"# \S", line):  # what goes on is further in
            kind = next((one for one in found if line.startswith(f"# {one}")), None)
            paragraphs.append((kind or "", []))
        if kind is not None:
            paragraphs[-1][1].append(line.strip("# "))
    for kind, lines in paragraphs:
        if kind:
            found[kind] += divide(" ".join(lines))
    return tuple(found["Deviation"]), tuple(found["Lacks"])


def divide(paragraph: str) -> list[str]:
    """A labelled paragraph -> its statements; "nothing" is none."""
    text = re.sub(r"^(?:Deviation\w*|Lacks)[^:]{0,20}:\s*|^Lacks\s+", "", paragraph).rstrip(".")
    if text.startswith("nothing"):
        return []
    outside = re.sub(r"\([^()]*\)", lambda inside: "\0" * len(inside[0]), text)  # brackets hold no statement
    ends = [found.span() for found in re.finditer(r";\s+|\.\s+(?=[A-Z])", outside)]
    starts = [0, *(end for _, end in ends)]
    return [text[first:last] for first, last in zip(starts, [*(start for start, _ in ends), len(text)], strict=True)]


def survey_table(entries: Iterable[Entry]) -> Table:
    """Return the table to print."""
    table = Table(title="Pretraining recipes; vlp recipes NAME prints one", title_justify="left")
    for column in HEADERS:
        table.add_column(column, justify="right" if column in HEADERS[-3:] else "left", overflow="fold")
    for entry in entries:
        table.add_row(*entry.cells)
    return table


def details(entry: Entry) -> str:
    """Return a recipe's line as comments that may stand below it."""
    lines = [f"# {header}: {cell}" for header, cell in zip(HEADERS[1:-1], entry.cells[1:-1], strict=True)]
    for label, found in (("deviates", entry.deviations), ("lacks", entry.lacks)):
        lines += [f"# {label}: {one}" for one in found]
    return "\n".join(lines)
