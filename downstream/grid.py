"""The grid of `vlp compare`: fusions x objectives x seeds of one recipe, and which combinations there cannot be."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from encoders.text import BesideConfig, TextConfig
from vlp.config import ConfigError, Layer, build
from vlp.decoder import DecoderConfig
from vlp.fusion import BridgeConfig, FusionConfig, MultiwayConfig, NoFusionConfig, SingleStreamConfig
from vlp.fusion.dual import DualStreamConfig
from vlp.model import Model, build_model
from vlp.recipes import did_you_mean
from vlp.run import RunConfig, settle
from vlp.train.optim import check_parts

logger = logging.getLogger(__name__)

FUSIONS = ("single_stream", "cross", "co", "multiway", "bridge", "none")
"""What `--fusions` knows; `cross` and `co` are the dual stream's attentions."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    variant: str
    """Name of the fusion, or of the user's own variant."""
    objectives: str
    """Their names, joined by `+`."""
    run: RunConfig

    @property
    def name(self) -> str:
        """Its folder within the comparison's."""
        return f"{self.variant}/{self.objectives}/seed{self.run.train.seed}"


@dataclass(frozen=True)
class Grid:
    """What is to be trained, and what cannot be."""

    cells: list[Cell]
    """Seed by seed, so that an interrupted comparison has whole seeds."""
    refused: dict[tuple[str, str], str]
    """Reason by variant and objectives."""


def make_grid(variants: Mapping[str, RunConfig], objectives: Sequence[str], seeds: int) -> Grid:
    """Combine variants, sets of objectives and seeds; what cannot be built on the meta device is refused.

    Args:
        variants: config by name.
        objectives: sets as ``with_objectives`` takes them; empty = each variant's own.
        seeds: how many, from each variant's own on.

    Raises:
        ValueError: an objective is unknown, or nothing of it can be built; with every reason.
    """
    legal: dict[tuple[str, str], RunConfig] = {}
    refused: dict[tuple[str, str], str] = {}
    for variant, run in variants.items():
        for wanted in objectives or ["+".join(run.objectives)]:
            try:
                legal[variant, wanted] = buildable(with_objectives(run, wanted), run)
            except ConfigError:
                raise
            except ValueError as error:
                refused[variant, wanted] = str(error)
    if not legal:
        raise ValueError("\n".join(f"{' x '.join(pair)}: {reason}" for pair, reason in refused.items()))
    cells = [
        Cell(*pair, with_seed(run, run.train.seed + number)) for number in range(seeds) for pair, run in legal.items()
    ]
    return Grid(cells, refused)


def with_fusion(run: RunConfig, name: str) -> RunConfig:
    """Return the run with one of ``FUSIONS`` in place of its own, which gives it the sizes that it knows.

    Raises:
        ValueError: there is no fusion of this name.
    """
    if name == getattr(run.model.fusion, "attention", run.model.fusion.kind):
        return run  # with all its settings
    own = run.model.fusion.model_dump(include=set(BesideConfig.model_fields) - {"init"})
    fusion: FusionConfig
    match name:
        case "single_stream":
            fusion = SingleStreamConfig(**own)
        case "cross" | "co":
            fusion = DualStreamConfig(**own, attention=name)
        case "multiway":
            fusion = MultiwayConfig(**{**own, "norm": "pre"})
        case "bridge":
            fusion = BridgeConfig(**{**own, "norm": "post"})
        case "none":
            fusion = NoFusionConfig()
        case _:
            raise ValueError(f"--fusions {name}: no such fusion; {did_you_mean(name, FUSIONS)}")
    return run.model_copy(update={"model": run.model.model_copy(update={"fusion": fusion})})


def with_objectives(run: RunConfig, names: str) -> RunConfig:
    """Return the run with these objectives, joined by `+`: each is the run's own of that name, or a kind as it is by
    default. All are trained in every step, also where the run draws one a step.

    Raises:
        ConfigError: one is unknown.
    """
    wanted = names.split("+")
    if wanted == list(run.objectives):
        return run
    tree: dict[str, object] = {name: None for name in run.objectives if name not in wanted}
    tree |= {name: {} for name in wanted if name not in run.objectives}
    below = run.model_dump(mode="json")
    below["train"]["sample"] = {}
    return build(RunConfig, Layer(below), Layer({"objectives": tree}, f"--objectives {names}"))


def with_seed(run: RunConfig, seed: int) -> RunConfig:
    """Return the run with another seed."""
    return run.model_copy(update={"train": run.train.model_copy(update={"seed": seed})})


def buildable(run: RunConfig, base: RunConfig) -> RunConfig:
    """Return the run as it can be built: with a decoder where its objectives ask for one and only there, and without
    learning rates of parts that it lacks though ``base`` has them.

    Raises:
        ValueError: parts and objectives do not fit each other; the message names the ways out.
    """
    try:
        model = on_meta(run)
    except ValueError as error:
        if "decoder" not in str(error):
            raise
        other = None if run.model.decoder is not None else DecoderConfig()
        run = run.model_copy(update={"model": run.model.model_copy(update={"decoder": other})})
        model = on_meta(run)
    scales = run.train.optim.lr_scale
    if not scales:
        return run
    names = [name for name, _ in model.named_parameters()]
    found = {part: scale for part, scale in scales.items() if any(f"{name}.".startswith(f"{part}.") for name in names)}
    if found != scales:
        check_parts(scales, [name for name, _ in on_meta(base).named_parameters()])
    optim = run.train.optim.model_copy(update={"lr_scale": found})
    return run.model_copy(update={"train": run.train.model_copy(update={"optim": optim})})


def on_meta(run: RunConfig) -> Model:
    """Build the model without weights; a vocabulary that is not known yet has the tokenizer's size in the config.

    Raises:
        ValueError: parts and objectives do not fit each other.
    """
    run = settle(run)
    unknown = isinstance(run.model.text, TextConfig) and run.model.text.vocabulary_size is None
    size = run.data.tokenizer.size if unknown else None
    with torch.device("meta"):
        return build_model(run.model, run.objectives, pretrained=False, vocabulary_size=size)
