"""Runs on several sources: pairs, texts alone and images alone; resumed exactly, and wrong ones refused in words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import BATCH, checkpoints, losses, weights

from vlp.config import ConfigError, load
from vlp.data.reader import open_reader
from vlp.pretrain import pretrain, resume
from vlp.recipes import dump_yaml, from_yaml
from vlp.run import RunConfig

CPU = torch.device("cpu")
OBJECTIVES = {
    "itc": {},
    "itm": {},
    "mlm": {"tied": False},
    "mlm_text": {"kind": "mlm", "alone": True, "source": "text", "mask_probability": 0.4, "head_of": "mlm"},
    "mim": {"target": "pixels", "source": "image", "alone": True},
}


def write(folder: Path, mix: str = "drawn", objectives: Any = None, data: Any = None, **train: Any) -> Path:
    """Write pairs, lines and images, and a recipe of all three."""
    table = runs.write_data(folder / "data")
    (folder / "lines.txt").write_text("".join(f"some {word} words\n\n" for word in runs.WORDS))
    (folder / "images").mkdir(exist_ok=True)
    for number in range(7):
        shutil.copy(folder / "data" / f"{number}.png", folder / "images")
    recipe = runs.write_recipe(folder / "r.yaml", table, **train)
    tree = from_yaml(recipe.read_text())
    del tree["model"]["decoder"]
    tree["model"]["vision"] |= {"mask_token": True}
    tree["objectives"] = OBJECTIVES if objectives is None else objectives
    tree["data"] |= {
        "mix": mix,
        "sources": {
            "text": {"train": str(folder / "lines.txt"), "only": "text", "ratio": 0.5},
            "image": {"train": str(folder / "images"), "only": "image", "ratio": 0.5},
        },
    }
    tree["data"] |= data or {}
    recipe.write_text(dump_yaml(tree))
    return recipe


def trained(folder: Path) -> list[set[str]]:
    """Which objectives each record has."""
    return [{name[:-5] for name in record if name.endswith("/loss")} for record in losses(folder)]


@pytest.mark.parametrize("mix", ["drawn", "joint"])
def test_resumed_in_the_middle(tmp_path: Path, mix: str) -> None:
    batch = 2 * BATCH if mix == "joint" else BATCH
    settings = {"global_batch": batch, "micro_batch": 4, "samples": 10 * batch, "save_every": 4 * batch, "log_every": 1}
    run = load(RunConfig, write(tmp_path, mix, keep=9, **settings))
    pretrain(run, tmp_path / "whole", CPU)
    found = trained(tmp_path / "whole")
    assert set().union(*found) == set(OBJECTIVES)
    pairs = {"itc", "itm", "mlm"}
    assert all(one in (pairs, {"mlm_text"}, {"mim"}) if mix == "drawn" else one == set(OBJECTIVES) for one in found)
    state = torch.load(checkpoints(tmp_path / "whole")[0] / "train_state.pt", weights_only=True)
    assert sum(state["positions"].values()) == state["seen"] == 4 * batch
    for left in (1, 2):
        shutil.copytree(tmp_path / "whole", tmp_path / f"run{left}")
        for path in checkpoints(tmp_path / f"run{left}")[left:]:
            shutil.rmtree(path)
        resume(tmp_path / f"run{left}", [], CPU)
        assert weights(tmp_path / f"run{left}") == weights(tmp_path / "whole")
        assert losses(tmp_path / f"run{left}") == losses(tmp_path / "whole")


def test_changed_source_shows(tmp_path: Path) -> None:
    run = load(RunConfig, write(tmp_path, samples=4 * BATCH, save_every=2 * BATCH))
    pretrain(run, tmp_path / "run", CPU)
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    (tmp_path / "lines.txt").write_text("other words\n")
    with pytest.raises(ValueError, match=r"data\.sources\.text\.hash \w+ is not that of data\.sources\.text\.train"):
        resume(tmp_path / "run", [], CPU)


def test_texts_alone(tmp_path: Path) -> None:
    """A stage of words alone (VLMo): what reads no image is all that is trained."""
    recipe = write(tmp_path, objectives={"mlm": {"alone": True}}, samples=4 * BATCH)
    tree = from_yaml(recipe.read_text())
    tree["model"]["fusion"] = {"kind": "none"}
    tree["data"] |= {"train": str(tmp_path / "lines.txt"), "only": "text", "sources": {}}
    tree["train"]["optim"]["lr_scale"] = {"vision": 0.0}
    recipe.write_text(dump_yaml(tree))
    pretrain(load(RunConfig, recipe), tmp_path / "run", CPU)
    assert trained(tmp_path / "run")[-1] == {"mlm"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": {**OBJECTIVES, "mlm_text": {"kind": "mlm", "source": "txt"}}}, r"source txt is no source of"),
        ({"objectives": {"itc": {}, "itm": {}, "mlm": {}}}, r"data\.sources\.text: texts alone train none of"),
        (
            {"data": {"sources": {"text": {"only": "text"}}}},
            r"data\.sources\.text\.train is not set; name the data with --data\.sources\.text\.train DATA, or do "
            r"without: --data\.sources\.text none --objectives\.mlm_text none$",
        ),
        ({"sample": {"itc+itm+mlm+mlm_text+mim": 1}}, r"train\.sample draws the objectives, and data\.sources the"),
        ({"mix": "joint", "global_batch": 2}, r"data\.mix joint: of train\.global_batch 2 there is less than one"),
        (
            {"objectives": {**OBJECTIVES, "mim": {"alone": True, "head_of": "mlm"}}},
            r"head_of 'mlm' is no other objective of its kind",
        ),
        ({"objectives": {**OBJECTIVES, "itc": {"source": "image"}}}, r"\['itc'\] are trained by none of the sources"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    recipe = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=said) as caught:
        pretrain(load(RunConfig, recipe), tmp_path / "run", CPU)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_unknown_setting_of_a_source(tmp_path: Path) -> None:
    recipe = write(tmp_path, data={"sources": {"text": {"train": "x.txt", "onyl": "text"}}})
    with pytest.raises(ConfigError, match="onyl"):
        load(RunConfig, recipe)


def test_lines_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("ein Bär\r\n\n  \nzwei\n".encode() + b"\xff\xfe\nlast")
    reader = open_reader(str(path), image=())
    assert len(reader) == 4
    assert [(reader[i].key, reader[i].texts) for i in (0, 1, 3)] == [
        ("1", ("ein Bär",)),
        ("4", ("zwei",)),
        ("6", ("last",)),
    ]
    with pytest.raises(ValueError, match="line is not UTF-8"):
        reader[2]
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="has only empty lines"):
        open_reader(str(path))
