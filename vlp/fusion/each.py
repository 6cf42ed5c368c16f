"""`images: each`: a text is fused with each of its images by itself, and `pooled` lays the results side by side.

Two passes of one pair model (NLVR2 in ViLT, METER, VLMo, BEiT-3 and UNITER's "paired").
Shapes: B images, M rows, I images per row, N image tokens, L text length, D width.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from encoders.types import AttentionKind, Tokens
from objectives.base import Fused
from vlp.fusion.pooler import Pooler
from vlp.fusion.rows import take

ImagesPerText: TypeAlias = Literal["one", "pair", "each"]
"""one; pair: two laid behind each other in one sequence; each: two, each fused with the text by itself."""

NUM_IMAGES = 2


class FusePairs(Protocol):
    """A fusion's own pass over pairs of one image and one text."""

    def __call__(
        self, text: Tokens, index: Tensor, attention: AttentionKind, prefix: Tensor | None, number: Tensor
    ) -> Fused:
        """Texts [M, L, D] with the images ``index`` [M], of which each is its text's image ``number`` [M]."""
        ...


def fuse_each(
    fuse: FusePairs, text: Tokens, index: Tensor | None, attention: AttentionKind, prefix: Tensor | None
) -> Fused:
    """Run a fusion on M * I pairs of one image and one text -> Fused of M rows.

    Args:
        fuse: over pairs.
        text: [M, L, D].
        index: [M, I].
        attention: of the text.
        prefix: [M] or None.

    Returns:
        Fused with pooled [M, I * W] and the states of the I passes behind each other, [M, I * N, D] and [M, I * L, D].

    Raises:
        ValueError: rows have another number of images.
    """
    number = 1 if index is None or index.dim() == 1 else index.shape[1]
    if index is None or number != NUM_IMAGES:
        raise ValueError(
            f"model.fusion.images each fuses a text with {NUM_IMAGES} images, here it has {number}; set it to one"
        )
    rows = torch.arange(index.numel(), device=index.device)
    owner = rows // NUM_IMAGES
    prefix = None if prefix is None else prefix.index_select(0, owner)
    fused = fuse(take(text, owner), index.flatten(), attention, prefix, rows % NUM_IMAGES)
    return Fused(_join(fused.image), _join(fused.text), fused.pooled.unflatten(0, (-1, NUM_IMAGES)).flatten(1))


def _join(tokens: Tokens | None) -> Tokens | None:
    """[M * I, N, D] -> [M, I * N, D]; pooled is the first pass's."""
    if tokens is None:
        return None

    def lay_out(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, NUM_IMAGES)).flatten(1, 2)

    layers = None if tokens.layers is None else tuple(lay_out(x) for x in tokens.layers)
    keep = None if tokens.keep is None else lay_out(tokens.keep)
    return Tokens(lay_out(tokens.states), keep, tokens.pooled[::NUM_IMAGES], layers)


def pooled_width(pooler: Pooler | None, images: str) -> int | None:
    """Width of ``Fused.pooled``; None without a pooler."""
    if pooler is None:
        return None
    return NUM_IMAGES * pooler.width if images == "each" else pooler.width


def modality_table(width: int, images: str) -> nn.Embedding:
    """Rows: image, text; with `each` also one for every further image."""
    return nn.Embedding(1 + NUM_IMAGES if images == "each" else 2, width)


def image_modality(table: nn.Embedding, number: Tensor | None) -> Tensor:
    """Vector of image tokens, [D]; with each row's image ``number`` [M], [M, 1, D]."""
    if number is None:
        return table.weight[0]
    return torch.cat([table.weight[:1], table.weight[2:]])[number][:, None]
