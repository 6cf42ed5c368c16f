"""Every mistake through the real command line: one clear line, exit code 2, nothing written that was not there."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch

from vlp.cli import main

CAPTIONS_ONLY = ("--model.fusion.kind", "none", "--model.decoder", "none", "--objectives.lm", "none")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return runs.write_recipe(folder / "tiny.yaml", runs.write_data(folder / "data"), samples=4 * runs.BATCH)


@pytest.fixture(autouse=True)
def restore_logging():
    """The command line sets the logging of its process up; the tests' own is put back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    loggers = [logging.getLogger(name) for name in ("vlp", "vlp.data.loader", "encoders", "objectives", "downstream")]
    levels = [logger.level for logger in loggers]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger, before in zip(loggers, levels, strict=True):
        logger.setLevel(before)


@pytest.fixture
def fail(capsys):
    """Run a command that must fail; return what it says, one line, which lines of the log may precede."""

    def run(*words: str | Path, logged: bool = False) -> str:
        capsys.readouterr()  # what another command said
        assert main([str(word) for word in words]) == 2
        *log, line = capsys.readouterr().err.splitlines()
        assert all(said.startswith(("INFO ", "WARNING ")) for said in log)
        assert logged or not [said for said in log if said.startswith("WARNING ")]
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


