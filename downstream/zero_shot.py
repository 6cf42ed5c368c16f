"""Zero-shot classification: the class whose prompts are nearest to the image (Radford et al. 2021, CLIP, section 3.1).

A class is the mean of its prompts' unit-norm embeddings, made unit-norm again (an ensemble of templates). Nothing is
trained. Data: images with a label, see ``downstream.classification``.
Shapes: n images, C classes, P prompts of a class, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from downstream.classification import (
    Classes,
    ClassificationConfig,
    LabelSurvey,
    Score,
    classes_of,
    read_classes,
    survey_labels,
)
from downstream.task import evaluating
from encoders.types import Batch
from objectives.base import Embed, ViewText
from vlp.data.batch import pad_texts
from vlp.data.reader import Reader
from vlp.model import Model

if TYPE_CHECKING:
    from vlp.run import Parts

TEMPLATES = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a drawing of a {}.",
    "a picture of the {}.",
    "an image of one {}.",
    "{}",
)
"""Generic prompts; those that a paper used for its data are a file of one's own (``task.templates``)."""
PLACES = ("{}", "{c}")
"""What stands for the class name: ours, and that of the published lists of CLIP's prompts."""


class ZeroShotConfig(ClassificationConfig):
    """Classify images by class names alone."""

    kind: Literal["zero_shot"] = "zero_shot"
    templates: str | tuple[str, ...] = TEMPLATES
    """Prompts, `{}` standing for the class name: themselves, or a file with one a line."""

    def lacks(self, model: Model) -> str | None:
        """It takes a common space of images and texts."""
        return None if model.space() is not None else "a contrastive embedding (objective itc)"

    def prompts(self) -> tuple[str, ...]:
        """Return the templates.

        Raises:
            ValueError: the file cannot be read, there are none, or one has no place for the name.
        """
        given = self.templates
        if isinstance(given, str) and not _has_place(given):
            try:
                given = tuple(line.strip() for line in Path(given).read_text(encoding="utf-8-sig").splitlines())
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"task.templates {given}: cannot be read ({error}); give a UTF-8 file, or prompts with {{}}"
                ) from error
        found = tuple(one for one in ((given,) if isinstance(given, str) else given) if one)
        if not found:
            raise ValueError("task.templates: there are none; give at least one prompt with {}")
        if wrong := [one for one in found if not _has_place(one)]:
            raise ValueError(f"task.templates: {wrong[0]!r} has no place for the class name; write {{}} there")
        return found

    def scorer(self, parts: Parts, reader: Reader, survey: LabelSurvey | None) -> tuple[Classes, Score, list[str]]:
        """Return the classes, cosines times the model's scale, and how many prompts there are.

        Raises:
            ValueError: the model has no contrastive space, or the prompts or classes cannot be read.
        """
        space = parts.model.space()
        if space is None:
            raise ValueError(f"task zero_shot: this model lacks {self.lacks(parts.model)}; pretrain it with one")
        if self.classes is not None:
            classes = read_classes(self.classes)
        else:
            classes = classes_of(list(survey_labels(reader, parts.run.data, self.label, "val").counts))
        templates = self.prompts()
        weights = class_embeddings(parts, classes.names, templates, self.batch)
        scale = space.logit_scale.detach().float().exp()

        def score(batch: Batch) -> Tensor:
            images = parts.model.run([Embed("image")], Batch(images=batch.images))[Embed("image")].float()
            return (scale * F.normalize(images, dim=-1) @ weights.T).cpu()

        return classes, score, [f"{len(templates)} prompts a class, averaged: {templates[0]!r}, ..."]


def _has_place(template: str) -> bool:
    return any(place in template for place in PLACES)


def class_embeddings(parts: Parts, names: Sequence[str], templates: Sequence[str], batch: int) -> Tensor:
    """Return each class's unit-norm embedding, [C, E] float32 on the model's device.

    Args:
        parts: a model with a contrastive space.
        names: of the classes.
        templates: prompts with a place for the name.
        batch: texts run at once.
    """
    texts = [fill(template, name) for name in names for template in templates]
    words, data, found = parts.tokenizer, parts.run.data, []
    for first in range(0, len(texts), batch):
        ids = [ViewText(words.encode(text, data.max_length)[0]) for text in texts[first : first + batch]]
        view = pad_texts(ids, "full", words.vocabulary.pad, data.max_length)
        with evaluating(parts.model):
            given = Batch(texts={"clean": view}).to(parts.model.device)
            found.append(F.normalize(parts.model.run([Embed("text")], given)[Embed("text")].float(), dim=-1))
    each = torch.cat(found).unflatten(0, (len(names), len(templates)))  # [C, P, E]
    return F.normalize(each.mean(1), dim=-1)


def fill(template: str, name: str) -> str:
    """Return a prompt with the class name in its place."""
    place = next(place for place in PLACES if place in template)
    return template.replace(place, name)
