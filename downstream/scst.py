"""Self-critical sequence training (SCST): a captioner is rewarded for the CIDEr-D of captions that it draws itself
(Rennie et al. 2017, arXiv:1612.00563, equations 5 to 8).

Of each image n captions w_i are drawn from the model's own distribution p, word by word. With r_i the CIDEr-D of w_i
against the image's training captions (document frequencies those of all training images) and b_i a baseline that does
not hang on w_i, the gradient of the expected reward is that of

    L = - 1/B * sum over images of 1/n * sum over i of (r_i - b_i) * log p(w_i)

where log p(w_i) sums over the words drawn, end included. The baseline is the reward of the greedy caption (the
paper's), or the mean of the image's other draws, sum over j != i of r_j / (n - 1), for which nothing more has to be
written (Luo 2020, arXiv:2003.09971).

L is objective lm with ``mean: texts``: a micro-batch's captions are replaced by the draws, weighed by (r_i - b_i) / n.
Draws are made without dropout, and are a pure function of weights, run seed, step and micro-batch.
Shapes: B images, n draws of each, L text length.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from downstream.metrics.captioning import cider_d, document_frequencies
from downstream.metrics.tokenize import tokenize
from downstream.task import evaluating, image_key
from downstream.writing import stated_lm
from encoders.types import Batch, Texts, Tokens
from objectives import LmConfig, ObjectiveConfig, Seq2SeqMlmConfig
from objectives.base import Draw, Encode
from objectives.lm import Lm
from vlp.config import Config, build
from vlp.data.batch import Example, stable_hash
from vlp.data.fetch import pair_example
from vlp.data.loader import DataConfig
from vlp.data.reader import Sample
from vlp.data.tokenizer import Tokenizer
from vlp.generate import GenerationConfig, generate_text, room_of
from vlp.model import Model

if TYPE_CHECKING:
    from vlp.run import RunConfig

logger = logging.getLogger(__name__)

R = TypeVar("R", bound="RunConfig")


class ScstConfig(Config):
    """How captions are drawn and rewarded."""

    samples: int = Field(5, ge=1)
    """Captions drawn of each image."""
    baseline: Literal["others", "greedy"] = "others"
    """What a draw's reward is held against: the mean of the image's other draws, or that of the greedy caption."""
    max_length: int = Field(20, ge=2)
    """Ids at which a caption stops, first and last included."""

    @model_validator(mode="after")
    def _has_others(self) -> ScstConfig:
        if self.samples == 1 and self.baseline == "others":
            raise ValueError("samples 1 has no others to be held against; set baseline greedy, or more samples")
        return self


def settle_scst(run: R, pretrained: Mapping[str, ObjectiveConfig]) -> R:
    """Return the run with objective lm as SCST wants it.

    Raises:
        ValueError: other settings say what cannot be trained so.
    """
    known = pretrained.get("lm")
    memory = "beside" if run.model.decoder is None else "image"  # its fusion writes (GIT), or its decoder
    if not (isinstance(known, LmConfig) and known.memory == memory):
        masks = any(isinstance(one, Seq2SeqMlmConfig) for one in pretrained.values())
        by_masks = "one that writes by masks reads each word in a pass of its own; " if masks else ""
        how = " and with --objectives.lm '{}'" if masks else ""
        remedy = f"first finetune captioning without task.scst{how}"
        if run.model.answers_instructions:
            remedy = "one that answers instructions (OFA) cannot be trained so; leave task.scst out"
        raise ValueError(
            "task.scst improves on captions that a decoder over images or a fusion writes left to right (objective "
            f"lm), and the checkpoint has no such; {by_masks}{remedy}"
        )
    stated = stated_lm(run.objectives, pretrained, memory, known.view)
    given = {name: value for name in ("label_smoothing", "distill") if (value := getattr(stated, name))}
    for name, value in given.items():
        logger.info("objectives.lm.%s %s is for given captions; draws are trained without it (task.scst)", name, value)
    if run.data.sources:
        raise ValueError(
            "data.sources with task.scst: draws are held against the captions of data.train; leave them out"
        )
    if run.data.texts_per_image != 1:
        number = run.data.texts_per_image
        raise ValueError(f"data.texts_per_image {number} with task.scst: draws come in place of texts; set it to 1")
    settled = {"mean": "texts"} | dict.fromkeys(given, 0.0)
    return run.model_copy(update={"objectives": run.objectives | {"lm": stated.model_copy(update=settled)}})


def scored_id(sample: Sample, data: DataConfig) -> int:
    """Return the id by which an image's references are found."""
    return stable_hash(image_key(sample, data))


