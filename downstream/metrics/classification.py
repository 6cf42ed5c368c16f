"""Classification: top-k accuracy and the mean over classes of their accuracies.

Top-k is the share of images whose class is among the k best. "Per-class mean" is the mean of every class's own top-1
accuracy (recall), what the benchmarks of unbalanced classes print (Radford et al. 2021, CLIP, table 9: Caltech-101,
FGVC-Aircraft, Oxford Pets, Flowers-102).
Shapes: N images, C classes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TOP = (1, 5)


def class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of each image's class, 1 = best, of equal scores the class with the smaller number first.

    Args:
        scores: [N, C], larger = better.
        labels: [N] int64.

    Returns:
        [N] int64.
    """
    own = scores.gather(1, labels[:, None])
    number = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (number < labels[:, None]))
    return before.sum(1) + 1


def classification_metrics(ranks: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Return "top-1", "top-5" and "per-class mean" of the rank and number of each image's class; in 0..1.

    Classes without an image do not count.

    Raises:
        ValueError: there are no images.
    """
    if not ranks:
        raise ValueError("classification: no images; give at least one")
    found = {f"top-{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in TOP}
    return found | {"per-class mean": _class_mean(ranks, labels)}


def _class_mean(ranks: Sequence[int], labels: Sequence[int]) -> float:
    right: dict[int, list[bool]] = {}
    for rank, label in zip(ranks, labels, strict=True):
        right.setdefault(label, []).append(rank == 1)
    return sum(sum(one) / len(one) for one in right.values()) / len(right)


def chance_metrics(classes: int) -> dict[str, float]:
    """Return what a random order of the classes scores on average."""
    return {f"top-{k}": min(k, classes) / classes for k in TOP} | {"per-class mean": 1 / classes}


def prior_metrics(counts: Mapping[int, int], labels: Sequence[int], classes: int) -> dict[str, float]:
    """Return what the same order of classes scores for every image: by how often the training data have them.

    Args:
        counts: training images of each class; classes without any come last.
        labels: of the images.
        classes: C.
    """
    order = sorted(range(classes), key=lambda number: (-counts.get(number, 0), number))
    place = {number: rank for rank, number in enumerate(order, 1)}
    return classification_metrics([place[label] for label in labels], labels)
