"""Visual dialogue: how well the candidate answers are ranked (Das et al. 2017, Visual Dialog; challenge 2018 on).

As the challenge's own code does it (visdial-challenge-starter-pytorch, visdialch/metrics.py): the ranks are 1 .. 100,
1 = best. MRR, R@k and the mean rank are those of the one answer that was given. NDCG takes the dense annotations, which
say for each candidate what share of the annotators found it right:

    NDCG = DCG(order of the model) / DCG(order of the relevances),  DCG = sum over i = 1..k of relevance_i / log2(i + 1)

with k the number of candidates whose relevance is not 0. All in 0..1, the mean rank in 1..A.
Shapes: A candidates.
"""

import math
from collections.abc import Sequence

RECALL_AT = (1, 5, 10)


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Return each candidate's rank, 1 = the largest score; of equal ones the first comes first.

    Raises:
        ValueError: a score is not a number.
    """
    if any(math.isnan(score) for score in scores):
        raise ValueError("dialogue: a candidate's score is NaN; check the model before ranking")
    ranks = [0] * len(scores)
    for rank, number in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), 1):
        ranks[number] = rank
    return ranks


def sparse_metrics(ranks: Sequence[int]) -> dict[str, float]:
    """Return "MRR", "R@1", "R@5", "R@10" and "mean rank" of the given answers' ranks.

    Raises:
        ValueError: there are none.
    """
    if not ranks:
        raise ValueError("dialogue: no ranks; give at least one")
    number = len(ranks)
    found = {"MRR": sum(1 / rank for rank in ranks) / number}
    found |= {f"R@{k}": sum(rank <= k for rank in ranks) / number for k in RECALL_AT}
    return found | {"mean rank": sum(ranks) / number}


def ndcg(ranks: Sequence[int], relevance: Sequence[float]) -> float | None:
    """Return the NDCG of one question's candidates; None where none of them is relevant.

    Args:
        ranks: of each candidate, 1 .. A.
        relevance: of each candidate, in 0..1.
    """
    relevant = sum(one != 0 for one in relevance)
    if not relevant:
        return None
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    return _dcg([relevance[i] for i in order[:relevant]]) / _dcg(sorted(relevance, reverse=True)[:relevant])


def _dcg(relevance: Sequence[float]) -> float:
    return sum(one / math.log2(place + 1) for place, one in enumerate(relevance, 1))


def chance_sparse(numbers: Sequence[int]) -> dict[str, float]:
    """Return what a random order scores on average, given how many candidates each question has."""
    found = {"MRR": _mean([sum(1 / rank for rank in range(1, number + 1)) / number for number in numbers])}
    found |= {f"R@{k}": _mean([min(k, number) / number for number in numbers]) for k in RECALL_AT}
    return found | {"mean rank": _mean([(number + 1) / 2 for number in numbers])}


def chance_ndcg(relevance: Sequence[float]) -> float | None:
    """Return the mean NDCG of a random order; None where no candidate is relevant.

    On average every place holds the mean relevance.
    """
    relevant = sum(one != 0 for one in relevance)
    if not relevant:
        return None
    mean = sum(relevance) / len(relevance)
    return _dcg([mean] * relevant) / _dcg(sorted(relevance, reverse=True)[:relevant])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
