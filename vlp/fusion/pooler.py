"""`pooled`: one vector per fused row, and how many images a row has.

Shapes: M rows, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from encoders.layers import initialise

PoolerKind = Literal["cls", "cls_both", "tanh", "relu", "concat", "product", "sum"]


class Pooler(nn.Module):
    """The first states of the two sides -> [M, width].

    ``cls``: text [CLS] as it is (ALBEF). ``cls_both``: both sides' as they are, image first (BEiT-3 on NLVR2).
    ``tanh``, ``relu``: a dense layer with that on it (BERT, ViLT; VOLTA). ``concat``: both sides' tanh vectors, text
    first (METER). ``product``, ``sum``: of the two sides' ReLU vectors (ViLBERT). A row without text takes its image's
    first state instead where only one side is read. ``width`` is that of the dense layers, else the text's.
    """

    def __init__(self, kind: PoolerKind, text_width: int, image_width: int, width: int | None = None) -> None:
        super().__init__()
        self.kind = kind
        if width is not None and kind in ("cls", "cls_both", "concat"):
            raise ValueError(f"model.fusion.pooled_width {width}: pooler {kind} has none of its own; leave it out")
        width = width or text_width
        self.width = text_width + image_width if kind in ("concat", "cls_both") else width
        if kind not in ("cls", "cls_both"):
            self.text = nn.Linear(text_width, width)
        if kind in ("concat", "product", "sum"):
            self.image = nn.Linear(image_width, image_width if kind == "concat" else width)
        initialise(self)

    @property
    def reads_image(self) -> bool:
        """Whether `pooled` depends on the image side's own states."""
        return self.kind not in ("cls", "tanh", "relu")

    def forward(self, image: Tensor | None, text: Tensor | None) -> Tensor:
        """First states [M, D] of each side -> [M, width]."""
        left, right = self.sides(image, text)
        if right is None:
            return left
        if self.kind == "cls_both":
            return torch.cat([right, left], 1)
        if self.kind == "concat":
            return torch.cat([left, right], 1)
        return left * right if self.kind == "product" else left + right

    def sides(self, image: Tensor | None, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """First states [M, D] of each side -> the vectors of text and, where it is read, image, before they meet."""
        activation = torch.tanh if self.kind in ("tanh", "concat") else torch.relu
        if not self.reads_image:
            first = text if text is not None else image
            assert first is not None
            return (first if self.kind == "cls" else activation(self.text(first))), None
        if image is None or text is None:
            raise ValueError(f"model.fusion.pooler {self.kind} needs both image and text; use cls or tanh")
        if self.kind == "cls_both":
            return text, image
        return activation(self.text(text)), activation(self.image(image))


def gather_images(states: Tensor, keep: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Lay each row's image tokens out: states [B, N, D] -> [M, N, D], or [M, I * N, D] for an index [M, I]."""
    return _lay_out(states, index), gather_keep(keep, index)


def gather_keep(keep: Tensor | None, index: Tensor | None) -> Tensor | None:
    """Lay each row's mask out: [B, N] -> [M, N], or [M, I * N] for an index [M, I]."""
    return None if keep is None else _lay_out(keep, index)


def _lay_out(x: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return x
    return x.index_select(0, index) if index.dim() == 1 else x[index].flatten(1, 2)


def add_order(states: Tensor, index: Tensor | None, order: nn.Parameter | None) -> Tensor:
    """Mark which of a row's I images each token [M, I * N, D] is of, by the learned ``order`` [I, D]."""
    if order is None or index is None or index.dim() == 1:
        return states
    return (states.unflatten(1, (index.shape[1], -1)) + order[None, : index.shape[1], None]).flatten(1, 2)
