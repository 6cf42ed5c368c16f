"""What a user states of an objective is laid over the checkpoint's own; the rest of that stays, its head above all."""

from __future__ import annotations

import pytest

from downstream.captioning import CaptioningConfig, CaptionSurvey
from downstream.retrieval import RetrievalConfig
from downstream.translation import TranslationConfig, TranslationSurvey
from downstream.vqa import VqaConfig, VqaSurvey
from objectives import AnswerConfig, ItcConfig, ItmConfig, LmConfig
from vlp.config import build
from vlp.run import RunConfig

SMOOTHED = {"lm": {"label_smoothing": 0.1}}
TEXT = {"layers": 2, "width": 16, "heads": 2, "vocabulary_size": 64}
MODEL = {"text": TEXT, "fusion": {"kind": "dual_stream", "layers": 1, "width": 16, "heads": 2}, "decoder": {}}


def run_of(objectives: dict) -> RunConfig:
    return build(RunConfig, {"model": MODEL, "objectives": objectives})


@pytest.mark.parametrize(
    ("task", "survey", "memory", "view"),
    [
        (CaptioningConfig(), CaptionSurvey("a", 1, 1), "image", "causal"),
        (VqaConfig(head="open"), VqaSurvey(("a", "b"), (1.0, 1.0), {}, 2), "fused", "lm:answer"),
        (TranslationConfig(), TranslationSurvey("a", 1, 1), "fused", "lm:translation"),
    ],
)
def test_the_checkpoints_word_head_stays(task, survey, memory, view) -> None:
    own = LmConfig(memory=memory, head="linear", tied=False, prompt=(7, 8))
    for stated, smoothing in ((SMOOTHED, 0.1), ({}, 0.0)):
        lm = task.adapt(run_of(stated), {"lm": own}, survey).objectives["lm"]
        assert lm == own.model_copy(update={"label_smoothing": smoothing, "view": view})
    other = LmConfig(memory="fused" if memory == "image" else "image", head="linear")
    lm = task.adapt(run_of(SMOOTHED), {"lm": other}, survey).objectives["lm"]
    assert (lm.head, lm.memory, lm.label_smoothing) == ("bert", memory, 0.1)


def test_retrieval_keeps_what_is_not_stated_of_matching() -> None:
    own = {"itc": ItcConfig(), "itm": ItmConfig(masked=True, hard_from=50, number=3)}
    found = RetrievalConfig().adapt(run_of({"itm": {"number": 8}}), own, None).objectives
    assert found == {"itc": own["itc"], "itm": ItmConfig(masked=True, hard_from=0, number=8)}


def test_what_is_stated_wins_at_its_default_too() -> None:
    own = {"itc": ItcConfig(queue=64, distill=0.4)}
    found = RetrievalConfig().adapt(run_of({"itc": {"queue": 0}, "itm": {}}), own, None).objectives
    assert found["itc"] == ItcConfig(queue=0, distill=0.4)
    assert run_of({"itc": {"queue": 0}}).objectives["itc"].model_fields_set == {"queue"}


def test_an_answer_head_that_fits_stays_when_its_loss_is_stated() -> None:
    own = AnswerConfig(answers=("red", "blue", "green"), hidden=48, masked=True)
    adapt = VqaConfig().adapt
    survey = VqaSurvey(("blue", "red"), (1.0, 1.0), {}, 2)
    found = adapt(run_of({"answer": {"loss": "ce"}}), {"answer": own}, survey).objectives["answer"]
    assert found == own.model_copy(update={"loss": "ce", "masked": False})
    new = adapt(run_of({"answer": {"loss": "ce"}}), {"answer": own.model_copy(update={"answers": ("x",)})}, survey)
    assert (new.objectives["answer"].answers, new.objectives["answer"].loss) == (("blue", "red"), "ce")


def test_what_is_of_another_kind_is_not_laid_over() -> None:
    assert ItmConfig(number=8).over(ItcConfig()) == ItmConfig(number=8)
    assert ItmConfig(number=8).over(None) == ItmConfig(number=8)
