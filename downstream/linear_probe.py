"""Linear probe: logistic regression on the frozen features of an image (Radford et al. 2021, CLIP, section 3.2).

The penalty is chosen on a held-out part of the training images, then all of them are fitted. Their features are held in
memory, in float64 while they are fitted: 8 GiB for ImageNet's 1.3 million images of 768 features.
Data: images with a label, see ``downstream.classification``; `data.train` is what is fitted, also for predictions.
Shapes: n images, D features, C classes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from downstream.classification import (
    Classes,
    ClassificationConfig,
    LabelSurvey,
    Score,
    classes_of,
    need_label,
    read_classes,
    survey_labels,
)
from downstream.task import batches, evaluating, gather, gather_bad, my_share, no_labels, seen_samples
from encoders.types import Batch, Tokens
from objectives.base import Embed, Encode
from vlp.data.batch import stable_hash
from vlp.data.loader import DataConfig
from vlp.data.reader import Reader
from vlp.data.records import place_of
from vlp.model import Model
from vlp.run import open_training_data

if TYPE_CHECKING:
    from vlp.run import Parts

logger = logging.getLogger(__name__)

PENALTIES = tuple(10.0**power for power in range(-6, 3))


@dataclass(frozen=True)
class Fitted:
    """A fitted logistic regression over standardised features."""

    weight: Tensor
    """[C, D]."""
    bias: Tensor
    """[C]."""
    mean: Tensor
    """[D] of the training features."""
    deviation: Tensor
    """[D] of the training features."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features [n, D] -> class scores [n, C]."""
        return (features - self.mean) / self.deviation @ self.weight.T + self.bias


def fit_logistic(features: Tensor, labels: Tensor, classes: int, penalty: float, most: int = 1000) -> Fitted:
    """Fit multinomial logistic regression: mean cross-entropy + penalty / 2 x the sum of squared weights.

    Features are standardised, the bias is free. With N images scikit-learn's `C` is 1 / (penalty x N).

    Args:
        features: [n, D].
        labels: [n] int64.
        classes: C.
        penalty: of the squared weights.
        most: steps of L-BFGS.
    """
    features = features.double()
    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = torch.where(deviation > 1e-8 * deviation.max().clamp(min=1e-30), deviation, 1.0)
    inputs = (features - mean) / deviation
    weight = inputs.new_zeros(classes, inputs.shape[1], requires_grad=True)
    bias = inputs.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=most, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return Fitted(*(one.detach().float() for one in (weight, bias, mean, deviation)))


def hold_out(images: list[str], share: float) -> Tensor:
    """Return which samples are held out, [n] bool: all of a share of the images, the same ones each time.

    At least one image is held out, and one is not.

    Raises:
        ValueError: there is one image only.
    """
    names = sorted(set(images), key=lambda name: (stable_hash(name), name))
    if len(names) < 2:
        raise ValueError("data.train: linear_probe chooses its penalty on held-out images, but there is one; give more")
    chosen = set(names[: min(max(round(share * len(names)), 1), len(names) - 1)])
    return torch.tensor([image in chosen for image in images])


