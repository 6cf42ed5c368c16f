"""NLVR2, VCR and sentiment metrics against definitions of a few lines and documented cases."""

from __future__ import annotations

import numpy as np
import pytest

from downstream.metrics.choice import vcr_metrics
from downstream.metrics.sentiment import sentiment_metrics, seven, weighted_f1
from downstream.metrics.verdict import consistency, label_accuracy, sentence_of


def test_consistency_as_the_published_evaluation_counts_it():
    """Its metrics.py clears the third part of an identifier, and asks of each name left whether all were right."""
    draw = np.random.default_rng(0)
    names = [f"dev-{s}-{p}-{n}" for s in range(6) for p in range(4) for n in range(2)]
    right = [bool(one) for one in draw.random(len(names)) < 0.8]
    kept: dict[str, bool] = {}
    for name, one in zip(names, right):
        parts = name.split("-")
        parts[2] = ""
        kept["-".join(parts)] = kept.get("-".join(parts), True) and one
    assert len(kept) == 12
    assert consistency(right, [sentence_of(name) for name in names]) == pytest.approx(sum(kept.values()) / 12)
    assert consistency([True, False, True], ["a", "a", "b"]) == 0.5
    with pytest.raises(ValueError, match="no consistency"):
        consistency([], [])


def test_accuracy_by_label():
    found = label_accuracy([True, False, True, True], ["True", "True", "False", "True"])
    assert found == pytest.approx({"accuracy": 0.75, "accuracy/label/False": 1.0, "accuracy/label/True": 2 / 3})
    with pytest.raises(ValueError, match="no accuracy"):
        label_accuracy([], [])


def test_vcr_needs_both_for_the_third():
    answers, rationales = {"a": True, "b": False, "c": True, "d": True}, {"a": True, "b": True, "c": False}
    assert vcr_metrics(answers, rationales) == pytest.approx({"Q->A": 3 / 4, "QA->R": 2 / 3, "Q->AR": 1 / 3})
    assert vcr_metrics(answers, {}) == {"Q->A": 0.75} and vcr_metrics({}, {}) == {}


def test_sentiment_as_the_published_evaluation_codes():
    """NumPy's lines of MulT's and MMSA's evaluation."""
    draw = np.random.default_rng(3)
    truth = np.round(draw.normal(0, 1.8, 300).clip(-3, 3) * 2) / 2
    said = truth + draw.normal(0, 1.2, 300)
    found = sentiment_metrics(said.tolist(), truth.tolist())
    assert found["MAE"] == pytest.approx(np.mean(np.absolute(said - truth)), abs=1e-6)
    assert found["Pearson"] == pytest.approx(np.corrcoef(said, truth)[0][1], abs=1e-6)
    bins = np.round(np.clip(said, -3, 3)) == np.round(np.clip(truth, -3, 3))
    assert found["Acc-7"] == pytest.approx(bins.sum() / 300, abs=1e-6)
    assert found["Acc-2 has0"] == pytest.approx(np.mean((said >= 0) == (truth >= 0)), abs=1e-6)
    kept = truth != 0
    assert 0 < kept.sum() < 300
    assert found["Acc-2 non0"] == pytest.approx(np.mean((said[kept] > 0) == (truth[kept] > 0)), abs=1e-6)
    for name, a, b in (("has0", said >= 0, truth >= 0), ("non0", said[kept] > 0, truth[kept] > 0)):
        total = 0.0
        for value in (False, True):
            hits = np.sum((a == value) & (b == value))
            precision, recall = hits / np.sum(a == value), hits / np.sum(b == value)
            total += np.sum(b == value) / len(b) * 2 * precision * recall / (precision + recall)
        assert found[f"F1 {name}"] == pytest.approx(total, abs=1e-6)


def test_sentiment_at_the_edges():
    assert [seven(x) for x in (-3.6, -2.5, -0.5, 0.5, 1.5, 2.51, 9)] == [-3, -2, 0, 0, 2, 3, 3]
    assert sentiment_metrics([1.0, 1.0], [0.5, -0.5])["Pearson"] == 0.0
    neutral = sentiment_metrics([0.1, -0.1], [0.0, 0.0])
    assert neutral["Acc-2 has0"] == 0.5 and "Acc-2 non0" not in neutral
    assert weighted_f1([True, True], [False, False]) == 0.0 and weighted_f1([True], [True]) == 1.0
    with pytest.raises(ValueError, match="1 predictions of 2 samples"):
        sentiment_metrics([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="not finite"):
        sentiment_metrics([float("nan")], [1.0])
