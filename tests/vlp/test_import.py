"""`import vlp` is cheap and silent, and takes no other project's folders for ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vlp

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *path: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": ":".join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd or "/", capture_output=True, text=True, check=False
    )


def test_import_is_cheap_and_silent() -> None:
    heavy = {"torch", "numpy", "transformers", "timm", "webdataset", "PIL", "pydantic", "yaml", "open_clip", "encoders"}
    found = python(f"import sys, vlp; print(sorted({heavy!r} & set(sys.modules)))", ROOT)
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_all_public_names_are_there() -> None:
    for name in vlp.__all__:
        assert getattr(vlp, name) is not None and name in dir(vlp)
    assert vlp.load.__module__ == "vlp.checkpoint.load"
    with pytest.raises(AttributeError, match="module 'vlp' has no attribute 'laod'; it has Batch"):
        _ = vlp.laod


@pytest.mark.parametrize("name", ["encoders", "objectives", "downstream"])
@pytest.mark.parametrize("form", ["package", "module"])
def test_a_folder_that_hides_ours_is_named(tmp_path: Path, name: str, form: str) -> None:
    culprit = tmp_path / name if form == "package" else tmp_path / f"{name}.py"
    file = culprit / "__init__.py" if form == "package" else culprit
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    found = python("import vlp", tmp_path, ROOT)
    last = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 1 and last.startswith(f"ImportError: vlp: {culprit} hides vlp's own package '{name}'")


def test_a_missing_neighbour_is_named(tmp_path: Path) -> None:
    (tmp_path / "vlp").symlink_to(ROOT / "vlp")
    # -S: without site-packages, where vlp may be installed; the check needs the standard library only.
    found = subprocess.run(
        [sys.executable, "-S", "-c", "import vlp"],
        env={"PYTHONPATH": str(tmp_path)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    last = found.stderr.strip().splitlines()[-1]
    assert last == f"ImportError: vlp: package 'encoders' is missing beside {ROOT / 'vlp'}; install vlp again"


def test_a_folder_of_the_same_name_in_the_working_directory_does_no_harm(tmp_path: Path) -> None:
    """An installed command does not look into the working directory; a folder without code hides nothing anyway."""
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders" / "__init__.py").write_text("raise AssertionError('the wrong one')")
    script = tmp_path / "bin" / "vlp-like"
    script.parent.mkdir()
    script.write_text("import vlp, encoders.types\nprint(vlp.Batch is encoders.types.Batch)\n")
    found = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == "True\n", found.stderr
    (tmp_path / "empty" / "encoders").mkdir(parents=True)
    assert python("import vlp", tmp_path / "empty", ROOT).returncode == 0