MISTAKES = {
    "misspelt flag": (
        ["--train.global-bach", "3"],
        "--train.global-bach: unknown flag; perhaps you meant --train.global-batch",
    ),
    "misspelt option": (["--initt", "runs/a"], "--initt: unknown option; perhaps you meant --init"),
    "not a number": (["--train.samples", "many"], "train.samples = 'many': should be a valid integer"),
    "no such table": (["--data.train", "GONE/pairs.csv"], "data: there is no file 'GONE/pairs.csv'; check the path"),
    "no such shard": (["--data.train", "GONE/{00..03}.tar"], "data: shard 'GONE/00.tar' is not there; check the path"),
    "no such folder": (["--data.train", "GONE"], "data: there is no file or folder 'GONE'; check the path"),
    "no images": (["--data.train", "EMPTY"], "data: folder 'EMPTY' holds no images (bmp, "),
    "no such column": (["--data.text", "tilte"], "has no column 'tilte'; columns: image, caption"),
    "filter": (["--data.where", "{split: train}"], "where: {'split': 'train'} matches no sample"),
    "unknown objective": (
        ["--objectives.mlmm", "{}"],
        "objectives.mlmm.kind = 'mlmm': unknown kind; perhaps you meant mlm",
    ),
    "itm without fusion": (
        [*CAPTIONS_ONLY, "--objectives.mlm", "none"],
        "objective itm needs a fusion, but model.fusion.kind is none; use single_stream or dual_stream, or remove itm",
    ),
    "heads": (["--model.fusion.heads", "3"], "width 16 is not divisible by heads 3; choose heads that divide it"),
    "warmup": (["--train.optim.warmup", "1000"], "warmup 1000 is longer than the run of 24 samples; shorten it"),
    "no such device": (["--device", "cudaa"], "device cudaa: torch knows no such device; use cpu"),
    "device that is none": (["--device", "meta"], "device meta: there is none here; use "),
    "no such checkpoint": (["--init", "GONE"], "checkpoint GONE: no such folder; give a checkpoint or a run folder"),
    "out is a file": (["--out", "tiny.yaml"], "--out tiny.yaml: is a file; give a folder"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_flag(recipe, fail, tmp_path, monkeypatch, case):
    flags, said = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "tiny.yaml").touch()
    assert said in fail("pretrain", recipe, "--out", "run", "--device", "cpu", *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "tiny.yaml"]


RECIPES = {
    "unknown key": ("model: {vision: {pach_size: 8}}", "model.vision.pach_size = 8: unknown field; perhaps you meant "),
    "no YAML": ("model: {vision: [", "tiny.yaml, line 1, column"),
    "list": ("- model", "tiny.yaml: holds a list; a recipe is a mapping of names to values"),
    "newer": ("format: 99", "format = 99: newer than this vlp, which reads up to "),
    "base": ("base: gone.yaml", "base = 'gone.yaml': recipe "),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_mistake_in_a_recipe(fail, tmp_path, case):
    text, said = RECIPES[case]
    (tmp_path / "tiny.yaml").write_text(text)
    line = fail("pretrain", tmp_path / "tiny.yaml", "--out", tmp_path / "run")
    assert said in line and "tiny.yaml" in line
    assert not (tmp_path / "run").exists()


COMMANDS = {
    "pretrian demo": "vlp pretrian: no such command; perhaps you meant pretrain",
    "pretrain albeff": "recipe albeff: no such recipe; perhaps you meant albef",
    "pretrain gone.yaml": "recipe gone.yaml: no such file",
    "pretrain": "vlp pretrain: name a recipe",
    "pretrain --resume gone": "checkpoint gone: no such folder; give a checkpoint or a run folder",
    "pretrain demo --resume gone": "--resume takes recipe, folder and weights from the run; leave out RECIPE",
    "show albeff": "recipe albeff: no such recipe; perhaps you meant albef",
    "recipes albeff": "recipe albeff: no such recipe; perhaps you meant",
    "embed gone --checkpoint gone --out gone.npz": "checkpoint gone: no such folder",
    "evaluate retrieval gone --data gone": "gone",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_mistake_in_a_command(fail, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[words] in fail(*words.split())
    assert not list(tmp_path.iterdir())


def spoil(folder: Path, images: int = 0, captions: int = 0) -> Path:
    """Data of 20 pairs, the first ``images`` of which are torn or no images, the last ``captions`` without words."""
    table = runs.write_data(folder)
    for number in range(images):
        path = folder / f"{number}.png"
        path.write_bytes(path.read_bytes()[:60] if number % 2 else b"not an image")
    lines = table.read_text().splitlines()
    for number in range(captions):
        lines[-1 - number] = f"{lines[-1 - number].split(',')[0]},  "
    table.write_text("\n".join(lines) + "\n")
    return table


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_few_bad_samples_are_named_and_counted(recipe, tmp_path, capsys, workers):
    """Two of 20: below the threshold, which lets an eighth of small data pass."""
    data = spoil(tmp_path / "data", images=1, captions=1)
    words = ["pretrain", recipe, "--out", tmp_path / "run", "--device", "cpu", "--data.train", data]
    assert main([*map(str, words), "--data.workers", workers]) == 0
    said = capsys.readouterr().err
    assert said.count(f"WARNING bad sample '0' ({data} line 2): not an image that can be read (12 bytes)") == 1
    assert said.count(f"WARNING bad sample '19' ({data} line 21): no caption, or an empty one") == 1
    assert "WARNING 2 samples were bad, of 24 read" in said


@pytest.mark.parametrize(("images", "captions"), [(10, 0), (0, 10)])
def test_many_bad_samples_end_the_run(recipe, fail, tmp_path, images, captions):
    data = spoil(tmp_path / "data", images=images, captions=captions)
    words = ("pretrain", recipe, "--out", tmp_path / "run", "--device", "cpu", "--data.train", data)
    line = fail(*words, logged=True)
    assert "bad, more than data.bad_samples 0.01 allows: '" in line
    assert ("no caption, or an empty one" if captions else "not an image that can be read (12 bytes)") in line
    assert "repair or remove them, or raise data.bad_samples" in line


def test_no_caption_at_all(recipe, fail, tmp_path):
    data = spoil(tmp_path / "data", captions=20)
    line = fail("pretrain", recipe, "--out", tmp_path / "run", "--device", "cpu", "--data.train", data)
    assert line.startswith("data.tokenizer.source train found no captions to train on")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """A run that is done, with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run = runs.pretrain(recipe, folder)
    assert run.end() == 0, run.said()
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_a_run_is_left_alone(recipe, finished, fail):
    before = tree(finished)
    line = fail("pretrain", recipe, "--out", finished, "--device", "cpu")
    assert line == f"--out {finished}: holds a run already; go on with --resume {finished}, or choose another folder"
    assert tree(finished) == before


def test_resumed_with_changed_flags(finished, tmp_path, capsys):
    """It goes on from where it was, and says that it is no longer exact; settings of the clock alone say nothing."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    words = ["pretrain", "--resume", str(folder), "--device", "cpu"]
    assert main([*words, "--data.workers", "1", "--train.log-every", "1"]) == 0
    said = capsys.readouterr().err
    assert f"{folder} has seen its 24 samples; extend it with --train.samples" in said and "no longer" not in said
    assert main([*words, "--train.samples", "36", "--train.optim.lr", "1e-4"]) == 0
    said = capsys.readouterr().err
    assert "WARNING the resumed run is no longer exactly the one that was begun: " in said
    assert "train.samples 24 -> 36" in said and "train.optim.lr 0.001 -> 0.0001" in said
    assert [record["seen"] for record in runs.records(folder)] == [12, 24, 36]
    assert runs.checkpoints(folder)[-1].name == f"{36:012d}"


def test_resumed_on_other_data(finished, fail, tmp_path):
    """One more pair is another order of all: that is said, and can be wanted."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    data = runs.write_data(tmp_path / "data", samples=21)
    before = tree(folder)
    words = ("pretrain", "--resume", folder, "--device", "cpu", "--train.samples", "36", "--data.train", data)
    line = fail(*words, logged=True)
    assert "the data changed since the run began; restore them, or set data.hash none" in line
    assert tree(folder) == before
    assert main([*map(str, words), "--data.hash", "none", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.fusion.layers", "2"], "the weights do not fit the model: missing fusion."),
        (["--train.optim.ema", "none"], "ema none differs from the run that is resumed; keep its setting"),
        (["--train.smaples", "30"], "--train.smaples: unknown flag; perhaps you meant --train.samples"),
    ],
)
def test_resumed_as_something_else(finished, fail, tmp_path, flags, said):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = tree(folder)
    line = fail("pretrain", "--resume", folder, "--device", "cpu", "--train.samples", "36", *flags, logged=True)
    assert said.lower() in line.lower()
    assert tree(folder) == before


def test_the_average_of_the_weights_is_what_is_loaded_unless_the_last_ones_are_asked_for(finished, tmp_path, fail):
    from vlp import load

    last, average, own = (load(finished, average=one).model.state_dict() for one in (False, True, None))
    assert last.keys() == average.keys() == own.keys()
    assert any(not torch.equal(last[name], average[name]) for name in last)
    assert all(torch.equal(own[name], average[name]) for name in own)
    assert main(["convert", str(finished), str(tmp_path / "last"), "--no-average"]) == 0
    assert all(torch.equal(one, last[name]) for name, one in load(tmp_path / "last").model.state_dict().items())
    assert "holds no average of its weights" in fail("convert", tmp_path / "last", tmp_path / "b", "--average")


def test_a_torn_checkpoint(finished, fail, tmp_path):
    """Loaded by name it is refused, and the whole one beside it is named; of a run, all must be torn."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    older, newest = runs.checkpoints(folder)
    (newest / "model.safetensors").write_bytes(b"torn")
    out = ("--out", tmp_path / "index.npz", "--device", "cpu")
    line = fail("embed", folder.parent, "--checkpoint", newest, *out)
    assert f"checkpoint {newest} is torn: model.safetensors has 4 of " in line
    assert line.endswith(f"use an older checkpoint: {older}")
    (older / "train_state.pt").write_bytes(b"torn")
    line = fail("pretrain", "--resume", folder, "--device", "cpu", "--train.samples", "36", logged=True)
    assert f"run {folder}: none of its 2 checkpoints is whole; the newest, {newest}: model.safetensors has 4" in line


def test_a_loss_that_is_not_finite(recipe, fail, tmp_path):
    """It stops before the update, names step and objectives, keeps the batch, and the checkpoints before it."""
    flags = ("--train.optim.lr", "1e30", "--train.optim.warmup", "0", "--train.save-every", "1")
    run = tmp_path / "run"
    line = fail("pretrain", recipe, "--out", run, "--device", "cpu", *flags, "--train.optim.clip-norm", "none")
    assert line.startswith("the step at 6 samples: loss of itc (nan), itm (nan), mlm (nan), lm (nan) is not finite; ")
    assert "nothing was updated" in line
    assert line.endswith(f"the batch is in {run}/nonfinite_rank0.pt")
    (batch,) = torch.load(run / "nonfinite_rank0.pt", weights_only=False)
    assert batch.position.tolist() == list(range(6, 12)) and batch.num_images == 6
    assert [int(path.name) for path in runs.checkpoints(run)] == [6]


def test_a_process_of_its_own(tmp_path):
    """What the shell sees: the exit code, one line on standard error, nothing on standard output."""
    words = [sys.executable, "-c", "import sys; from vlp.cli import main; sys.exit(main())", "pretrain", "albeff"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "error: recipe albeff: no such recipe; perhaps you meant albef (a file's name ends in .yaml)\n"
    )
