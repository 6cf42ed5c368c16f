"""The configuration machinery: trees, recipes, errors, and back to YAML."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError
from toy_config import DATA, Causal, Grid, Mim, Mlm, Patch, Run, Vision, problems, write

from vlp import recipes
from vlp.config import (
    FORMAT,
    Config,
    Layer,
    build,
    find_recipe,
    list_recipes,
    load,
    load_recipe,
    restated,
    to_yaml,
)
from vlp.flags import from_command_line


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "configs"
    monkeypatch.setattr(recipes, "configs_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


# Trees


def test_defaults_are_the_fields_own_not_the_classes():
    assert build(Run, DATA).model.vision == Patch(depth=6)
    assert build(Run, DATA, {"model": {"vision": {"width": 8}}}).model.vision == Patch(depth=6, width=8)


def test_frozen_and_strict():
    config = build(Run, DATA)
    with pytest.raises(ValidationError):
        config.samples = 3
    with pytest.raises(ValidationError):
        Patch(dpeth=3)


def test_later_layers_win_and_keep_what_they_do_not_state():
    config = build(
        Run, DATA, {"samples": 2, "lr": 0.5, "data": {"mix": {"a": 1}}}, {"samples": 3, "data": {"mix": {"b": 2}}}
    )
    assert (config.samples, config.lr, config.data.train, config.data.mix) == (3, 0.5, "a.tar", {"a": 1, "b": 2})


def test_kind_switch_starts_from_the_new_kinds_defaults():
    below = {"model": {"vision": {"depth": 3, "width": 7}}}
    assert build(Run, DATA, below, {"model": {"vision": {"kind": "grid"}}}).model.vision == Grid()
    back = {"model": {"vision": {"kind": "patch", "width": 9}}}
    assert build(Run, DATA, below, {"model": {"vision": {"kind": "grid"}}}, back).model.vision == Patch(width=9)
    assert build(Run, DATA, below, back).model.vision == Patch(depth=3, width=9)


def test_a_kind_may_be_called_none():
    assert build(Run, DATA, {"model": {"fusion": {"kind": "none"}}}).model.fusion.kind == "none"


@pytest.mark.parametrize("nothing", [None, "none"])
def test_objectives_and_decoder_come_and_go(nothing: Any):
    added = {"objectives": {"mim": {}, "second": {"kind": "mlm", "weight": 2}}, "model": {"decoder": {"layers": 2}}}
    config = build(Run, DATA, added)
    assert config.objectives == {"mlm": Mlm(), "mim": Mim(), "second": Mlm(weight=2)}
    assert config.model.decoder == Causal(layers=2)
    config = build(Run, DATA, added, {"objectives": {"mlm": nothing, "second": nothing}, "model": {"decoder": nothing}})
    assert config.objectives == {"mim": Mim()}
    assert config.model.decoder is None


def test_removing_what_is_not_there_says_what_is():
    assert problems(build, Run, DATA, {"objectives": {"mim": None}}) == [
        "objectives.mim = none: nothing to remove, there are mlm; to add it write {} for its defaults"
    ]


# Errors


def test_all_problems_at_once_each_with_path_value_remedy_and_source():
    below = Layer({"model": {"vision": {"dept": 3}}, "samples": "many"}, "base.yaml")
    above = Layer(
        {
            "objectives": {"mlm": {"mask_probabilty": 0.3, "weight": [1]}, "mimm": {}},
            "model": {"decoder": {"attention": "casual"}, "fusion": 3},
        },
        "own.yaml",
    )
    assert sorted(problems(build, Run, below, above)) == [
        "data.train: is required; set it in the recipe or with --data.train VALUE (own.yaml)",
        "model.decoder.attention = 'casual': should be 'full' or 'causal'; perhaps you meant causal (own.yaml)",
        "model.fusion = 3: should be a mapping of its settings; known kinds are none, single (own.yaml)",
        "model.vision.dept = 3: unknown field; perhaps you meant depth (base.yaml)",
        "objectives.mimm.kind = 'mimm': unknown kind; perhaps you meant mim; known kinds are mlm, mim (own.yaml)",
        "objectives.mlm.mask_probabilty = 0.3: unknown field; perhaps you meant mask_probability (own.yaml)",
        "objectives.mlm.weight = [1]: should be a valid number (own.yaml)",
        "samples = 'many': should be a valid integer, unable to parse string as an integer (base.yaml)",
    ]


def test_nonsense_below_a_later_layer_is_still_one_error():
    assert problems(build, Run, DATA, {"model": {"vision": {1: 2}}}, {1: {2: 3}}) == [
        "model.vision.1 = 2: unknown field; the fields here are kind, depth, width",
        "1 = {2: 3}: unknown field; the fields here are model, noise, data, objectives, samples, lr, note, names",
    ]


def test_unknown_kind_lists_the_known_ones():
    assert problems(build, Run, DATA, {"model": {"vision": {"kind": "xyz", "depth": 3}}}) == [
        "model.vision.kind = 'xyz': unknown kind; there are patch, grid"
    ]


def test_a_unions_problems_are_one_line():
    (line,) = problems(build, Run, DATA, {"data": {"size": "big"}})
    assert line.startswith("data.size = 'big': should be a valid integer") and " or should be a valid tuple" in line


def test_bounds_and_validators():
    bad = {"objectives": {"mlm": {"mask_probability": 1.5}}}
    assert problems(build, Run, DATA, bad) == ["objectives.mlm.mask_probability = 1.5: should be less than 1"]
    assert problems(build, Run, DATA, {"samples": -1}) == ["samples cannot be negative; say how many"]


def test_config_in_a_list_is_reported_by_its_index():
    class Many(Config):
        parts: list[Vision] = Field(default_factory=list)

    assert build(Many, {"parts": [{"kind": "grid", "width": 1}]}).parts == [Grid(width=1)]
    bad = {"parts": [{"kind": "grid"}, {"kind": "grid", "width": "x"}, {"kind": "grid", "depth": 1}]}
    lines = problems(build, Many, bad)
    assert lines[0].startswith("parts.1.width = 'x': should be a valid integer")
    assert lines[1].startswith("parts.2.depth = 1: ")


# Recipes


def test_base_chain_merges_in_order(configs: Path):
    write(configs / "pretrain/common.yaml", "data: {train: c.tar}\nsamples: 1e6\nlr: 1e-4\nnote: no\n")
    write(configs / "pretrain/albef.yaml", "base: common.yaml\nsamples: 5\nobjectives: {mim: {ratio: 0.5}}\n")
    own = write(configs.parent / "mine/own.yaml", "base: pretrain/albef\nnote: mine\n")
    sources = [layer.source for layer in load_recipe(own)]
    assert sources == ["configs/pretrain/common.yaml", "configs/pretrain/albef.yaml", "mine/own.yaml"]
    config = load(Run, own)
    assert (config.samples, config.lr, config.note, config.data.train) == (5, 1e-4, "mine", "c.tar")
    assert config.objectives["mim"] == Mim(ratio=0.5)
    assert load(Run, "common", group="pretrain").samples == 1_000_000
    assert load(Run, "common").note == "no"


def test_recipes_are_found_by_name_and_file(configs: Path):
    for name in ("pretrain/albef", "pretrain/vilt", "finetune/vqa", "finetune/vilt"):
        write(configs / f"{name}.yaml", "")
    assert list_recipes() == ["finetune/vilt", "finetune/vqa", "pretrain/albef", "pretrain/vilt"]
    assert list_recipes("finetune") == ["finetune/vilt", "finetune/vqa"]
    assert find_recipe("vqa") == find_recipe("finetune/vqa") == find_recipe(configs / "finetune/vqa.yaml")
    assert find_recipe("vilt", group="pretrain") == configs / "pretrain/vilt.yaml"
    assert problems(find_recipe, "vilt") == [
        "recipe vilt: 2 recipes have this name; write finetune/vilt or pretrain/vilt"
    ]
    assert problems(find_recipe, "albf") == [
        "recipe albf: no such recipe; perhaps you meant pretrain/albef (a file's name ends in .yaml)"
    ]
    assert "there are albef, vilt" in problems(find_recipe, "vqa", group="pretrain")[0]
    assert problems(find_recipe, "configs/pretrain/albf.yaml") == [
        "recipe configs/pretrain/albf.yaml: no such file; perhaps you meant albef.yaml"
    ]


def test_shipped_folder_is_the_checkouts():
    assert recipes.configs_folder() == Path(recipes.__file__).parents[1] / "configs"


def test_shipped_folder_is_inside_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "site-packages/vlp/recipes.py"))
    write(tmp_path / "site-packages/vlp/configs/pretrain/a.yaml", "")
    write(tmp_path / "site-packages/configs/pretrain/foreign.yaml", "")
    assert list_recipes() == ["pretrain/a"]


def test_missing_base_names_the_recipe(configs: Path):
    own = write(configs.parent / "own.yaml", "base: othr.yaml\n")
    write(configs.parent / "other.yaml", "")
    (line,) = problems(load, Run, own)
    assert "perhaps you meant other" in line and line.endswith("(own.yaml)")
    own = write(configs.parent / "own.yaml", "base: [a, b]\n")
    assert problems(load, Run, own) == ["base = ['a', 'b']: should be one recipe, a file or a name (own.yaml)"]


def test_base_circle_is_one_line(configs: Path):
    write(configs.parent / "a.yaml", "base: b.yaml\n")
    write(configs.parent / "b.yaml", "base: a.yaml\n")
    assert problems(load, Run, "a.yaml") == [
        "base: a.yaml -> b.yaml -> a.yaml is a circle; remove one of these base: lines"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "own.yaml, line 3, column 2: "),
        ("a: 1\na: 2\n", "own.yaml, line 2, column 1: 'a' is given twice"),
        ("- 1\n- 2\n", "own.yaml: holds a list; a recipe is a mapping"),
        ("a: \x01\n", "own.yaml: unacceptable character"),
        ("a: !!python/name:os.system\n", "own.yaml, line 1, column 4: could not determine a constructor"),
    ],
)
def test_bad_yaml_is_one_line_with_file_and_line(configs: Path, text: str, line: str):
    write(configs.parent / "own.yaml", text)
    (problem,) = problems(load, Run, "own.yaml")
    assert problem.startswith(line)


def test_not_text_is_one_line(configs: Path):
    write(configs.parent / "own.yaml", "").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8 text" in problems(load, Run, "own.yaml")[0]


def test_format_is_lifted_by_the_hook_and_checked(configs: Path):
    own = write(configs.parent / "own.yaml", "format: 0\ndata: {train: a}\nnum_samples: 7\n")

    def migrate(tree: dict[str, Any]) -> dict[str, Any]:
        assert tree.pop("format") == 0
        tree["samples"] = tree.pop("num_samples")
        return tree

    assert load(Run, own, migrate=migrate).samples == 7
    assert from_command_line(Run, [], own, migrate=migrate).samples == 7
    assert "older than 1" in problems(load, Run, own)[0]
    write(own, f"format: {FORMAT + 1}\n")
    newer = f"format = {FORMAT + 1}: newer than this vlp, which reads up to {FORMAT}; update vlp (own.yaml)"
    assert problems(load, Run, own, migrate=migrate) == [newer]
    assert "should be a whole number" in problems(build, Run, {"format": "one"})[0]


ROUND_TRIPS = [
    {},
    {"objectives": {"mlm": None}},
    {"objectives": {"mlm": None, "b": {"kind": "mlm"}}, "model": {"decoder": {}, "vision": {"kind": "grid"}}},
    {"lr": 1e-05, "note": "1e5", "names": ["yes", "null", "1:30", "ü"], "data": {"cache": "x/y", "size": [1, 2]}},
    {"lr": float("inf"), "note": "{a: 1}\nb # c", "data": {"mix": {"on": 1, "2": 0.5}, "flip": False}},
]


@pytest.mark.parametrize("tree", ROUND_TRIPS)
def test_the_written_tree_is_a_recipe_of_an_equal_object(configs: Path, tree: dict[str, Any]):
    config = build(Run, DATA, tree)
    text = to_yaml(config)
    assert text.startswith(f"format: {FORMAT}\n")
    again = load(Run, write(configs.parent / "config.yaml", text))
    assert again == config
    assert to_yaml(again) == text


def test_restated_lines(configs: Path):
    write(configs / "base.yaml", "data: {train: a}\nmodel: {vision: {kind: grid}}\nsamples: 5\n")
    own = """
        base: base
        samples: 5
        lr: 2e-3
        data: {train: b, flip: true}
        model:
          vision: {kind: patch, depth: 12, width: 3}
        objectives:
          mim: {kind: mim}
          mlm: {weight: 1.0, mask_probability: 0.2}
    """
    assert restated(Run, write(configs / "own.yaml", own)) == [
        "samples",
        "data.flip",
        "model.vision.depth",
        "objectives.mim.kind",
        "objectives.mlm.weight",
    ]
    terse = "base: base\nobjectives: {mim: {}, mlm: null}\nmodel: {decoder: {}}\ndata: {mix: {a: 1}}\n"
    assert restated(Run, write(configs / "own.yaml", terse)) == []
