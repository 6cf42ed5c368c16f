"""VQA accuracy on cases worked by hand from the official definition."""

import random

import pytest

from downstream.metrics import normalize_answer, soft_targets, vqa_accuracy, vqa_metrics


@pytest.mark.parametrize(
    ("matches", "expected"),
    [
        (0, 0.0),
        (1, 0.3),  # the 1 matching annotator is left out: 0 of 9 -> 0; the 9 others see 1 -> 1/3: 9 * 1/3 / 10
        (2, 0.6),  # 2 annotators see 1 -> 1/3, 8 see 2 -> 2/3: (2/3 + 16/3) / 10 = 6 / 10
        (3, 0.9),  # 3 see 2 -> 2/3, 7 see 3 -> 1: (2 + 7) / 10
        (4, 1.0),  # 4 see 3 -> 1, 6 see 4 -> 1
        (10, 1.0),
    ],
)
def test_ten_choose_nine(matches, expected):
    answers = ["cat"] * matches + ["dog"] * (10 - matches)
    assert vqa_accuracy("cat", answers) == pytest.approx(expected)
    if matches:
        assert soft_targets(answers)["cat"] == pytest.approx(expected)


def test_every_subset_of_nine_gives_the_same_as_the_counts():
    answers = ["red", "red", "dark red", "red", "blue", "dark red", "maroon", "red", "blue", "brown"]
    for prediction in {*answers, "green"}:
        by_hand = [min(1, (answers[:i] + answers[i + 1 :]).count(prediction) / 3) for i in range(10)]
        assert vqa_accuracy(prediction, answers) == pytest.approx(sum(by_hand) / 10)


def test_two_hundred_random_questions_equal_the_definition():
    """The mean over annotators of min(1, others who said it / 3), in all, by answer type and by question type."""
    draw = random.Random(0)
    words = ["yes", "no", "2", "red", "blue", "dog"]
    answers = [draw.choices(words[: draw.randint(2, 6)], k=10) for _ in range(240)]
    predictions = [draw.choice(words) for _ in answers]
    types = [draw.choice(["yes/no", "number", "other"]) for _ in answers]
    kinds = [draw.choice(["is the", "how many", "none of the above"]) for _ in answers]
    by_hand = [
        sum(min(1, sum(one == said for j, one in enumerate(ten) if j != i) / 3) for i in range(10)) / 10
        for said, ten in zip(predictions, answers)
    ]
    result = vqa_metrics(predictions, answers, types, kinds)
    assert result.per_question == pytest.approx(by_hand, abs=1e-9)
    assert result.accuracy == pytest.approx(sum(by_hand) / 240, abs=1e-9)
    for found, given in ((result.per_answer_type, types), (result.per_question_type, kinds)):
        for name, value in found.items():
            chosen = [score for score, one in zip(by_hand, given) if one == name]
            assert value == pytest.approx(sum(chosen) / len(chosen), abs=1e-9)


def test_a_single_answer_is_exact_match_after_normalisation():
    assert vqa_accuracy("The Circle.", ["circle"]) == 1.0
    assert vqa_accuracy("square", ["circle"]) == 0.0
    assert soft_targets(["Yes."]) == {"yes": 1.0}


def test_answers_that_all_agree_are_not_normalised():
    # The official code normalises both sides only where the annotators differ.
    assert vqa_accuracy("yes.", ["yes"] * 10) == 0.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1.0  # 9 see 8 -> 1, 1 sees 9 -> 1


def test_few_answers_follow_the_same_formula():
    assert vqa_accuracy("a b", ["a b", "c", "c"]) == pytest.approx(
        2 / 9
    )  # (0 + 1/3 + 1/3) / 3; "a b" is "b" on both sides


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Red Car", "red car"),
        ("a", ""),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("DONT", "don't"),
        ("youre", "you're"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # as in the official table
        ("im", "im"),  # its key is "Im", which never meets a lower-case word
        ("whos", "who's"),
        ("don't", "don't"),
        ("black/white", "black white"),  # no blank at the slash: it becomes one
        ("black/ white", "black white"),  # a blank touches it: it goes
        ("t-shirt", "t shirt"),
        ("yes, it is", "yes it is"),
        ("yes,no", "yes no"),
        ("1,000", "1000"),  # a comma between digits: every mark goes without a blank
        ("1,000 t-shirts", "1000 tshirts"),
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("5.", "5"),
        ("u.s.", "us"),
        ("10:30", "10:30"),  # a colon is not in the table
        ("dog's", "dog's"),  # nor is the apostrophe
        ("50%", "50%"),
        ("what?!", "what"),
        ("a-b -c", "ab c"),  # one dash touches a blank, so all dashes go; then "ab" is no article
        ("(left)", "left"),
        ("new\nyork\tcity ", "new york city"),
        ("." * 40 + "x", "." * 8 + "x"),  # at most 32 periods go
    ],
)
def test_normalisation(answer, normal):
    assert normalize_answer(answer) == normal


def test_soft_targets_merge_equal_answers():
    answers = ["2", "two", "Two", "three", "3", "a lot", "lots", "2.", "many", "many"]
    # normalised: "2" four times -> 1; "3" twice -> 0.6; "lot" and "lots" once -> 0.3; "many" twice -> 0.6
    assert soft_targets(answers) == pytest.approx({"2": 1.0, "3": 0.6, "lot": 0.3, "lots": 0.3, "many": 0.6})


def test_means_by_answer_type_and_question_type():
    answers = [["yes"] * 10, ["2"] * 3 + ["3"] * 7, ["red"] * 5 + ["blue"] * 5, ["cat"]]
    result = vqa_metrics(
        ["yes", "two", "green", "A cat"],
        answers,
        answer_types=["yes/no", "number", "other", "other"],
        question_types=["is the", "how many", "what color", "how many"],
    )
    assert result.per_question == pytest.approx((1.0, 0.9, 0.0, 1.0))
    assert result.accuracy == pytest.approx(2.9 / 4)
    assert result.per_answer_type == pytest.approx({"yes/no": 1.0, "number": 0.9, "other": 0.5})
    assert result.per_question_type == pytest.approx({"is the": 1.0, "how many": 0.95, "what color": 0.0})
    assert vqa_metrics(["yes"], [["yes"]]).per_answer_type == {}


def test_refusals():
    with pytest.raises(ValueError, match="answers: none"):
        vqa_accuracy("yes", [])
    with pytest.raises(ValueError, match="predictions: none"):
        vqa_metrics([], [])
    with pytest.raises(ValueError, match="answer_types: 1 for 2"):
        vqa_metrics(["a", "b"], [["a"], ["b"]], answer_types=["other"])
