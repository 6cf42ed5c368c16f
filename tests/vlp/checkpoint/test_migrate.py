"""A checkpoint of every config format goes on loading, also after a field is renamed.

`write_format.py` writes the stored checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from checkpoints import run_of
from helpers import tiny_model
from pydantic import Field
from write_format import describe

import vlp
from objectives import ItcConfig, ItmConfig
from objectives.base import ModelSpec
from objectives.itc import Itc
from objectives.settings import ObjectiveSettings
from vlp import recipes
from vlp.checkpoint import load as load_module
from vlp.checkpoint.migrate import MIGRATIONS, migrate
from vlp.config import Config, to_yaml
from vlp.data.loader import DataConfig
from vlp.model import ModelConfig

HERE = Path(__file__).parent


@pytest.mark.parametrize("number", range(1, recipes.FORMAT + 1))
def test_every_format_loads_and_says_the_same(number: int) -> None:
    found, stored = (
        describe(vlp.load(HERE / f"format_{number}")),
        json.loads((HERE / f"format_{number}.json").read_text()),
    )
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        flat = [x for row in value for x in (row if isinstance(row, list) else [row])]
        ours = [x for row in found[name] for x in (row if isinstance(row, list) else [row])]
        assert ours == pytest.approx(flat, abs=1e-5)


class RenamedItcConfig(ObjectiveSettings):
    """ITC as format 2 might have it: `positives` is called `true_pairs`."""

    kind: Literal["itc"] = "itc"
    weight: float = 1.0
    true_pairs: str = "id_or_caption"
    min_scale: float = 1.0
    max_scale: float = 100.0
    trains_embed: ClassVar[bool] = True
    reads: ClassVar[frozenset] = frozenset()

    def build(self, spec: ModelSpec) -> Itc:
        return ItcConfig(positives=self.true_pairs).build(spec)  # type: ignore[arg-type]


class RenamedConfig(Config):
    model: ModelConfig
    objectives: dict[str, RenamedItcConfig | ItmConfig] = Field(default_factory=dict)
    data: DataConfig


def rename(tree: dict[str, Any]) -> dict[str, Any]:
    for one in tree["objectives"].values():
        if one["kind"] == "itc":
            one["true_pairs"] = one.pop("positives")
    return tree


def test_a_checkpoint_of_format_1_loads_after_a_field_is_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe(vlp.load(HERE / "format_1"))
    monkeypatch.setattr(load_module, "LoadedConfig", RenamedConfig)
    with pytest.raises(ValueError, match=r"objectives\.itc\.positives = 'id_or_caption': unknown field"):
        vlp.load(HERE / "format_1")
    monkeypatch.setattr(recipes, "FORMAT", 2)
    monkeypatch.setitem(MIGRATIONS, 1, rename)
    loaded = vlp.load(HERE / "format_1")
    assert loaded.config.objectives["itc"].true_pairs == "id_or_caption"  # type: ignore[union-attr]
    assert describe(loaded) == before


def test_formats_are_lifted_one_at_a_time_from_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "FORMAT", 3)
    monkeypatch.setitem(MIGRATIONS, 1, lambda tree: {**tree, "a": tree["a"] + ["1 to 2"]})
    monkeypatch.setitem(MIGRATIONS, 2, lambda tree: {**tree, "a": tree["a"] + ["2 to 3"]})
    tree = {"format": 1, "a": []}
    assert migrate(tree) == {"format": 3, "a": ["1 to 2", "2 to 3"]}
    assert migrate({**tree, "format": 2}) == {"format": 3, "a": ["2 to 3"]}
    assert tree == {"format": 1, "a": []}


def test_formats_without_a_way_up_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="format = 0: no such format; 1 was the first"):
        migrate({"format": 0})
    monkeypatch.setattr(recipes, "FORMAT", 0)
    with pytest.raises(ValueError, match=r"format = 1: newer than this vlp, .* update vlp \(.*config\.yaml\)"):
        vlp.load(HERE / "format_1")


def test_the_stored_tree_is_the_whole_run() -> None:
    tree = recipes.from_yaml(to_yaml(run_of(tiny_model())))
    assert tree["format"] == recipes.FORMAT and {"model", "objectives", "data", "train"} <= set(tree)
