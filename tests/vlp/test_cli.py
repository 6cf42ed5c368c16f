"""The command line from a tiny recipe to search: what it prints, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlp.cli import main
from vlp.cli.dispatch import COMMANDS, explain, parser_of, split
from vlp.pretrain import stored_config
from vlp.recipes import dump_yaml, from_yaml

HEADS = {"width": 16, "heads": 2}
TINY = {"layers": 1, **HEADS}
COLOURS = {"red": (250, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 250), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sixteen pairs and a recipe of a few steps on them."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "images").mkdir()
    lines = ["image,caption"]
    for number in range(16):
        name, colour = list(COLOURS.items())[number % 4]
        pixels = np.full((16, 16, 3), colour, dtype=np.uint8)
        pixels[number // 4] = 128
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        lines.append(f"images/{number}.png,a {name} square with line {number // 4}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    recipe = {
        "model": {
            "vision": {"model": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8, "depth": 1, **HEADS},
            "text": {**TINY, "max_length": 12},
            "fusion": {"kind": "dual_stream", **TINY},
            "embed": {"width": 8},
        },
        "objectives": {"itc": {}, "itm": {}},
        "data": {
            "train": str(folder / "pairs.csv"), "val": str(folder / "pairs.csv"), "max_length": 12, "workers": 0,
            "tokenizer": {"size": 80, "min_frequency": 1},
        },
        "train": {"samples": 16, "global_batch": 8, "micro_batch": 8, "optim": {"lr": 1e-3}},
    }  # fmt: skip
    (folder / "tiny.yaml").write_text("# A tiny recipe for tests. It learns nothing.\n" + dump_yaml(recipe))
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished run of the recipe."""
    assert main(["pretrain", str(place / "tiny.yaml"), "--out", str(place / "run"), "--device", "cpu"]) == 0
    return place / "run"


def fails(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Run a command that fails by the user's mistake; return its one line."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith(("INFO", "WARNING"))]
    assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
    assert not printed.out
    return lines[0]


# Help, overview, configuration.


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("vlp")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as end:  # the help of a config tree ends the process
        assert end.code == 0
    printed = capsys.readouterr().out
    assert f"usage: vlp {name}" in printed and "--quiet" in printed
    if COMMANDS[name].config is not None:
        assert "--dry-run" in printed and printed.count("usage:") == 2
    undocumented = [action.dest for action in parser_of(name, COMMANDS[name])._actions if not action.help]
    assert not undocumented


def test_help_shows_the_tree_of_the_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", str(place / "tiny.yaml"), "--model.fusion.attention", "co", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "--train.samples INT Samples to train on" in printed
        and "(default: 16)" in printed
        and "(default: co)" in printed
    )


def test_dry_run_prints_a_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "pretrain",
        str(place / "tiny.yaml"),
        "--train.samples=24",
        "--dry-run",
        "--objectives.mlm",
        "{}",
        "--out",
        "x",
    ]
    assert main(words) == 0
    tree = from_yaml(capsys.readouterr().out)
    assert tree["train"]["samples"] == 24 and list(tree["objectives"]) == ["itc", "itm", "mlm"]
    assert not Path("x").exists()


def test_shrunk_recipe_keeps_its_parts_and_takes_flags(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "albef", "--shrink", "--data.train", "a.csv", "--train.samples", "36", "--dry-run"]
    assert main(words) == 0
    tree = from_yaml(capsys.readouterr().out)
    assert list(tree["objectives"]) == ["itc", "itm", "mlm"] and tree["model"]["fusion"]["attention"] == "cross"
    assert (tree["model"]["text"]["width"], tree["model"]["fusion"]["layers"], tree["train"]["samples"]) == (32, 2, 36)
    assert tree["model"]["text"]["init"] is None and tree["data"]["tokenizer"]["size"] == 512  # nothing is fetched
    assert "--shrink" in fails(capsys, "pretrain", "--resume", "x", "--shrink")


def test_words_go_to_the_command_or_to_the_tree() -> None:
    parser = parser_of("pretrain", COMMANDS["pretrain"])
    words = [
        "demo",
        "--train.samples",
        "8",
        "--out",
        "runs/x",
        "--data.train",
        "a.tar",
        "b.tar",
        "--dry-run",
        "--init=y",
    ]
    own, flags = split(words, parser)
    assert own == ["demo", "--out", "runs/x", "--dry-run", "--init=y"]
    assert flags == ["--train.samples", "8", "--data.train", "a.tar", "b.tar"]


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--names"]) == 0
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    assert "ITC + ITM + MLM" in listed["pretrain/albef"]
    assert main(["recipes", "pretrain/demo_small"]) == 0
    printed = capsys.readouterr().out
    assert from_yaml(printed)["base"] == "demo" and "# streams: dual, cross\n" in printed


