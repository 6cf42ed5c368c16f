"""Ranking metrics of dialogue against independent definitions and the challenge code's documented behaviour.

The published evaluation is `visdialch/metrics.py` of the challenge's starter code (batra-mlp-lab,
visdial-challenge-starter-pytorch). Its documented behaviour, checked below: ranks are 1 .. 100, the largest score gets
rank 1 ("convert from 0-99 ranks to 1-100 ranks"); R@k counts rank <= k; MRR is the mean reciprocal, "mean" the mean of
the ranks; NDCG cuts both orders at k = the number of options whose relevance is not 0, discounts by
log2(place + 1), and is averaged over the questions.
"""

import math

import numpy as np
import pytest
import torch

from downstream.metrics.dialogue import chance_ndcg, chance_sparse, ndcg, ranks_of, sparse_metrics


def challenge_ndcg(scores: np.ndarray, relevance: np.ndarray) -> float:
    """As the challenge's docstrings and comments say it, in torch's terms."""
    predicted, relevance = torch.tensor(scores), torch.tensor(relevance)
    k = int((relevance != 0).sum())
    discounts = torch.log2(torch.arange(k, dtype=torch.float64) + 2)
    dcg = (relevance[predicted.argsort(descending=True)[:k]] / discounts).sum()
    return float(dcg / (relevance.sort(descending=True).values[:k] / discounts).sum())


def test_ndcg_equals_the_challenges_definition():
    draw = np.random.default_rng(0)
    for relevant in (1, 3, 8, 40, 100):
        relevance = np.zeros(100)
        relevance[draw.permutation(100)[:relevant]] = draw.choice([0.2, 0.4, 0.6, 0.8, 1.0], relevant)
        scores = draw.normal(size=100) + relevance
        found = ndcg(ranks_of(scores.tolist()), relevance.tolist())
        assert found == pytest.approx(challenge_ndcg(scores, relevance), abs=1e-6)


def test_ndcg_of_cases_by_hand():
    relevance = [0.0, 1.0, 0.5, 0.0]
    assert ndcg([3, 1, 2, 4], relevance) == pytest.approx(1.0)
    # k = 2: only the first two places count, here 0.5 and nothing.
    assert ndcg([2, 4, 1, 3], relevance) == pytest.approx(0.5 / (1 + 0.5 / math.log2(3)))
    assert ndcg([1, 3, 4, 2], relevance) == 0.0
    assert ndcg([1, 2], [0.0, 0.0]) is None


def test_ranks_and_recall_equal_an_independent_definition():
    draw = np.random.default_rng(1)
    scores, truth = draw.normal(size=(300, 100)), draw.integers(0, 100, 300)
    ranks = [ranks_of(row.tolist()) for row in scores]
    assert all(sorted(row) == list(range(1, 101)) for row in ranks)
    own = np.array([1 + (row > row[t]).sum() for row, t in zip(scores, truth)])
    assert [row[t] for row, t in zip(ranks, truth)] == own.tolist()
    found = sparse_metrics(own.tolist())
    wanted = {"MRR": (1 / own).mean(), "mean rank": own.mean()} | {f"R@{k}": (own <= k).mean() for k in (1, 5, 10)}
    assert found == pytest.approx(wanted, abs=1e-6)


def test_equal_scores_keep_their_order_and_nan_is_an_error():
    assert ranks_of([0.5, 0.7, 0.5]) == [2, 1, 3]
    with pytest.raises(ValueError, match="NaN"):
        ranks_of([0.5, float("nan")])
    with pytest.raises(ValueError, match="no ranks"):
        sparse_metrics([])


def test_chance_is_the_mean_over_random_orders():
    draw, relevance = np.random.default_rng(2), [0.0] * 12 + [0.4, 1.0, 0.2]
    orders = [(draw.permutation(15) + 1).tolist() for _ in range(20000)]
    assert chance_ndcg(relevance) == pytest.approx(np.mean([ndcg(one, relevance) for one in orders]), abs=0.01)
    assert chance_sparse([15]) == pytest.approx(sparse_metrics([one[0] for one in orders]), rel=0.05)
    assert chance_sparse([100])["mean rank"] == 50.5 and chance_ndcg([0.0]) is None
