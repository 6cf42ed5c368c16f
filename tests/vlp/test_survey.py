"""The survey's table from the recipes: features, streams and costs of two of them, and what head comments say."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlp.config import find_recipe, list_recipes, load
from vlp.run import RunConfig
from vlp.survey import (
    HEADERS,
    architecture,
    divide,
    statements,
    streams,
    survey,
    survey_table,
    text_feature,
    vision_feature,
)

PRETRAIN = list_recipes("pretrain")


def test_a_recipe_of_two_towers() -> None:
    entry = survey("pretrain/clip_vit_b32")
    assert entry.cells[:6] == ("clip_vit_b32", "patches, vit_base", "12 layers", "dual, apart", "encoder", "itc")
    assert entry.cells[6] == "151.3"
    assert entry.flops / 1e9 == pytest.approx(14.78, rel=0.02)  # models.md's figure for a pair
    table = survey_table([entry])
    assert [str(column.header) for column in table.columns] == list(HEADERS)


def test_a_recipe_that_draws_its_objectives() -> None:
    """The cost is the mean over the drawn groups, so it lies below that of all at once."""
    entry = survey("uniter_base")
    assert entry.vision == "100 regions" and entry.text == "embedded words" and entry.streams == "single"
    assert entry.objectives == "itm+wra, or mlm, or mrfr, or mrc"
    assert 20 < entry.flops / 1e9 < 40


@pytest.mark.parametrize("recipe", PRETRAIN)
def test_every_recipe_has_words_for_its_parts(recipe: str) -> None:
    run = load(RunConfig, recipe)
    assert all((vision_feature(run.model), text_feature(run.model), streams(run.model), architecture(run)))
    deviations, lacks = statements(find_recipe(recipe))
    assert all(text and not text.startswith((";", ":")) for text in (*deviations, *lacks))


def test_streams_are_those_of_the_survey() -> None:
    expected = {
        "lxmert": "dual, co",
        "albef": "dual, cross",
        "meter": "dual, co",
        "vlmo_base": "single, multiway",
        "vilt": "single",
    }
    assert {name: streams(load(RunConfig, f"pretrain/{name}").model) for name in expected} == expected
    writes = {
        name: architecture(load(RunConfig, f"pretrain/{name}")) for name in ("simvlm_base", "vlp_unified", "vilt")
    }
    assert writes == {"simvlm_base": "encoder-decoder", "vlp_unified": "encoder that writes", "vilt": "encoder"}


def test_statements_of_a_head_comment(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "# Mine. It is small.\n#\n#   vlp pretrain mine\n#\n# Deviations: one (a; b); two goes\n"
        "#   on; three. Four is\n#   last.\n"
        "# Lacks: images of 2.5 px.\n# Not yet run.\nmodel: {}\n# Lacks: no comment of the head.\n"
    )
    assert statements(recipe) == (("one (a; b)", "two goes on", "three", "Four is last"), ("images of 2.5 px",))
    assert divide("Lacks: nothing of the method; its data are not public.") == []
    assert divide("Deviation from LiT: both towers are frozen.") == ["both towers are frozen"]
