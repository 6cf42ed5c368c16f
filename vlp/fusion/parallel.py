"""`images: parallel`: a text queries its two images at once, each through a cross-attention of its own (BLIP's NLVR2).

Shapes: B images, M rows, N image tokens, L text length, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from encoders.layers import Attention, KeyValues
from vlp.fusion.each import NUM_IMAGES


@dataclass
class TwinKeyValues:
    """Keys and values of the same images by the attention over first and by that over second images."""

    twins: tuple[KeyValues, ...]

    def rows(self, index: Tensor | None) -> TwinKeyValues:
        """Return the keys of each row's images: ``index`` [M, 2].

        Raises:
            ValueError: rows have another number of images.
        """
        number = 1 if index is None or index.dim() == 1 else index.shape[1]
        if index is None or number != NUM_IMAGES:
            raise ValueError(
                f"model.fusion.images parallel gives a text {NUM_IMAGES} images, here it has {number}; set it to one"
            )
        return TwinKeyValues(tuple(one.rows(index[:, place]) for place, one in enumerate(self.twins)))


class TwinAttention(nn.Module):
    """Two cross-attentions, whose outputs are averaged, or merged by a linear layer.

    Stands where a block has its :class:`encoders.layers.Attention`.

    Args:
        width: D.
        heads: of each.
        kv_width: width of the image states.
        dropout: on attention weights.
        merge: a linear layer on both outputs, else their mean.
    """

    def __init__(self, width: int, heads: int, *, kv_width: int, dropout: float = 0.0, merge: bool = False) -> None:
        super().__init__()
        self.twins = nn.ModuleList(
            Attention(width, heads, kv_width=kv_width, dropout=dropout) for _ in range(NUM_IMAGES)
        )
        self.merge = nn.Linear(NUM_IMAGES * width, width) if merge else None

    def project(self, memory: Tensor) -> TwinKeyValues:
        """[B, N, kv_width] -> keys and values of every image, by each of the two."""
        return TwinKeyValues(tuple(twin.project(memory) for twin in self.twins))  # type: ignore[operator]

    def forward(self, x: Tensor, memory: TwinKeyValues, mask: Tensor | None = None) -> Tensor:
        """[M, L, D] queries on each row's two images -> [M, L, D]; ``mask`` lays the images behind each other."""
        masks = (None,) * NUM_IMAGES if mask is None else mask.chunk(NUM_IMAGES, -1)
        read = [twin(x, keys, seen) for twin, keys, seen in zip(self.twins, memory.twins, masks, strict=True)]
        return torch.stack(read).mean(0) if self.merge is None else self.merge(torch.cat(read, -1))
