"""The grid of `vlp compare`: what its cells share, which combinations are refused, and the table of their scores."""

from __future__ import annotations

from io import StringIO

import pytest
import torch
from rich.console import Console

from downstream.compare import HEADERS, Row, compare_table, markdown, spread, table_rows, unheld
from downstream.grid import FUSIONS, make_grid, with_fusion, with_objectives
from vlp.cli.compare import ALL
from vlp.config import ConfigError, build, load
from vlp.model import build_model
from vlp.run import RunConfig

HEADS = {"width": 16, "heads": 2}
TINY = {"layers": 1, **HEADS}
RUN = build(
    RunConfig,
    {
        "model": {
            "vision": {"model": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8, "depth": 1, **HEADS},
            "text": {**TINY, "norm": "pre", "vocabulary_size": 64},
            "fusion": {"kind": "dual_stream", **TINY, "norm": "pre", "attention": "co", "pooler": "concat"},
            "embed": {"width": 8},
        },
        "objectives": {"itc": {}, "itm": {}, "mlm": {"weight": 0.4}},
        "train": {"seed": 3, "optim": {"lr_scale": {"embed.main.logit_scale": 10.0}}},
    },
)  # fmt: skip


def test_fusions_keep_the_sizes() -> None:
    for name in FUSIONS[:4]:
        fusion = with_fusion(RUN, name).model.fusion
        assert (fusion.width, fusion.layers, fusion.heads, fusion.norm) == (16, 1, 2, "pre")
        assert getattr(fusion, "attention", fusion.kind) == name
    assert with_fusion(RUN, "co") == RUN


def test_the_default_grid_is_that_of_the_readme() -> None:
    fusions, objectives, seeds = ALL
    grid = make_grid(
        {name: with_fusion(load(RunConfig, "demo_small", group="pretrain"), name) for name in fusions},
        objectives,
        seeds,
    )
    assert [cell.name for cell in grid.cells] == [
        *(f"{fusion}/{one}/seed{seed}" for seed in range(2) for fusion, one in cells_of(fusions)),
    ]
    assert unheld({cell.name: cell.run for cell in grid.cells}) == []
    assert len(grid.refused) == 6 and all("; " in reason for reason in grid.refused.values())


def cells_of(fusions: tuple[str, ...]) -> list[tuple[str, str]]:
    """What of the default grid can be built."""
    fused = [(fusion, one) for fusion in fusions if fusion != "none" for one in ("itm", "itc+itm+mlm")]
    return [*fused, ("none", "itc")]


def test_cells_share_the_weights_of_shared_parts() -> None:
    grid = make_grid({name: with_fusion(RUN, name) for name in ("co", "multiway")}, ["itm", "itc+itm+mlm"], 1)
    states = [build_model(cell.run.model, cell.run.objectives, seed=3).state_dict() for cell in grid.cells]
    assert [cell.run.train.seed for cell in grid.cells] == [3] * 4
    for state in states[1:]:
        shared = [name for name in state if name in states[0] and not name.startswith("fusion.")]
        assert {name.split(".")[0] for name in shared} == {"vision", "text", "objectives"}
        assert all(torch.equal(state[name], states[0][name]) for name in shared if "head" not in name)


def test_objectives_are_the_recipes_own_or_as_by_default() -> None:
    run = with_objectives(RUN, "mlm+mim")
    assert list(run.objectives) == ["mlm", "mim"] and run.objectives["mlm"].weight == 0.4
    with pytest.raises(ConfigError, match="itd"):
        with_objectives(RUN, "itc+itd")


def test_decoder_and_learning_rates_follow_the_objectives() -> None:
    written, matched = (make_grid({"co": RUN}, [one], 1).cells[0].run for one in ("itm+lm", "itm"))
    assert written.model.decoder is not None and matched.model.decoder is None
    assert matched.train.optim.lr_scale == {}
    again = make_grid({"co": written.model_copy(update={"objectives": {}})}, ["itm"], 1).cells[0].run
    assert again.model.decoder is None


def test_nothing_legal_is_an_error() -> None:
    with pytest.raises(ValueError, match="none x itm: objective itm needs a fusion"):
        make_grid({"none": with_fusion(RUN, "none")}, ["itm"], 1)


def row(variant: str, seed: int, recall: float, itc: bool = True) -> Row:
    scorings = ("ITC/", "ITM rerank/", "") if itc else ("ITM rerank/", "")
    metrics = {f"{name}{way}/R@{k}": recall for name in scorings for way in ("t2i", "i2t") for k in (1, 5, 10)}
    chance = {f"{way}/R@{k}": k / 1000 for way in ("t2i", "i2t") for k in (1, 5, 10)}
    return Row(variant, "itc+itm" if itc else "itm", seed, 1_250_000, 99.5, {"itm": 0.5}, metrics, chance)


def test_table_has_mean_and_spread_beside_chance() -> None:
    rows = [row("co", 0, 0.25), row("none", 0, 0.5, itc=False), row("co", 1, 0.35)]
    recalls = "30.0 ± 7.1 / 30.0 ± 7.1 / 30.0 ± 7.1"
    assert table_rows(rows) == [
        ("co", "itc+itm", "ITC", recalls, recalls, "1.25", "100"),
        ("co", "itc+itm", "ITC, then ITM", recalls, recalls, "1.25", "100"),
        ("none", "itm", "ITM", *["50.0 / 50.0 / 50.0"] * 2, "1.25", "100"),
        ("chance", "", "", *["0.1 / 0.5 / 1.0"] * 2, "", ""),
    ]
    assert spread([0.25], 3) == "0.250" and spread([], 1) == ""
    lines = markdown(rows, {("none", "itm"): "why", ("none", "mlm"): "why"}).splitlines()
    assert lines[0] == f"| {' | '.join(HEADERS)} |" and lines[-1] == "Not legal: none x itm, none x mlm (why)."
    console = Console(width=200, record=True, file=StringIO())
    console.print(compare_table(rows, {("none", "mlm"): "why"}))
    assert "seeds [0, 1]" in (text := console.export_text()) and "not legal: none x mlm: why" in text
