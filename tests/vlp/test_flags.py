"""Flags over a recipe, and the help that lists them."""

from pathlib import Path
from typing import Any

import pytest
from toy_config import Causal, Grid, Mim, Mlm, Noise, Patch, Run, problems, write

from vlp.flags import from_command_line


def flags(*argv: str, recipe: Path | str | None = None) -> Run:
    argv = argv if recipe else ("--data.train", "a.tar", *argv)
    return from_command_line(Run, argv, recipe, prog="vlp pretrain", description="Train.")


def test_kind_switches_come_first_wherever_they_stand(tmp_path: Path):
    own = write(tmp_path / "own.yaml", "data: {train: a}\nmodel: {vision: {depth: 3}}\nsamples: 5\n")
    config = flags("--model.vision.stride", "16", "--model.vision.kind", "grid", "--samples=7", recipe=own)
    assert config.model.vision == Grid(stride=16)
    assert config.samples == 7
    assert flags("--model.vision.kind", "patch", recipe=own).model.vision == Patch(depth=3)


def test_flags_add_remove_and_create():
    config = flags("--objectives.mim.ratio", "0.2", "--objectives.mim.kind", "mim", "--objectives.mlm", "none")
    assert config.objectives == {"mim": Mim(ratio=0.2)}
    config = flags("--objectives.second.kind", "mlm", "--model.decoder.kind", "causal", "--model.decoder.layers", "2")
    assert config.objectives == {"mlm": Mlm(), "second": Mlm()}
    assert config.model.decoder == Causal(layers=2)
    assert flags("--model.vision", "{kind: grid, width: 4}", "--model.vision.stride", "16").model.vision == Grid(
        stride=16, width=4
    )


def test_a_group_without_kinds_is_created_by_any_of_its_flags():
    assert flags().noise is None
    assert flags("--noise.steps", "5").noise == Noise(steps=5)
    assert flags("--noise.steps", "5", "--noise.size=2").noise == Noise(steps=5, size=2.0)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--data.train", "shards/{000..099}.tar"], "data.train", "shards/{000..099}.tar"),
        (["--data.train=[a"], "data.train", "[a"),
        (["--data.train", "*.tar"], "data.train", "*.tar"),
        (["--note", "123"], "note", "123"),
        (["--note", "none"], "note", "none"),
        (["--note="], "note", ""),
        (["--note", "a=b"], "note", "a=b"),
        (["--samples", "1e6"], "samples", 1_000_000),
        (["--lr", "-1e-4"], "lr", -1e-4),
        (["--samples", "1", "--samples", "2"], "samples", 2),
        (["--data.flip", "false"], "data.flip", False),
        (["--data.no-flip"], "data.flip", False),
        (["--data.flip"], "data.flip", True),
        (["--data.size", "1", "2"], "data.size", (1, 2)),
        (["--data.size", "[1, 2]"], "data.size", (1, 2)),
        (["--data.size", "3"], "data.size", 3),
        (["--names", "1", "b c"], "names", ("1", "b c")),
        (["--names", "a"], "names", ("a",)),
        (["--names", "[]"], "names", ()),
        (["--data.mix.cc-3m", "2"], "data.mix", {"cc-3m": 2.0}),
        (["--data.mix", "{cc-3m: 2}", "--data.mix.cc-3m", "3"], "data.mix", {"cc-3m": 3.0}),
        (["--data.cache", "none"], "data.cache", None),
        (["--data.cache", "x"], "data.cache", Path("x")),
        (["--objectives.mlm.mask-probability", "0.3"], "objectives.mlm.mask_probability", 0.3),
        (["--objectives.mlm.mask_probability=0.3"], "objectives.mlm.mask_probability", 0.3),
    ],
)
def test_values_of_flags(argv: list[str], field: str, value: Any):
    found: Any = flags(*argv)
    for name in field.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value
    assert type(found) is type(value) or isinstance(value, Path)


def test_a_kind_may_be_called_none():
    assert flags("--model.fusion.kind", "none").model.fusion.kind == "none"


