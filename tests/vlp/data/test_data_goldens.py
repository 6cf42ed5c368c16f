"""The golden cases without a model, as ``scripts/check_goldens.py`` compares them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts.goldens.base import Case
from scripts.goldens.misc import CASES, check

GOLDENS = Path(__file__).parents[2] / "goldens"


@pytest.mark.parametrize("name", [*CASES, "tokenizers"])
def test_a_case_passes_with_everything_compared(name):
    verdict = check(Case(GOLDENS / name))
    assert verdict.passed and 0 < verdict.compared == verdict.recorded, verdict.line()


def test_other_cases_are_others():
    assert check(Case(GOLDENS / "hf_clip")) is None


@pytest.mark.parametrize("name", ["meter_posembed_resize", "preprocess", "tokenizers"])
def test_a_wrong_record_fails(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    for file in (GOLDENS / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if name == "tokenizers":
        recorded = json.loads((folder / "tokenizers.json").read_text())
        recorded["wordpiece"]["pairs"][0]["token_type_ids"][0] = 1
        (folder / "tokenizers.json").write_text(json.dumps(recorded))
    else:
        outputs = load_file(folder / "outputs.safetensors")
        next(iter(outputs.values())).view(-1)[-1] += 1e-3
        outputs["new"] = outputs[next(iter(outputs))].clone()
        save_file(outputs, folder / "outputs.safetensors")
    problems = check(Case(folder)).problems
    assert len(problems) == (1 if name == "tokenizers" else 2), problems
