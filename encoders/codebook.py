"""Image codes: the encoder of DALL-E's discrete VAE, which names each patch of an image by one of its codes.

Targets of masked image modelling (Bao et al. 2022, BEiT, section 2.1; Singh et al. 2022, FLAVA, section 4.1). It is
never trained here.
Shapes: B images, P patches, C codes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.precision import full_precision
from encoders.sources import local_source
from encoders.types import Images
from vlp.config import Config

_STRIDE = 8
"""Pixels of a code's side: three poolings."""
_MARGIN = 0.1
"""Pixels come as 0.1 .. 0.9 (Ramesh et al. 2021, appendix A.3)."""


class CodebookConfig(Config):
    """The encoder of a discrete VAE; its weights come from a checkpoint."""

    codes: int = 8192
    """C, codes that there are."""
    width: int = 256
    """Channels of the first group; the last has eight times as many."""
    blocks: int = 2
    """Blocks of each of the four groups."""
    init: str | None = None
    """Folder or hub id of transformers' FlavaImageCodebook whose weights fill it (facebook/flava-image-codebook)."""

    def build(self) -> Codebook:
        """Build it with random weights."""
        return Codebook(self)


class _Block(nn.Module):
    """Four convolutions beside a skip connection."""

    def __init__(self, before: int, after: int, gain: float) -> None:
        super().__init__()
        inner = after // 4
        self.gain = gain
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(before, inner, 3, padding=1),
                nn.Conv2d(inner, inner, 3, padding=1),
                nn.Conv2d(inner, inner, 3, padding=1),
                nn.Conv2d(inner, after, 1),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        found = x
        for layer in self.layers:
            found = layer(F.relu(found))
        return self.skip(x) + self.gain * found


class Codebook(nn.Module):
    """Images -> the code of every patch."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        gain = 1 / (4 * config.blocks) ** 2
        self.input = nn.Conv2d(3, config.width, 7, padding=3)
        widths = [config.width * factor for factor in (1, 1, 2, 4, 8)]
        self.groups = nn.ModuleList(
            nn.Sequential(*(_Block(before if number == 0 else after, after, gain) for number in range(config.blocks)))
            for before, after in pairwise(widths)
        )
        self.output = nn.Conv2d(widths[-1], config.codes, 1)
        self.requires_grad_(False)

    def load_pretrained(self) -> None:
        """Fill the weights from ``config.init``, where the recipe names one.

        Raises:
            ValueError: it is of other sizes.
        """
        if self.config.init is None:
            return
        from transformers import FlavaImageCodebook

        theirs = FlavaImageCodebook.from_pretrained(local_source(self.config.init), dtype=torch.float32).state_dict()
        wanted = {name: theirs.get(_published(name)) for name in self.state_dict()}
        for name, own in self.state_dict().items():
            found = wanted[name]
            if found is None or found.shape != own.shape:
                raise ValueError(
                    f"model.codebook.init {self.config.init!r} has no {_published(name)} of shape {tuple(own.shape)}; "
                    "take its codes, width and blocks"
                )
        self.load_state_dict(wanted)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, 8 h, 8 w] float, already mapped to 0.1 .. 0.9 -> codes [B, h, w] int64."""
        # In half precision many patches would get another code than in float32.
        with full_precision(pixels):
            states = self.input(pixels.to(self.input.weight.dtype))
            for number, group in enumerate(self.groups):
                states = group(states)
                if number < len(self.groups) - 1:
                    states = F.max_pool2d(states, 2)
            return self.output(F.relu(states)).argmax(1)

    def codes(self, images: Images, grid: tuple[int, int]) -> Tensor:
        """Return the codes [B, P] of the patches of a ``grid`` of rows and columns.

        They are those of ``targets["codebook_pixels"]``, or else of the pixels themselves, scaled to the grid.

        Raises:
            ValueError: the pixels are already normalised, so that their values are not known.
        """
        pixels = images.targets.get("codebook_pixels")
        if pixels is None:
            if images.pixels.is_floating_point():
                raise ValueError("image codes need uint8 pixels, or targets codes or codebook_pixels; give one of them")
            size = (grid[0] * _STRIDE, grid[1] * _STRIDE)
            scaled = F.interpolate(images.pixels.float() / 255, size, mode="bicubic", antialias=True)
            pixels = scaled.clamp(0, 1) * (1 - 2 * _MARGIN) + _MARGIN
        return self(pixels).flatten(1)


def _published(name: str) -> str:
    """Name of a weight in transformers."""
    layer, kind = name.rsplit(".", 1)
    if layer in ("input", "output"):
        return f"blocks.{layer}.{kind}" if layer == "input" else f"blocks.output.conv.{kind}"
    _, group, block, _, *number = layer.split(".")
    path = f"res_path.path.conv_{int(number[0]) + 1}" if number else "id_path"
    return f"blocks.group_{int(group) + 1}.group.block_{int(block) + 1}.{path}.{kind}"
