"""Recorded outputs of published downstream models come out of the tasks that a user runs, with no further training."""

from __future__ import annotations

from pathlib import Path

import golden_tasks
import pytest

from scripts.goldens.base import Case


@pytest.mark.parametrize("name", golden_tasks.names())
def test_case(name: str, tmp_path: Path) -> None:
    assert golden_tasks.check(Case(golden_tasks.FOLDER / name), tmp_path)
