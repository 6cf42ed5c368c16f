"""A wheel of the tree, installed elsewhere, works from a folder whose packages have the names of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import runs

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vlp", "encoders", "objectives", "downstream")


def call(*words: str | Path, **settings) -> str:
    """Run a program that must succeed; return its standard output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (found,) = folder.glob("vlp-*.whl")
    return found


@pytest.fixture(scope="module")
def place(wheel) -> Path:
    """Where the wheel is installed: a folder of its own, with the dependencies of the tests' environment."""
    target = wheel.parent / "installed"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    call(*pip, "--no-index", "--no-deps", "--no-compile", "--target", target, wheel)
    return target


def test_the_wheel_holds_every_file_of_the_packages_and_the_recipes(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"vlp/data/emoji/{name}" for name in ("noto.tar", "twemoji.tar", "fluent3d.tar", "split.json")} <= wanted
    assert "configs/pretrain/demo.yaml" in recipes
    assert held >= wanted | {f"vlp/{name}" for name in recipes}
    others = {name for name in held if name.split("/")[0] not in PACKAGES}
    assert {name.rpartition("/")[2] for name in others} >= {"LICENSE", "NOTICE", "METADATA", "entry_points.txt"}
    assert all(".dist-info/" in name for name in others)


def test_dependencies_have_lower_bounds_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    assert len(names) > 20
    assert not [name for name in names if "==" in name or "@" in name or "<" in name]


def test_the_installed_command_in_a_folder_that_holds_encoders(place, tmp_path):
    """List recipes, show one, and pretrain on the emoji of the wheel, all at once."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} of the working directory')\n")
    recipe = runs.write_recipe(tmp_path / "tiny.yaml", "emoji:noto", samples=2 * runs.BATCH)
    env = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [place / "bin" / "vlp", *words], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for words in (
            ["recipes", "--names"],
            ["show", "demo"],
            ["pretrain", recipe, "--out", "run", "--device", "cpu", "--data.where", "{split: val}"],
        )
    ]
    said = [process.communicate(timeout=120)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], "\n".join(said)
    assert "pretrain/demo" in said[0] and "pretrain/albef" in said[0]
    assert "vit_tiny_patch16_224" in said[1]
    assert f"{2 * runs.BATCH} samples seen" in said[2]
    assert len(runs.checkpoints(tmp_path / "run")) == 1
    where = "import vlp, encoders; print(vlp.__file__, encoders.__file__)"
    found = call(sys.executable, "-c", where, cwd=place.parent, env=env).split()
    assert all(Path(path).is_relative_to(place) for path in found)


@pytest.mark.slow
def test_the_installed_demo_in_a_folder_that_holds_encoders(place, tmp_path):
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders/__init__.py").write_text("raise SystemExit('encoders of the working directory')\n")
    env = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    words = (place / "bin" / "vlp", "demo", "--smoke", "--out", "run", "--device", "cpu")
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    assert "<html" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
