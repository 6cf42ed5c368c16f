"""`hf_vision`: any transformers vision model as it is, pixels -> tokens.

Shapes: B images, h x w cells of a feature map, N tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from encoders.hf_text import config_of, model_of
from encoders.sources import local_source
from encoders.types import Images, Tokens
from vlp.config import Config


class HfVisionConfig(Config):
    """A transformers vision model by folder or hub id."""

    kind: Literal["hf_vision"] = "hf_vision"
    model: str = ""
    """Folder or hub id with a config.json, or `package:NAME/path`."""
    pretrained: bool = True
    """Start from its weights (else from its sizes only)."""
    architecture: dict[str, Any] = Field(default_factory=dict)
    """The values of its config.json; filled when the model is built, so that a checkpoint needs no other folder."""
    image_size: int = 224
    """Side of the square input in pixels."""
    width: int | None = None
    """Width of its tokens; none = the hidden size that its config names."""
    freeze_norm: bool = True
    """Batch norms keep their statistics and weights: at a fusion's batch sizes they would drift."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Channel means of pixels in 0..1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Channel standard deviations."""

    def build(self) -> HfVisionEncoder:
        """Build the encoder with random weights."""
        return HfVisionEncoder(self)


class HfVisionEncoder(nn.Module):
    """Images -> tokens of a transformers model: its sequence, or one token a cell of its feature map.

    ``pooled`` is the model's own, or the mean of the tokens where it has none.

    Raises:
        ValueError: the model cannot be found.
    """

    mean: Tensor
    std: Tensor
    bare = False

    def __init__(self, config: HfVisionConfig) -> None:
        from transformers import AutoConfig

        super().__init__()
        if config.architecture:
            theirs = config_of(config.architecture)
        else:
            try:
                theirs = AutoConfig.from_pretrained(local_source(config.model))
            except OSError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"model.vision.model: no transformers config at {config.model!r}: {reason}") from error
        theirs = getattr(theirs, "vision_config", theirs)
        self.config = config.model_copy(
            update={"architecture": theirs.to_diff_dict() | {"model_type": theirs.model_type}}
        )
        self.model: Any = model_of(theirs)
        width = config.width or getattr(theirs, "hidden_size", None)
        if not isinstance(width, int):
            raise ValueError(f"model.vision.width: the config of a {theirs.model_type} names no hidden size; state it")
        self.width = width
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self._freeze_norm()

    def load_pretrained(self) -> None:
        """Fill the weights from the folder or hub id, where the recipe asks for them."""
        if self.config.pretrained:
            found = type(self.model).from_pretrained(local_source(self.config.model), dtype=torch.float32)
            self.model.load_state_dict(found.state_dict())

    def train(self, mode: bool = True) -> HfVisionEncoder:
        """As any module; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        self._freeze_norm()
        return self

    def _freeze_norm(self) -> None:
        for part in self.model.modules() if self.config.freeze_norm else ():
            if isinstance(part, nn.BatchNorm2d):
                part.eval().requires_grad_(False)

    def forward(self, images: Images, layers: bool = False) -> Tokens:
        """Images -> Tokens, states [B, N, D]; with ``layers`` also the hidden states that the model gives."""
        pixels = images.pixels
        if not pixels.is_floating_point():
            pixels = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        found = self.model(pixel_values=pixels, output_hidden_states=layers)
        states = _tokens(found.last_hidden_state)
        pooled = getattr(found, "pooler_output", None)
        every = tuple(_tokens(one) for one in found.hidden_states) if layers else None
        return Tokens(states, None, states.mean(1) if pooled is None else pooled.flatten(1), every)


def _tokens(states: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, h * w, D]; a sequence stays."""
    return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states
