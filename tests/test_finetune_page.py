"""The commands of configs/finetune/README.md are parsed: every flag and setting in them exists."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from downstream import AnyTask
from vlp.cli import main
from vlp.config import list_recipes, slot_of

PAGE = (Path(__file__).parent.parent / "configs" / "finetune" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^<!-- untried here -->\n```bash\n(.*?)^```$", PAGE, re.M | re.S)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_command_is_parsed(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words[0] == "vlp" and main([*words[1:], "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("format: ") if words[1] != "data" else "not converted" in said.err
    assert not list(tmp_path.iterdir())


def test_every_block_is_marked_and_every_finetuned_task_has_a_row():
    assert len(BLOCKS) == PAGE.count("```bash")
    kinds = {kind for kind in slot_of(AnyTask).classes if kind} - {
        "zero_shot",
        "linear_probe",
    }  # which finetune nothing
    assert set(re.findall(r"^\| \[(\w+)\]\(#\w+\)", PAGE, re.M)) == kinds
    assert {words[2] for words in COMMANDS if words[1] == "finetune"} == kinds
    for place in re.findall(r"\(#(\w+)\)", PAGE):
        assert f"\n## {place}\n" in PAGE


@pytest.mark.parametrize("name", list_recipes("finetune"))
def test_a_recipes_head_creates_the_objectives_that_it_sets(name: str) -> None:
    text = (Path(__file__).parents[1] / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    named = re.findall(r"--objectives\.(\w+)\.([\w-]+)", text)
    stated = yaml.safe_load(text).get("objectives") or {}
    assert {one for one, _ in named} <= {one for one, field in named if field == "kind"} | set(stated)
