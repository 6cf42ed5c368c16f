"""A toy configuration for the tests beside: unions, an optional part, a dict of objectives, plain fields."""

import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from vlp.config import Config, ConfigError


class Patch(Config):
    """A ViT."""

    kind: Literal["patch"] = "patch"
    depth: int = 12
    """Number of blocks."""
    width: int = 192


class Grid(Config):
    kind: Literal["grid"] = "grid"
    stride: Literal[16, 32] = 32
    width: int = 512


class Causal(Config):
    kind: Literal["causal"] = "causal"
    layers: int = 6
    attention: Literal["full", "causal"] = "causal"


class Single(Config):
    kind: Literal["none", "single"] = "single"


class Mlm(Config):
    kind: Literal["mlm"] = "mlm"
    weight: float = 1.0
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are masked, 15 % in BERT."""


class Mim(Config):
    kind: Literal["mim"] = "mim"
    ratio: float = 0.4


Vision = Annotated[Patch | Grid, Field(discriminator="kind")]
Objective = Annotated[Mlm | Mim, Field(discriminator="kind")]


class Model(Config):
    """Which parts the model has."""

    vision: Vision = Patch(depth=6)
    """The image side."""
    fusion: Single = Single()
    decoder: Causal | None = None
    """Writes captions."""


class Data(Config):
    train: str
    """Shards to train on."""
    size: int | tuple[int, ...] = 224
    flip: bool = True
    mix: dict[str, float] = Field(default_factory=dict)
    cache: Path | None = None


class Noise(Config):
    """Settings without kinds."""

    steps: int = 3
    size: float = 0.5


class Run(Config):
    model: Model = Model()
    noise: Noise | None = None
    data: Data
    objectives: dict[str, Objective] = Field(default={"mlm": Mlm()})
    """What is learned."""
    samples: int = 1000
    lr: float = 1e-3
    note: str = ""
    names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _enough(self) -> "Run":
        if self.samples < 0:
            raise ValueError("samples cannot be\nnegative; say how many")
        return self


DATA = {"data": {"train": "a.tar"}}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def problems(call: Any, *args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert all("\n" not in line for line in caught.value.problems)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems
