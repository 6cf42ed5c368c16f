"""Tasks on a pretrained model: data, official metric, prediction and finetuning. One file a task, one line here."""

from typing import Annotated, TypeAlias

from pydantic import Field

from downstream.captioning import CaptioningConfig
from downstream.dialogue import DialogueConfig
from downstream.linear_probe import LinearProbeConfig
from downstream.nlvr2 import Nlvr2Config
from downstream.referring import ReferringConfig
from downstream.retrieval import RetrievalConfig
from downstream.sentiment import SentimentConfig
from downstream.snli_ve import SnliVeConfig
from downstream.translation import TranslationConfig
from downstream.vcr import VcrConfig
from downstream.vqa import VqaConfig
from downstream.zero_shot import ZeroShotConfig

AnyTask: TypeAlias = Annotated[
    VqaConfig
    | CaptioningConfig
    | RetrievalConfig
    | ZeroShotConfig
    | LinearProbeConfig
    | Nlvr2Config
    | SnliVeConfig
    | ReferringConfig
    | DialogueConfig
    | TranslationConfig
    | VcrConfig
    | SentimentConfig,
    Field(discriminator="kind"),
]
