"""The finetuning recipes state nothing that would be so anyway, and fit a checkpoint."""

import pytest
import toys

import vlp
from downstream.captioning import CaptionSurvey
from downstream.finetune import FinetuneConfig, finetune_config
from downstream.sentiment import SentimentSurvey
from downstream.verdict import VerdictSurvey
from downstream.vqa import VqaSurvey
from vlp.config import list_recipes, load_recipe, restated
from vlp.model import build_model
from vlp.train.optim import build_optimizer

RECIPES = [name for name in list_recipes("finetune") if "/demo" not in name]
SURVEYS = {
    "vqa": VqaSurvey(("no", "yes"), (2.0, 1.0), {}, 3),
    "captioning": CaptionSurvey("a", 1, 1),
    "retrieval": None,
    "nlvr2": VerdictSurvey({"False": 2, "True": 1}),
    "snli_ve": VerdictSurvey({"neutral": 1}),
    "vcr": None,
    "sentiment": SentimentSurvey(0.0, 1),
    "referring": None,
    "dialogue": None,
    "translation": None,
}


def test_every_task_has_a_recipe():
    assert {f"finetune/{name}" for name in SURVEYS} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_a_checkpoint_and_restates_nothing(name, tmp_path):
    assert restated(FinetuneConfig, name) in ([], ["task.kind"])
    loaded = vlp.load(toys.checkpoint(tmp_path))
    run = finetune_config(loaded, "toy", *load_recipe(name))
    assert run.model.vision == loaded.config.model.vision and run.task.kind == name.split("/")[1]
    run = run.task.adapt(run, loaded.config.objectives, SURVEYS[run.task.kind])
    model = build_model(run.model, run.objectives, vocabulary_size=loaded.tokenizer.vocabulary.size)
    assert build_optimizer(model, run.train.optim).param_groups