def test_show(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(place / "tiny.yaml"), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "One step" in printed and "fuse" in printed and "Parameters" in printed


# The path.


def test_pretrain_leaves_a_run(run: Path) -> None:
    assert (run / "config.yaml").is_file() and (run / "metrics.jsonl").is_file()
    config = stored_config(run / "checkpoints" / "000000000016")
    assert config.train.samples == 16 and config.data.hash is not None
    scores = json.loads((run / "retrieval" / "result.json").read_text())  # of data.val
    assert (scores["counts"]["samples"], scores["counts"]["bad"]) == (32, 0) and 0 <= scores["metrics"]["t2i/R@1"] <= 1


def test_validation_data_are_opened_before_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("pretrain", place / "tiny.yaml", "--out", place / "unseen", "--data.val", place / "none.csv")
    assert "none.csv" in fails(capsys, *words) and not (place / "unseen").exists()


def test_finished_run_is_not_trained_again(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before


def test_finished_run_refuses_what_it_would_not_train(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "pretrain", "--resume", run, "--model.text.layers", "2")
    assert "the run has ended, so nothing would be trained with model.text.layers 1 -> 2" in line
    assert f"--train.samples, or begin a new run with --init {run}" in line


def test_resume_extends_and_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "extended"
    assert main(["pretrain", str(place / "tiny.yaml"), "--out", str(folder)]) == 0
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(folder), "--train.samples", "24", "--train.keep", "5"]) == 0
    assert "no longer exactly the one that was begun: train.samples 16 -> 24\n" in capsys.readouterr().err
    assert stored_config(folder / "checkpoints" / "000000000024").train.samples == 24


def test_harmless_change_is_not_called_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "harmless"
    assert main(["pretrain", str(place / "tiny.yaml"), "--out", str(folder)]) == 0
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(folder), "--data.workers", "1", "--train.keep", "5"]) == 0
    assert "no longer exactly" not in capsys.readouterr().err


def test_init_takes_weights_and_words(place: Path, run: Path) -> None:
    folder = place / "again"
    words = ["pretrain", str(place / "tiny.yaml"), "--init", str(run), "--out", str(folder), "--objectives.mlm", "{}"]
    assert main([*words, "--train.optim.lr", "1e-12", "--train.optim.weight-decay", "0"]) == 0
    before, after = (load_file(next(f.glob("checkpoints/*/model.safetensors"))) for f in (run, folder))
    assert set(before) < set(after) and any(name.startswith("objectives.mlm") for name in after)
    torch.testing.assert_close({name: after[name] for name in before}, before, atol=1e-6, rtol=0)


