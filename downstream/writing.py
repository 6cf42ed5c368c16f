"""What tasks share whose answer is written: a decoder that reads an image or a fused text, and its objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from encoders import TextConfig
from encoders.text import BesideConfig
from objectives import LmConfig, ObjectiveConfig
from objectives.lm import Lm
from vlp.data.asking import ANSWER
from vlp.data.batch import Example
from vlp.data.fetch import pair_example
from vlp.data.reader import Sample
from vlp.decoder import DecoderConfig
from vlp.model import Model, ModelConfig


def decoder_beside(model: ModelConfig) -> DecoderConfig:
    """Return a new decoder of the text encoder's sizes, as deep as the fusion where that is a stack of the same width.

    Raises:
        ValueError: the text encoder is not of kind text, whose vocabulary and embeddings a decoder takes.
    """
    text, fusion = model.text, model.fusion
    if not isinstance(text, TextConfig):
        raise ValueError(
            f"a decoder needs model.text.kind text, but the checkpoint has {text.kind}; pretrain with kind text"
        )
    if isinstance(fusion, BesideConfig) and fusion.width == text.width:
        return DecoderConfig().beside(fusion.stack)
    return DecoderConfig().beside(text)


def writing(
    model: ModelConfig, objectives: Mapping[str, ObjectiveConfig], view: str
) -> tuple[ModelConfig, dict[str, ObjectiveConfig]]:
    """Return a model with a decoder that reads fused texts, and the objectives with one that trains it.

    Args:
        model: its own decoder stays, if it has one.
        objectives: what the user stated, the settings of ``lm`` among them.
        view: the text view that is written.
    """
    stated = objectives.get("lm", LmConfig())
    lm = stated.model_copy(update={"memory": "fused", "view": view})
    decoder = (model.decoder or decoder_beside(model)).model_copy(update={"memory": "text"})
    return model.model_copy(update={"decoder": decoder}), {**objectives, "lm": lm}


def answers_instructions(model: ModelConfig) -> bool:
    """Whether all that a model writes are answers to what its encoder is asked beside the image (OFA).

    Its decoder reads the places of image and text apart from their content, so that it can read nothing but both.
    """
    return isinstance(model.decoder, DecoderConfig) and model.decoder.untied is not None


def instructed_lm(known: ObjectiveConfig | None, stated: ObjectiveConfig | None) -> LmConfig:
    """Return the objective that trains such a model: the checkpoint's, with what is stated unlike the defaults."""
    own, plain = known if isinstance(known, LmConfig) else LmConfig(), LmConfig()
    changes: dict[str, Any] = {"memory": "fused", "view": ANSWER}
    if isinstance(stated, LmConfig):
        given = {name: getattr(stated, name) for name in LmConfig.model_fields}
        changes = {n: value for n, value in given.items() if value != getattr(plain, n)} | changes
    return own.model_copy(update=changes)


@dataclass(frozen=True)
class Answered:
    """Sample -> its image, what is asked of it, and one of its captions to be written, drawn anew each time."""

    ask: str

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Example:
        pair = pair_example(sample, generator)
        # Texts begin with a space, as in OFA's training.
        return replace(pair, text=self.ask, other_texts={ANSWER: f" {pair.text}"})


def fused_writer(model: Model) -> str | None:
    """Return the name of the objective whose head writes from fused texts; None where the model cannot."""
    if model.decoder is None:
        return None
    return next(
        (n for n, one in model.objectives.items() if isinstance(one, Lm) and one.config.memory == "fused"), None
    )
