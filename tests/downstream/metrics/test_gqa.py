"""GQA's metrics against a few-line definition of their own, and cases worked from the remarks of its eval.py."""

import random
from dataclasses import replace

import pytest

from downstream.metrics.gqa import GqaQuestion, gqa_metrics

WORDS = ["yes", "no", "red", "blue", "t-shirt"]


def made(seed: int, number: int = 300) -> tuple[dict, dict, dict]:
    """Random questions, predictions and choices."""
    rng = random.Random(seed)
    keys = [f"{i:04}" for i in range(number)]
    questions = {
        key: GqaQuestion(
            question=" ".join(rng.choices(["is", "it", "red", "?"], k=rng.randint(1, 4))),
            answer=rng.choice(WORDS),
            structural=rng.choice(["query", "verify", "choose", "logical", "compare"]),
            semantic=rng.choice(["attr", "rel"]),
            detailed=rng.choice(["verifyAttr", "twoCommon"]),
            steps=rng.randint(1, 4),
            group=rng.choice([None, "color", "material"]),
            balanced=rng.random() < 0.6,
            entailed=tuple(rng.choices(keys, k=rng.randint(0, 3))),
        )
        for key in keys
    }
    predictions = {key: one.answer if rng.random() < 0.6 else rng.choice(WORDS) for key, one in questions.items()}
    choices = {key: {"valid": rng.sample(WORDS, 3), "plausible": rng.sample(WORDS, 2)} for key in keys}
    return questions, predictions, choices


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def by_definition(questions: dict, predictions: dict, choices: dict) -> dict[str, float]:
    """What the paper's section 4.4 and eval.py's head say, in few lines."""
    scored = [key for key, one in questions.items() if one.balanced]
    right = {key: predictions[key] == one.answer for key, one in questions.items()}
    others = {key: [e for e in questions[key].entailed if e != key] for key in scored}
    found = {
        "accuracy": mean(right[key] for key in scored),
        "open": mean(right[key] for key in scored if questions[key].structural == "query"),
        "binary": mean(right[key] for key in scored if questions[key].structural != "query"),
        "consistency": mean(mean(right[e] for e in others[key]) for key in scored if right[key] and others[key]),
    }
    for name, listed in (("validity", "valid"), ("plausibility", "plausible")):
        allowed = {
            key: ["color", "material", "shape"] if "Common" in questions[key].detailed else choices[key][listed]
            for key in scored
        }
        found[name] = mean(predictions[key] in allowed[key] for key in scored)
    total, weights = 0.0, 0
    for group in ("color", "material"):
        members = [key for key in scored if questions[key].group == group]
        gold, given = [questions[key].answer for key in members], [predictions[key] for key in members]
        total += len(members) * sum((given.count(a) - gold.count(a)) ** 2 / gold.count(a) for a in set(gold))
        weights += len(members)
    return found | {"distribution": total / weights / 100}


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_the_definition(seed):
    case = made(seed)
    found = gqa_metrics(*case)
    for name, value in by_definition(*case).items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    questions, predictions, _ = case
    kinds = {("structural", "compare"), ("semantic", "rel"), ("steps", 3)}
    for field, kind in kinds:
        keys = [key for key, one in questions.items() if one.balanced and getattr(one, field) == kind]
        assert found[f"accuracy/{field}/{kind}"] == pytest.approx(
            mean(predictions[key] == questions[key].answer for key in keys), abs=1e-6
        )
    keys = [key for key, one in questions.items() if one.balanced and len(one.question.split()) == 2]
    assert found["accuracy/words/2"] == pytest.approx(mean(predictions[k] == questions[k].answer for k in keys))


RED = GqaQuestion("What color is it?", "red", structural="query", semantic="attr", detailed="color", group="color")


def test_cases_of_the_published_code():
    """`belongs`, `updateConsistency` and `chiSquare` of eval.py, worked by hand."""
    # answers are compared as they are: no case, no articles
    assert gqa_metrics({"a": RED}, {"a": "Red"})["accuracy"] == 0.0
    # a question about things in common may be answered color, material or shape, whatever the file says
    common = replace(RED, detailed="twoCommon", answer="color")
    nothing = {"a": {"valid": [], "plausible": []}}
    found = gqa_metrics({"a": common}, {"a": "shape"}, nothing)
    assert (found["validity"], found["plausibility"], found["accuracy"]) == (1.0, 1.0, 0.0)
    # consistency: only questions answered right count, a question does not entail itself, unbalanced ones may be asked
    asked = {
        "a": replace(RED, entailed=("a", "b", "c")),
        "b": replace(RED, answer="yes", balanced=False),
        "c": replace(RED, answer="no", balanced=False, entailed=("b",)),
        "d": replace(RED, answer="blue", entailed=("b",)),
    }
    found = gqa_metrics(asked, {"a": "red", "b": "yes", "c": "yes", "d": "green"})
    assert found["consistency"] == 0.5 and found["accuracy"] == 0.5
    assert gqa_metrics(asked, dict.fromkeys(asked, "?"))["consistency"] == 0.0
    # distribution: 3 red, 1 blue; given 2 red, 2 green: ((2 - 3)^2 / 3 + (0 - 1)^2 / 1) / 100; green is not in the gold
    four = {key: replace(RED, answer=answer) for key, answer in zip("abcd", ["red", "red", "red", "blue"], strict=True)}
    given = dict(zip("abcd", ["red", "red", "green", "green"], strict=True))
    assert gqa_metrics(four, given)["distribution"] == pytest.approx((1 / 3 + 1) / 100, abs=1e-9)


def test_what_cannot_be_computed_is_left_out_or_refused():
    lone = replace(RED, entailed=("elsewhere",), group=None, structural="", semantic="")
    assert set(gqa_metrics({"a": lone}, {"a": "red"})) == {"accuracy", "accuracy/words/4"}
    with pytest.raises(ValueError, match="none is balanced"):
        gqa_metrics({"a": replace(RED, balanced=False)}, {"a": "red"})
    with pytest.raises(ValueError, match="1 questions have none, as a"):
        gqa_metrics({"a": RED}, {})
    with pytest.raises(ValueError, match="question a has no list 'valid'"):
        gqa_metrics({"a": RED}, {"a": "red"}, {})
