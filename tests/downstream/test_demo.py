"""The demo's own decisions; its whole path is run by tests/test_readme.py."""

from pathlib import Path

import pytest
import torch
import toys

import vlp
from downstream import demo
from downstream.finetune import FinetuneConfig, Finetuned
from downstream.task import Result
from vlp.checkpoint.native import LoadReport
from vlp.train.loop import Outcome


def test_durations_follow_the_budget():
    recipe = demo.pretraining(demo.DemoConfig())
    thrice = demo.pretraining(demo.DemoConfig(pretrain=3 * recipe.train.samples, seed=5))
    assert thrice.train.samples == 3 * recipe.train.samples and thrice.train.seed == 5
    assert thrice.train.optim.warmup == 3 * recipe.train.optim.warmup
    for field in ("random_until", "hard_from"):
        assert getattr(thrice.objectives["itm"], field) == 3 * getattr(recipe.objectives["itm"], field) > 0


def test_an_interrupted_pretraining_is_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "pretrain", lambda *given, **named: Outcome(tmp_path, 256, finished=False))
    with pytest.raises(KeyboardInterrupt):
        demo.demo(demo.DemoConfig(vqa=0, captioning=0), tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(("objectives", "compares"), [("itc,itm", True), ("mlm", False)])
def test_captions_stand_beside_those_of_images_that_the_pretrained_model_holds_for_alike(
    objectives: str, compares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[FinetuneConfig] = []
    score = Result({"CIDEr-D": 1.0}, {"nearest embedding": {"CIDEr-D": 0.5}}, [])

    def finetuned(run: FinetuneConfig, *rest: object, **named: object) -> Finetuned:
        given.append(run)
        return Finetuned(None, None, score, LoadReport(), Outcome(tmp_path, 256, finished=True))

    monkeypatch.setattr(demo, "finetune", finetuned)
    path = toys.checkpoint(tmp_path, objectives.split(","))
    more = tmp_path, torch.device("cpu"), ""
    found = demo.tune(demo.DemoConfig(smoke=True), vlp.load(str(path)), path, "captioning", *more)
    assert given[0].task.kind == "captioning" and given[0].task.neighbours_by == (str(path) if compares else None)
    [row] = demo.task_rows("Captioning", "emoji", found, {"CIDEr-D": ""})
    assert row.floors == {"nearest embedding": 0.5}