def test_mistakes_in_flags_are_lines_too_all_at_once():
    end = " (command line)"
    argv = "--mask-probability 0.3 --samples many --lrr 3 --model.vision grid --model.decoder.layers 3 --note.x 1 --lr"
    assert problems(flags, *argv.split()) == [
        "--mask-probability: unknown flag; perhaps you meant --objectives.mlm.mask-probability (command line)",
        "--lrr: unknown flag; perhaps you meant --lr (command line)",
        "--lr: needs a value, FLOAT (command line)",
        "--model.vision = grid: is a group of settings; write --model.vision.kind grid (command line)",
        "--note.x: unknown flag; note is one value; write --note VALUE (command line)",
        "--model.decoder.layers: there is no model.decoder; create it with --model.decoder.kind {causal}" + end,
        "samples = 'many': should be a valid integer, unable to parse string as an integer (command line)",
    ]


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--data.tarin", "--data.train"),
        ("--model.visoin.width", "--model.vision.width"),
        ("--objectives.mlm.wieght", "--objectives.mlm.weight"),
        ("--objectives.mlmm.weight", "--objectives.mlm.weight, or create it with --objectives.mlmm.kind {mlm,mim}"),
        ("--DATA.FLIP", "--data.flip"),
        ("--flpi", "--data.flip"),
        ("--dta.sizes", "--data.size"),
    ],
)
def test_the_nearest_real_flag_is_named(flag: str, meant: str):
    (line,) = problems(flags, flag, "3")
    assert line.endswith(f"; perhaps you meant {meant} (command line)")


def test_more_mistakes_in_flags():
    assert "should be a flag" in problems(from_command_line, Run, ["albef", "--data.train", "a"])[0]
    (line,) = problems(flags, "--objectives.mlm.mask-probabilty", "0.3")
    assert line.endswith("unknown flag; perhaps you meant --objectives.mlm.mask-probability (command line)")
    (line,) = problems(flags, "--objectives.mim.ratio", "0.3")
    assert "there is no objectives.mim; create it with --objectives.mim.kind {mlm,mim}" in line
    assert "unknown flag" in problems(flags, "--data.no-train")[0]
    assert "unknown flag" in problems(flags, "--data.no-flip", "true")[0]
    assert problems(flags, "--model.vision.kind", "gird", "--model.vision.stride", "16") == [
        "model.vision.kind = 'gird': unknown kind; perhaps you meant grid; known kinds are patch, grid (command line)"
    ]
    assert problems(flags, "--samples", "1", "2") == ["samples = ['1', '2']: should be a valid integer (command line)"]
    assert problems(flags, "--objectives.mlm", "none", "--objectives.mim", "none") == [
        "objectives.mim = none: nothing to remove, there are none; to add it write {} for its defaults (command line)"
    ]


def test_help_has_every_flag_with_docstring_and_present_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = write(tmp_path / "own.yaml", "samples: 77\nobjectives: {mim: {}}\n")
    with pytest.raises(SystemExit) as stop:
        flags("--model.vision.kind", "patch", "--help", recipe=own)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "usage: vlp pretrain [--FLAG VALUE ...]",
        "--samples INT (default: 77)",
        "--data.train STR Shards to train on. (required)",
        "--data.flip {true,false} (default: true)",
        "--data.size INT|INT ... (default: 224)",
        "--model.vision.kind {patch,grid} The image side. (default: patch)",
        "model.vision: A ViT.",
        "--model.vision.depth INT Number of blocks. (default: 6)",
        "--model.decoder.kind {causal} Writes captions. (default: none)",
        "--objectives.NAME.kind {mlm,mim} Add one. `--objectives.NAME none` removes.",
        "Share of the tokens that are masked, 15 % in BERT. (default: 0.15)",
        "--objectives.mim.ratio FLOAT (default: 0.4)",
    ):
        assert expected in text
    with pytest.raises(SystemExit):
        flags("--model.vision.kind", "grid", "-h", recipe=own)
    out = capsys.readouterr().out
    assert "--model.vision.stride {16,32}" in out and "--model.vision.depth" not in out
