"""The table of objectives against chance: every objective is in it, and a few rows of it with a few steps."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from objectives import ObjectiveConfig
from scripts.objectives_table import Row, run_trial, table
from scripts.trials.data import COLOURS, HELD_OUT, TRAIN, colour_classes, emoji
from scripts.trials.trials import TRIALS, entropy
from vlp.config import build
from vlp.run import RunConfig


def test_every_objective_is_tried() -> None:
    union, _ = get_args(ObjectiveConfig)
    kinds = {one.model_fields["kind"].default for one in get_args(union)}
    measured = {next(iter(build(RunConfig, trial.tree()).objectives.values())).kind for trial in TRIALS.values()}
    assert measured == kinds


def test_held_out_is_another_style_of_the_same_concepts() -> None:
    seen, unseen = emoji(TRAIN), emoji(HELD_OUT)
    assert {one.label for one in seen} == {one.label for one in unseen} and len(seen) == 2 * len(unseen) == 636


@pytest.mark.parametrize("name", ["answer, one of all", "regress", "mlm"])
def test_a_row_in_a_few_steps(name: str) -> None:
    row = run_trial(name, TRIALS[name], steps=12)
    assert all(map(math.isfinite, (row.chance, row.before, row.after, row.held_out)))
    assert row.after < row.before and row.held_out < row.before


def test_chance_looks_at_nothing() -> None:
    assert entropy(torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(math.log(2))
    mixed = run_trial("classify", TRIALS["classify"], steps=1)
    assert 0.9 * math.log(3) < mixed.chance < math.log(3)  # three groups of unlike sizes


def test_colours_have_classes_of_their_own() -> None:
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pixels[1] = 255
    assert colour_classes(pixels).unique().tolist() == [0, COLOURS - 1]


def test_table_says_which_rows_learned() -> None:
    row = Row("itc", 3.9, 4.0, 2.0, 2.5)
    assert row.learned and not Row("itc", 3.9, 4.0, 3.95, 4.0).learned
    assert table([row]).splitlines()[-1] == "| itc | 3.900 | 4.000 | 2.000 | 2.500 |"