@dataclass(frozen=True)
class ScoredExample:
    """Sample -> example whose image is known by :func:`scored_id`."""

    data: DataConfig

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Example:
        return replace(pair_example(sample, generator), image_id=scored_id(sample, self.data))


@dataclass
class Scst:
    """Puts weighed draws in the place of a micro-batch's captions."""

    config: ScstConfig
    tokenizer: Tokenizer
    writer: str
    """Name of the objective whose head writes."""
    references: Mapping[int, Sequence[str]]
    """Training captions of each image, by :func:`scored_id`."""
    known: dict[int, list[list[str]]] = field(init=False)
    """They, tokenised."""
    df: tuple[Mapping[tuple[str, ...], float], int] = field(init=False)

    def __post_init__(self) -> None:
        self.known = {image: [tokenize(one) for one in texts] for image, texts in self.references.items()}
        self.df = document_frequencies(list(self.known.values()))

    def __call__(self, model: Model, batch: Batch, draw: Draw) -> tuple[Batch, dict[str, Tensor]]:
        """Return the batch with n draws of each image, as texts [B * n, L] of the writer's view, and what is logged:
        mean reward and baseline.
        """
        assert batch.image_id is not None
        images, number = batch.image_id.tolist(), self.config.samples
        # The draws of each micro-batch are its own; those of its words are numbered by generate itself.
        seed = int(draw.sample(f"scst/{draw.step}", draw.group).integers(2**31))
        with evaluating(model):
            memory = model.run([Encode("image")], batch)[Encode("image")]
            rows = torch.arange(len(images), device=model.device)
            how = {"max_length": min(self.config.max_length, room_of(model))}
            every = rows.repeat_interleave(number)
            drawn = self._write(model, memory, how | {"method": "nucleus", "top_p": 1.0, "seed": seed}, every)
            known = [image for image in images for _ in range(number)]
            rewards = self.rewards(drawn, known).reshape(-1, number)
            if self.config.baseline == "greedy":
                greedy = self._write(model, memory, how | {"method": "greedy"}, rows)
                baseline = self.rewards(greedy, images)[:, None]
            else:
                baseline = (rewards.sum(1, keepdim=True) - rewards) / (number - 1)
        weight = ((rewards - baseline) / number).flatten().to(model.device)
        objective = model.objectives[self.writer]
        assert isinstance(objective, Lm)
        texts = self._texts(drawn, objective.config.prompt, every, weight)
        told = {f"{self.writer}/reward": rewards.mean(), f"{self.writer}/baseline": baseline.mean()}
        return replace(batch, texts={**batch.texts, objective.config.view: texts}), told

    def _write(self, model: Model, memory: Tokens, how: Mapping[str, object], rows: Tensor) -> list[list[int]]:
        config = build(GenerationConfig, dict(how))
        return generate_text(model, memory, self.tokenizer.vocabulary, config, objective=self.writer, rows=rows)[0]

    def rewards(self, ids: Sequence[Sequence[int]], images: Sequence[int]) -> Tensor:
        """Return the CIDEr-D, 0..10, of each caption against the references of its image, [captions] float32."""
        captions = [tokenize(self.tokenizer.decode(list(one))) for one in ids]
        return torch.tensor(cider_d(captions, [self.known[image] for image in images], self.df)[1])

    def _texts(self, drawn: Sequence[Sequence[int]], prompt: tuple[int, ...], owner: Tensor, weight: Tensor) -> Texts:
        """Draws as the decoder reads them, each word the label of the one before."""
        words = self.tokenizer.vocabulary
        full = [[one[0], *prompt, *one[1:]] for one in drawn]
        length = max(map(len, full))
        ids = torch.tensor([[*one, *[words.pad] * (length - len(one))] for one in full])
        skipped = len(prompt)
        labels = torch.tensor(
            [[*[-100] * skipped, *one[skipped + 1 :], *[-100] * (length - len(one) + 1)] for one in full]
        )
        keep = torch.arange(length) < torch.tensor([len(one) for one in full])[:, None]
        device = owner.device
        more = {"labels": labels.to(device), "owner": owner, "weight": weight}
        return Texts(ids.to(device), keep.to(device), attention="causal", **more)
