"""CIDEr-D, BLEU and ROUGE-L against pycocoevalcap, the tokeniser against Java (see scripts/make_caption_cases.py)."""

import json
from pathlib import Path

import pytest

from downstream.metrics import bleu, caption_metrics, cider_d, document_frequencies, rouge_l, tokenize

FOLDER = Path(__file__).parent
CASES = json.loads((FOLDER / "caption_cases.json").read_text(encoding="utf-8"))
PAIRS = json.loads((FOLDER / "ptb_pairs.json").read_text(encoding="utf-8"))


def close(value):
    return pytest.approx(value, abs=1e-6, rel=0)


def test_there_are_enough_cases_with_one_to_five_references_and_empty_captions():
    assert len(CASES) >= 60 and len(CASES[-1]["candidates"]) >= 200
    assert {len(refs) for case in CASES for refs in case["references"]} == {1, 2, 3, 4, 5}
    assert any("" in case["candidates"] for case in CASES)
    assert any("" in refs for case in CASES for refs in case["references"])


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_reference(case):
    given = case["candidates"], case["references"]
    for metric, name in ((cider_d, "cider_d"), (rouge_l, "rouge_l")):
        corpus, each = metric(*given)
        assert corpus == close(case[name][0])
        assert each == close(case[name][1])
    corpus, each = bleu(*given)
    assert corpus == close(case["bleu"][0])
    for order in range(4):
        assert each[order] == close(case["bleu"][1][order])


def test_lists_of_tokens_score_as_strings():
    case = CASES[3]
    split = [c.split() for c in case["candidates"]], [[r.split() for r in refs] for refs in case["references"]]
    for metric in (cider_d, bleu, rouge_l):
        assert metric(*split) == metric(case["candidates"], case["references"])


def test_cider_d_of_identical_captions_is_ten():
    truth = ["a red cat sits on a mat", "two dogs run along the beach", "the train leaves a station"]
    assert cider_d(truth, [[t] for t in truth])[0] == pytest.approx(10.0)


def test_cider_d_with_document_frequencies_of_another_corpus():
    case = next(c for c in CASES if len(c["candidates"]) == 8)
    df = document_frequencies(case["references"])
    assert cider_d(*(case[k][:1] for k in ("candidates", "references")), df=df)[0] == close(case["cider_d"][1][0])
    assert cider_d(case["candidates"][:1], case["references"][:1])[0] == 0.0  # alone: log(1 / 1)


def test_caption_metrics_tokenises_and_matches_by_key():
    candidates = {7: "A dog, running!", "x": "Two cats sit on the mat."}
    references = {"x": ["two cats sit on the mat", "a mat with cats"], 7: ["a dog running", "The dog runs."]}
    scores = caption_metrics(candidates, references)
    assert list(scores) == ["CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    assert scores["BLEU-1"] == pytest.approx(1.0)
    assert scores["ROUGE-L"] == pytest.approx(1.0)
    assert (
        scores["CIDEr-D"]
        == cider_d(
            ["a dog running", "two cats sit on the mat"],
            [["a dog running", "the dog runs"], ["two cats sit on the mat", "a mat with cats"]],
        )[0]
    )


@pytest.mark.parametrize("metric", [cider_d, bleu, rouge_l])
def test_what_cannot_be_scored_is_refused(metric):
    for given in (([], []), (["a"], [["a"], ["b"]]), (["a", "b"], [["a"], []])):
        with pytest.raises(ValueError, match="captions:"):
            metric(*given)


def test_caption_metrics_refuses_different_keys():
    with pytest.raises(ValueError, match="'b'"):
        caption_metrics({"a": "x", "b": "y"}, {"a": ["x"]})


def test_tokeniser_agrees_with_java():
    assert len(PAIRS) > 500
    different = [(sentence, java, tokenize(sentence)) for sentence, java in PAIRS if tokenize(sentence) != java.split()]
    assert different == []


def test_tokeniser_keeps_the_oddities_of_the_reference():
    assert tokenize("A man's dog can't (run) \"fast\"!") == [
        "a",
        "man",
        "'s",
        "dog",
        "ca",
        "n't",
        "-lrb-",
        "run",
        "-rrb-",
        "fast",
    ]
    assert " ".join(tokenize("Wow!! It cannot be 5 p.m.\n\u201cReally\u201d?")) == "wow !! it can not be 5 p.m. really"
    assert tokenize("") == tokenize(" . ") == tokenize("😀") == []
