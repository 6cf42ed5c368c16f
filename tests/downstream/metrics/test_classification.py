"""Top-k and the per-class mean against definitions of a few lines."""

import numpy as np
import pytest
import torch

from downstream.metrics.classification import chance_metrics, class_ranks, classification_metrics, prior_metrics


def test_metrics_equal_an_independent_definition():
    draw = np.random.default_rng(0)
    scores, labels = draw.normal(size=(200, 12)), draw.integers(0, 9, 200)
    ranks = class_ranks(torch.tensor(scores), torch.tensor(labels)).tolist()
    found = classification_metrics(ranks, labels.tolist())
    order = np.argsort(-scores, 1)
    assert found["top-1"] == pytest.approx(np.mean(order[:, 0] == labels), abs=1e-6)
    assert found["top-5"] == pytest.approx(np.mean([label in row[:5] for label, row in zip(labels, order)]), abs=1e-6)
    each = [np.mean(order[labels == c, 0] == c) for c in np.unique(labels)]
    assert found["per-class mean"] == pytest.approx(np.mean(each), abs=1e-6)


def test_equal_scores_are_ordered_by_class():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    assert [int(class_ranks(scores, torch.tensor([c]))) for c in range(4)] == [4, 1, 2, 3]


def test_the_mean_over_classes_weighs_them_alike():
    found = classification_metrics([1, 1, 1, 2], [0, 0, 0, 1])
    assert found == {"top-1": 0.75, "top-5": 1.0, "per-class mean": 0.5}
    with pytest.raises(ValueError, match="no images"):
        classification_metrics([], [])


def test_floors():
    assert chance_metrics(10) == {"top-1": 0.1, "top-5": 0.5, "per-class mean": 0.1}
    assert chance_metrics(3)["top-5"] == 1.0
    # The training data have class 2 most often, 0 less, 1 never; the images are 2, 2, 0.
    assert prior_metrics({2: 5, 0: 3}, [2, 2, 0], 3) == {
        "top-1": pytest.approx(2 / 3),
        "top-5": 1.0,
        "per-class mean": 0.5,
    }
