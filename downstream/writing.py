"""What tasks share whose answer is written: a decoder that reads an image or a fused text, and its objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    model: ModelConfig, objectives: Mapping[str, ObjectiveConfig], pretrained: Mapping[str, ObjectiveConfig], view: str
) -> tuple[ModelConfig, dict[str, ObjectiveConfig]]:
    """Return a model with a decoder that reads fused texts, and the objectives with one that trains it.

    Args:
        model: its own decoder stays, if it has one.
        objectives: what the user stated, the settings of ``lm`` among them.
        pretrained: the checkpoint's, whose own ``lm`` stays where it reads fused texts.
        view: the text view that is written.
    """
    lm = stated_lm(objectives, pretrained, "fused", view)
    decoder = (model.decoder or decoder_beside(model)).model_copy(update={"memory": "text"})
    return model.model_copy(update={"decoder": decoder}), {**objectives, "lm": lm}


def stated_lm(
    objectives: Mapping[str, ObjectiveConfig], pretrained: Mapping[str, ObjectiveConfig], memory: str, view: str
) -> LmConfig:
    """Return ``lm`` for this memory and view as the user states it, over the checkpoint's own of the same memory.

    Else a word of a recipe, as label_smoothing, would put the default head in place of the checkpoint's.
    """
    known, stated = pretrained.get("lm"), objectives.get("lm", LmConfig())
    assert isinstance(stated, LmConfig)
    lm = stated.over(known) if isinstance(known, LmConfig) and known.memory == memory else stated
    return lm.model_copy(update={"memory": memory, "view": view})


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
