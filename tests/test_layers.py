"""The import contracts of pyproject.toml hold, and catch what they are for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vlp", "encoders", "objectives", "downstream")

CLI = "vlp.cli is imported by nobody"
DOWNSTREAM = "downstream is imported by vlp.cli alone"
VLP = "encoders and objectives import vlp.config alone of vlp"
OBJECTIVES = "objectives -> encoders"
CONFIG = "vlp.config imports nothing of ours"
FLOORS = "The floors of vlp"

PLANTED = {
    "downstream/task.py": ("from vlp.cli import main", {CLI}),
    "vlp/train/loop.py": ("from downstream.task import TaskConfig", {DOWNSTREAM}),
    "encoders/text.py": ("from vlp.data.order import Order", {VLP}),
    "objectives/itc.py": ("import vlp.data.batch", {VLP}),
    "encoders/layers.py": ("from objectives.base import Draw", {OBJECTIVES}),
    "vlp/recipes.py": ("import encoders.types", {CONFIG}),
    "vlp/passes.py": ("from vlp.checkpoint.load import load", {FLOORS}),
    "vlp/attic.py": ('"""A module on no floor."""', {FLOORS}),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources."""
    folder = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.tar", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def broken(folder: Path) -> set[str]:
    """Names of the broken contracts."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    found = {line.partition(" BROKEN")[0] for line in lines if " BROKEN" in line}
    assert any(" KEPT" in line for line in lines) and bool(found) == bool(done.returncode), done.stdout + done.stderr
    return found


def test_contracts_hold(tree: Path) -> None:
    assert broken(tree) == set()


@pytest.mark.parametrize("name", PLANTED)
def test_planted_import_is_caught(name: str, tree: Path) -> None:
    line, caught = PLANTED[name]
    path = tree / name
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\n{line}\n")
    try:
        assert broken(tree) == caught
    finally:
        path.unlink() if before is None else path.write_text(before)