def test_evaluate_predict_embed_search(place: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(place / "pairs.csv")
    assert main(["evaluate", "retrieval", str(run), "--data", data, "--out", str(place / "scores")]) == 0
    assert "t2i/R@1" in capsys.readouterr().out
    result = json.loads((place / "scores" / "result.json").read_text())
    assert result["metrics"]["ITC/t2i/R@1"] >= 0 and result["counts"]["samples"] > 0 and "evaluate" in result["command"]
    assert main(["predict", "retrieval", str(run), "--data", data, "--out", str(place / "found.jsonl")]) == 0
    assert len((place / "found.jsonl").read_text().splitlines()) > 16
    index = str(place / "index.npz")
    assert main(["embed", str(place / "images"), "--checkpoint", str(run), "--out", index]) == 0
    capsys.readouterr()
    assert main(["search", index, "a red square", "--checkpoint", str(run), "--top", "3", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(".png") == 3 and "a red square" in printed


def test_evaluations_of_other_data_do_not_overwrite_each_other(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (place / "pairs.csv").read_text().splitlines()
    (place / "few.csv").write_text("\n".join(lines[:9]) + "\n")
    for name in ("pairs", "few"):
        assert main(["evaluate", "retrieval", str(run), "--data", str(place / f"{name}.csv")]) == 0
    results = {name: tmp_path / "runs" / f"retrieval-{run.name}-{name}" / "result.json" for name in ("pairs", "few")}
    counts = {name: json.loads(path.read_text())["counts"]["samples"] for name, path in results.items()}
    assert counts == {"pairs": 32, "few": 16}
    (tmp_path / "few.csv").write_text("\n".join(lines[:5]) + "\n")
    words = ("evaluate", "retrieval", run, "--data", tmp_path / "few.csv", "--data.root", place)
    assert "holds the result of" in fails(capsys, *words)


def test_finetune(place: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = str(place / "pairs.csv")
    words = ["finetune", "retrieval", "--init", str(run), "--data", pairs, pairs, "--out", str(place / "tuned")]
    assert main([*words, "--train.samples", "16", "--train.global-batch", "8", "--train.optim.warmup", "0"]) == 0
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed and "chance" in printed
    assert json.loads((place / "tuned" / "result.json").read_text())["samples"] == 16


def test_compare_trains_each_cell_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = place / "page.md"
    page.write_text("above\n<!-- compare:begin -->\nold\n<!-- compare:end -->\nbelow\n")
    one = "one:model.fusion.kind=single_stream,model.fusion.layers=1,model.fusion.width=16,model.fusion.heads=2"
    words = ["compare", str(place / "tiny.yaml"), "--out", str(place / "compared"), "--markdown", str(page)]
    words += ["--variant", "co:model.fusion.attention=co", "--variant", one, "--objectives", "itc", "itc+itm"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "not legal: co x itc: no objective of ['itc'] uses model.fusion.kind dual_stream" in printed
    cells = [place / "compared" / name / "itc+itm" / "seed0" for name in ("co", "one")]
    first, second = (stored_config(cell / "checkpoints" / "000000000016") for cell in cells)
    assert first.model.fusion.attention == "co" and second.model.fusion.kind == "single_stream"
    assert first.model_copy(update={"model": None}) == second.model_copy(update={"model": None})
    lines = page.read_text().splitlines()
    assert lines[:2] == ["above", "<!-- compare:begin -->"] and lines[-2:] == ["<!-- compare:end -->", "below"]
    assert [line.split(" | ")[:3] for line in lines if line.startswith(("| co", "| one"))] == [
        [f"| {name}", "itc+itm", scoring] for name in ("co", "one") for scoring in ("ITC", "ITC, then ITM")
    ]
    times = [path.stat().st_mtime_ns for path in sorted((place / "compared").rglob("*.safetensors"))]
    assert main(words) == 0 and capsys.readouterr().out == printed
    assert [path.stat().st_mtime_ns for path in sorted((place / "compared").rglob("*.safetensors"))] == times
    assert "other settings" in fails(capsys, *words, "--train.samples", "24")
    assert main([*words, "--out", str(place / "beside"), "--jobs", "2"]) == 0
    capsys.readouterr()
    for one in (cell.relative_to(place / "compared") for cell in cells):
        rows = [json.loads((place / out / one / "row.json").read_text()) for out in ("compared", "beside")]
        assert rows[0].pop("samples_per_second") and rows[1].pop("samples_per_second")
        assert rows[0]["losses"] == pytest.approx(rows[1].pop("losses")) and rows[0].items() >= rows[1].items()
    assert "--jobs 0" in fails(capsys, *words, "--jobs", "0")


def test_compare_says_what_it_cannot_do(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(place / "tiny.yaml")
    assert "--variant wide: says no settings" in fails(capsys, "compare", tiny, "--variant", "wide")
    assert "perhaps you meant multiway" in fails(capsys, "compare", tiny, "--fusions", "multway")
    assert "itx" in fails(capsys, "compare", tiny, "--objectives", "itc+itx")
    assert "none x itc+itm: objective itm needs a fusion" in fails(capsys, "compare", tiny, "--fusions", "none")
    assert "cannot be combined" in fails(capsys, "compare", tiny, "--fusions", "co", "--variant", "as-it-is:")
    assert "at least 1" in fails(capsys, "compare", tiny, "--seeds", "0")
    page = place / "no_markers.md"
    page.write_text("nothing")
    assert "compare:begin" in fails(capsys, "compare", tiny, "--markdown", page)


# Mistakes.


def test_unknown_words(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "perhaps you meant pretrain" in fails(capsys, "pretian", "demo")
    assert "perhaps you meant demo" in fails(capsys, "pretrain", "dmo")
    assert "perhaps you meant vqa" in fails(capsys, "evaluate", "vqaa", "run")
    line = fails(capsys, "evaluate", "nope", "run")
    assert line.count("captioning") == 1 and "demo_vqa" not in line
    assert "perhaps you meant --checkpoint" in fails(capsys, "embed", "x", "--chekpoint", "y")
    line = fails(capsys, "pretrain", place / "tiny.yaml", "--model.fuson.kind", "none")
    assert "perhaps you meant --model.fusion.kind" in line
    assert "no such recipe" in fails(capsys, "recipes", "nothing-like-it")
    assert "name a recipe" in fails(capsys, "pretrain")
    assert "--checkpoint" in fails(capsys, "search", "index.npz", "words")


def test_every_problem_has_its_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(place / "tiny.yaml"), "--train.samples", "none", "--train.kep", "2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


def test_runs_that_are_not_there(place: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = place / "tiny.yaml"
    assert "no such folder" in fails(capsys, "pretrain", "--resume", place / "nowhere")
    assert "no such folder" in fails(capsys, "evaluate", "retrieval", place / "nowhere", "--data", "x")
    assert "--init is missing" in fails(capsys, "finetune", "retrieval")
    assert "holds a run already" in fails(capsys, "pretrain", tiny, "--out", run)
    assert "leave out" in fails(capsys, "pretrain", tiny, "--resume", run)
    checkpoint = next((run / "checkpoints").iterdir())
    assert "is one checkpoint" in fails(capsys, "pretrain", "--resume", checkpoint)


def test_data_that_are_not_there(place: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, gone = place / "tiny.yaml", str(place / "gone.csv")
    assert "gone.csv" in fails(capsys, "pretrain", tiny, "--out", place / "none", "--data.train", gone)
    assert "gone.csv" in fails(capsys, "evaluate", "retrieval", run, "--data", gone, "--out", place / "none")
    assert "data.train is not set" in fails(capsys, "pretrain", tiny, "--out", place / "none", "--data.train", "none")
    assert "data.val is not set" in fails(capsys, "evaluate", "retrieval", run, "--out", place / "none")
    (place / "empty").mkdir(exist_ok=True)
    assert "empty" in fails(capsys, "embed", place / "empty", "--checkpoint", run, "--out", place / "no.npz")


def test_changed_data_stop_a_resumed_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = place / "other.csv"
    table.write_text((place / "pairs.csv").read_text())
    folder = place / "other"
    assert main(["pretrain", str(place / "tiny.yaml"), "--data.train", str(table), "--out", str(folder)]) == 0
    table.write_text(table.read_text().replace("red", "pink"))
    assert "the data changed" in fails(capsys, "pretrain", "--resume", folder, "--train.samples", "24")


def test_model_cannot_change_in_a_resumed_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "pretrain", "--resume", run, "--train.samples", "24", "--model.embed.width", "4")
    assert f"--init {run}" in line


def test_what_the_model_cannot_do(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "evaluate", "captioning", run, "--data", place / "pairs.csv", "--out", place / "none")
    assert "captioning" in line and "finetune" in line


def test_device_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "cuda" in fails(capsys, "pretrain", place / "tiny.yaml", "--out", place / "none", "--device", "cuda")


def test_missing_extra_is_one_line() -> None:
    assert explain(ModuleNotFoundError("x", name="easy_vqa.data")) == (
        "this needs the package easy_vqa.data; install it with: pip install 'vlp[demo]'"
    )
    assert explain(ModuleNotFoundError("x", name="tirch")) is None, "ours, with its traceback"
    assert explain(OSError(28, "No space left on device", "runs/x")) == "runs/x: No space left on device"


def test_bugs_and_interruptions_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(error: BaseException) -> None:
        def dispatch(words: object) -> None:
            raise error

        monkeypatch.setattr("vlp.cli.dispatch.dispatch", dispatch)

    raises(KeyboardInterrupt())
    assert main(["show"]) == 130
    raises(AssertionError("ours"))
    with pytest.raises(AssertionError):
        main(["show"])
    raises(ValueError("first\nsecond"))
    assert main(["show"]) == 2 and capsys.readouterr().err == "error: first\nerror: second\n"
    with pytest.raises(ValueError, match="first"):
        main(["show", "--traceback"])


@pytest.fixture(autouse=True)
def logging_as_before():
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.handlers[:], root.level = handlers, level
    for name in ("vlp", "encoders", "objectives", "downstream"):
        logging.getLogger(name).setLevel(logging.NOTSET)
