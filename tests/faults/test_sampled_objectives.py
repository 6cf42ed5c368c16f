"""A run whose steps train one objective each goes on from a checkpoint as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import runs
import torch
from runs import BATCH, checkpoints, losses, weights

from vlp.config import load
from vlp.pretrain import pretrain, resume
from vlp.recipes import dump_yaml, from_yaml
from vlp.run import RunConfig


def test_resumed_in_the_middle(tmp_path: Path) -> None:
    data = runs.write_data(tmp_path / "data")
    sample = {"itc+itm": 1, "mlm": 2}
    recipe = runs.write_recipe(tmp_path / "r.yaml", data, sample=sample, samples=10 * BATCH, save_every=5 * BATCH)
    tree = from_yaml(recipe.read_text())
    del tree["model"]["decoder"], tree["objectives"]["lm"]
    recipe.write_text(dump_yaml(tree))
    cpu = torch.device("cpu")
    pretrain(load(RunConfig, recipe), tmp_path / "whole", cpu)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    resume(tmp_path / "run", [], cpu)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    trained = {name for record in losses(tmp_path / "whole") for name in record if name.endswith("/loss")}
    assert trained >= {"mlm/loss", "itm/loss", "itc/loss"}