class LinearProbeConfig(ClassificationConfig):
    """Classify images by logistic regression on frozen features."""

    kind: Literal["linear_probe"] = "linear_probe"
    features: Literal["pooled", "patches", "embed"] = "pooled"
    """The image tower's pooled vector (CLIP), the mean of its patches (MAE), or the contrastive embedding."""
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of the training images that the penalty is chosen on."""
    penalties: tuple[float, ...] = Field(PENALTIES, min_length=1)
    """To choose from: factors of half the squared weights beside the mean loss."""
    steps: int = Field(1000, ge=1)
    """Most steps of L-BFGS for each fit."""

    def lacks(self, model: Model) -> str | None:
        """Any model has features; the embedding takes a contrastive space."""
        if self.features == "embed" and model.space() is None:
            return "a contrastive embedding (objective itc)"
        return None

    def scorer(self, parts: Parts, reader: Reader, survey: LabelSurvey | None) -> tuple[Classes, Score, list[str]]:
        """Fit the training data; return the classes, their scores, and the penalty.

        Raises:
            ValueError: no training data are named, or the model lacks the features.
        """
        data = parts.run.data
        if (missing := self.lacks(parts.model)) is not None:
            raise ValueError(f"task linear_probe: this model lacks {missing}; take task.features pooled")
        if survey is None:
            if data.train is None:
                raise ValueError("task linear_probe fits labelled training data; name them with --data.train")
            survey = survey_labels(open_training_data(data), data, self.label)
        classes = classes_of(list(survey.counts)) if self.classes is None else read_classes(self.classes)
        features, labels, images = self._training(parts, survey.reader, data, classes)
        held = hold_out(images, self.held_out)
        penalty, shares = self._choose(features, labels, held, len(classes))
        fitted = fit_logistic(features, labels, len(classes), penalty, self.steps)
        logger.info("penalty %g, held-out accuracy %.3f", penalty, shares[penalty])
        notes = [
            f"fitted on {len(labels)} images, {features.shape[1]} standardised features ({self.features})",
            f"penalty {penalty:g}: {shares[penalty]:.3f} of the {int(held.sum())} held-out training images are right; "
            f"tried {', '.join(f'{one:g}: {share:.3f}' for one, share in shares.items())}",
        ]
        return classes, lambda batch: fitted(self._features(parts.model, batch)), notes

    def _choose(self, features: Tensor, labels: Tensor, held: Tensor, classes: int) -> tuple[float, dict[float, float]]:
        """The penalty with the best held-out accuracy, of equals the one of least loss; and each one's accuracy."""
        found: dict[float, float] = {}
        losses: dict[float, float] = {}
        for penalty in self.penalties:
            scores = fit_logistic(features[~held], labels[~held], classes, penalty, self.steps)(features[held])
            found[penalty] = (scores.argmax(1) == labels[held]).float().mean().item()
            losses[penalty] = F.cross_entropy(scores, labels[held]).item()
        return max(found, key=lambda penalty: (found[penalty], -losses[penalty])), found

    def _training(
        self, parts: Parts, reader: Reader, data: DataConfig, classes: Classes
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Features [n, D], labels [n] and image names of the training data, over all ranks."""
        bad: dict[str, str] = {}
        mine = range(len(reader))[my_share(len(reader))]
        samples = self._known(seen_samples(parts, reader, bad, indices=mine, texts=False), classes, bad)
        parts_of_features, found = [], []
        for group, batch in batches(parts, samples, self.batch):
            with evaluating(parts.model):
                parts_of_features.append(self._features(parts.model, batch))
            for one in group:
                number = classes.of(one.sample.key, need_label(one.sample, self.label))
                found.append((number, one.image))
        found, bad = gather(found), gather_bad(bad)
        for key, reason in bad.items():
            logger.warning("%s%s: not fitted, %s", key, place_of(key), reason)
        if not found:
            raise ValueError(no_labels("train", len(reader), bad))
        features = torch.cat(gather(parts_of_features))
        return features, torch.tensor([number for number, _ in found]), [image for _, image in found]

    def _features(self, model: Model, batch: Batch) -> Tensor:
        """[n, D] float32 on the CPU."""
        wanted: Embed | Encode = Embed("image") if self.features == "embed" else Encode("image")
        found = model.run([wanted], Batch(images=batch.images))[wanted]
        if isinstance(found, Tokens):
            found = found.pooled if self.features == "pooled" else _mean_patch(model, found)
        return found.float().cpu()


def _mean_patch(model: Model, tokens: Tokens) -> Tensor:
    """Mean of the tokens that are no prefix, [n, D]."""
    prefix = getattr(model.vision, "num_prefix", 0)
    states = tokens.states[:, prefix:].float()
    keep = torch.ones_like(states[..., 0]) if tokens.keep is None else tokens.keep[:, prefix:].to(states.dtype)
    return (states * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
