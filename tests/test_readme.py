"""What README.md, configs/README.md and CONTRIBUTING.md say is so: commands run, paths exist, examples work.

In README.md a fenced block after ``<!-- runs here -->`` is run, in order and in one folder, through the command line's
own entry point; ``make demo`` as the Makefile's command with ``--smoke``, other make targets are looked up only. A
block after ``<!-- untried here -->`` is parsed with ``--dry-run``, without ``torchrun`` and its options.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from vlp.cli import main
from vlp.data.benchmark import emoji_path
from vlp.recipes import find_recipe, list_recipes

ROOT = Path(__file__).parent.parent
README, CONFIGS, CONTRIBUTING = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "configs/README.md", "CONTRIBUTING.md")
)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PACKAGES = ("vlp", "encoders", "objectives", "downstream", "configs")
RUNS, UNTRIED = "runs here", "untried here"


@dataclass(frozen=True)
class Block:
    """A fenced block: the comment before it, if any, its language and its text."""

    marker: str
    language: str
    text: str

    @property
    def name(self) -> str:
        """The file that its first line names, if it does."""
        return self.text.split("\n", 1)[0].removeprefix("# ")

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line, without comments."""
        return [words for line in self.text.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = re.finditer(r"(?:<!-- ([a-z ]+) -->\n)?^```(\w*)\n(.*?)^```$", page, re.M | re.S)
    return [Block(marker or "", language, text) for marker, language, text in (one.groups() for one in found)]


PAGE = blocks(README)
STEPS = [
    step
    for block in PAGE
    if block.marker == RUNS
    for step in (block.commands if block.language == "bash" else [block.text])
]
PARSED = [words for block in PAGE if block.marker == UNTRIED for words in block.commands]


def rule(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    found = re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)*)", MAKEFILE, re.M)
    assert found, f"the Makefile has no target {target}"
    return [line.replace("$(BIN)/", "").strip() for line in found[1].splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader: a few pictures, tables of pairs and questions, and the recipe that the page shows."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "photos").mkdir()
    pairs, questions = ["image,caption"], []
    with tarfile.open(emoji_path("noto")) as tar:
        members = {member.name: member for member in tar}
        for key in [name.removesuffix(".webp") for name in members if name.endswith(".webp")][:80]:
            picture, label = (tar.extractfile(members[f"{key}.{kind}"]).read() for kind in ("webp", "txt"))
            Image.open(BytesIO(picture)).save(folder / "photos" / f"{key}.png")
            pairs.append(f'photos/{key}.png,"{label.decode()}"')
            answer = "yes" if len(questions) % 2 else "no"
            questions.append({"image": f"photos/{key}.png", "question": "is it a symbol?", "answer": answer})
        for name, key in (("cat", "1F431"), ("dog", "1F436")):
            Image.open(BytesIO(tar.extractfile(f"{key}.webp").read())).save(folder / f"{name}.png")
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    (folder / "val.csv").write_text("\n".join(pairs[:20]) + "\n", encoding="utf-8")
    lines = [json.dumps(one) + "\n" for one in questions]
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "questions_val.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
    shutil.copytree(ROOT / "tests" / "goldens" / "hf_clip", folder / "clip-folder")
    for block in PAGE:
        if block.language == "yaml":
            (folder / block.name).write_text(block.text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    for name in ("vlp", "encoders", "objectives", "downstream"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def shown(step: list[str] | str) -> str:
    return shlex.join(step) if isinstance(step, list) else step.split("\n", 1)[0]


@pytest.mark.parametrize("step", STEPS, ids=shown)
def test_what_runs_here(step: list[str] | str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    if isinstance(step, str):
        exec(compile(step, "README.md", "exec"), {"__name__": "readme"})
    elif step[0] == "make":
        commands = [rule(target) for target in step[1:]]
        if step == ["make", "demo"]:
            ((command,),) = commands
            assert main([*shlex.split(command)[1:], "--smoke"]) == 0
            assert (place / "runs/demo/report.html").stat().st_size > 10_000
    else:
        assert step[0] == "vlp"
        assert main(step[1:]) == 0


@pytest.mark.parametrize("step", PARSED, ids=shown)
def test_what_is_untried_here_is_parsed(
    step: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert step[0] in ("vlp", "torchrun")
    if step[0] == "torchrun":
        assert "--no-python" in step  # else torchrun takes `vlp` for a Python file
    assert main([*step[step.index("vlp") + 1 :], "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("format: ") and not list(tmp_path.iterdir())


def results() -> list[str]:
    """The rows of the results table, without its head."""
    table = README.partition("<!-- results:begin -->\n")[2].partition("<!-- results:end -->")[0]
    return table.splitlines()[2:]


def test_every_result_names_a_command_that_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = results()
    assert rows and rows[0].startswith("| `") and len({row.count("|") for row in rows}) == 1
    for command in re.findall(r"^\| `([^`]+)` \|", "\n".join(rows), re.M):
        words = shlex.split(command)
        for line in rule(words[1]) if words[0] == "make" else [command]:
            if line.startswith("vlp "):
                assert main([*shlex.split(line)[1:], "--dry-run"]) == 0


def test_every_shell_block_is_marked() -> None:
    assert {block.marker for block in PAGE if block.language == "bash"} == {RUNS, UNTRIED}
    assert len(re.findall(rf"<!-- (?:{RUNS}|{UNTRIED}) -->", README)) == sum(b.marker in (RUNS, UNTRIED) for b in PAGE)
    assert STEPS[0] == ["make", "demo"] and len(STEPS) > 10 and PARSED


def test_layout_and_links_exist() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    paths = {path for row in rows for path in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", row)}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert {f"{name}/" for name in folders} <= paths
    for page, at in ((README, ROOT), (CONFIGS, ROOT / "configs"), (CONTRIBUTING, ROOT)):
        paths |= {str((at / link).relative_to(ROOT)) for link in re.findall(r"\]\(([\w./]+)\)", page)}
        paths |= set(re.findall(r"`((?:vlp|encoders|objectives|downstream|tests|configs)/[\w./]*)`", page))
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_make_targets_exist() -> None:
    for page in (README, CONFIGS, CONTRIBUTING):
        for target in re.findall(r"`make (\w+)", page):
            assert rule(target)


def test_recipes_are_listed() -> None:
    rows = [line.split(" | ")[0] for line in CONFIGS.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(name.split("/")[1] for name in list_recipes())
    for name in re.findall(r"vlp (?:pretrain|show|compare) (\w+) ", README):
        assert find_recipe(name, group="pretrain").is_file()


def test_objective_of_the_readme_is_the_one_of_contributing() -> None:
    (code,) = (block.text for block in PAGE if block.language == "python" and not block.marker)
    (whole,) = (block.text for block in blocks(CONTRIBUTING) if block.name == "objectives/match.py")
    assert whole.endswith(code) and len(code.splitlines()) < 20


def test_contributions_are_one_file_and_one_line(place: Path, tmp_path: Path) -> None:
    """A checkout with the four examples of CONTRIBUTING.md trains and evaluates with all of them."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.tar", "__pycache__"))
    files = [block for block in blocks(CONTRIBUTING) if block.language == "python"]
    assert len(files) == 8
    for block in files:
        path = tmp_path / block.name
        assert path.exists() == (path.name == "__init__.py")
        with path.open("a", encoding="utf-8") as file:  # of a union named twice, the later one holds
            file.write(block.text)
    lines = (place / "val.csv").read_text(encoding="utf-8").splitlines()
    rows = [f"{line},{'a horse' if number else 'foil'}" for number, line in enumerate(lines)]
    (place / "foils.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    commands = [
        "pretrain mine.yaml --out runs/mixed --train.samples 128 --data.workers 0 --model.text.kind bag"
        " --model.text.width 64 --model.fusion.kind add --objectives.match.kind match --objectives.itm none",
        "evaluate foil runs/mixed --data foils.csv --out runs/foils",
    ]
    script = "import sys; sys.path.insert(0, sys.argv[1]); from vlp.cli import main; "
    script += "sys.exit(any(main(command.split()) for command in sys.argv[2:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *commands], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads((place / "runs/mixed/metrics.jsonl").read_text().splitlines()[-1])
    assert losses["match/loss"] > 0 and losses["mlm/loss"] > 0
    scores = json.loads((place / "runs/foils/result.json").read_text())
    assert 0 <= scores["metrics"]["accuracy"] <= 1 and "bag" in (place / "runs/mixed/config.yaml").read_text()


def test_every_family_is_in_the_table() -> None:
    """The table is written by scripts/family_table.py; a family that it lacks makes it out of date."""
    from vlp.checkpoint.families import FAMILIES

    table = README.partition("<!-- families:begin -->\n")[2].partition("<!-- families:end -->")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert rows == [family.name for family in FAMILIES]
