"""Tasks on a pretrained model: data, official metric, prediction and finetuning. One file a task, one line here."""

from typing import Annotated, TypeAlias

from pydantic import Field

from downstream.captioning import CaptioningConfig
from downstream.retrieval import RetrievalConfig
from downstream.vqa import VqaConfig

AnyTask: TypeAlias = Annotated[VqaConfig | CaptioningConfig | RetrievalConfig, Field(discriminator="kind")]
