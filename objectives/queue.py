"""Queues of embeds of earlier steps, first in first out.

Pairs are further candidates of a contrastive loss (He et al. 2020, MoCo); among vectors the nearest is sought.
Shapes: Q pairs or vectors in the queue, S new ones, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.precision import full_precision
from objectives.pairs import Pairing, Positives


class PairQueue(nn.Module):
    """The teacher's embeds of the last Q pairs, a ring; random vectors at first, as in the references.

    Args:
        size: Q.
        width: E.
        positives: the rule by which true pairs are known; it says which ids are kept.
    """

    image: Tensor
    """[Q, E]"""
    text: Tensor
    """[Q, E]"""
    pointer: Tensor
    """[1] int64, where the next pair goes."""
    image_id: Tensor | None
    """[Q] int64, negative = none; None where the rule asks for no ids."""
    caption_id: Tensor | None
    """[Q] int64, negative = none; None where the rule asks for no captions."""

    def __init__(self, size: int, width: int, positives: Positives) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("image", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("text", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        none = torch.full((size,), -1)
        self.register_buffer("image_id", None if positives == "diagonal" else none)
        self.register_buffer("caption_id", none.clone() if positives == "id_or_caption" else None)

    @torch.no_grad()
    def append(self, image: Tensor, text: Tensor, pairs: Pairing) -> None:
        """Take in the newest pairs over all ranks; of more than Q the last ones.

        Args:
            image: [N, E] embeds of all images of the step.
            text: [S, E] embeds of all texts; a pair is a text with its image.
            pairs: which image that is, and the ids.
        """
        new = {"image": image.index_select(0, pairs.all_text), "text": text}
        if self.image_id is not None and pairs.all_text_id is not None:
            new["image_id"] = pairs.all_text_id
        if self.caption_id is not None and pairs.all_caption_id is not None:
            new["caption_id"] = pairs.all_caption_id
        at = advance(self.pointer, len(text), self.size)
        for name, queued in self.named_buffers():
            if name in new:
                queued.index_copy_(0, at, new[name][-len(at) :].to(queued.dtype))
            elif name != "pointer":
                queued.index_fill_(0, at, -1)


class VectorQueue(nn.Module):
    """The last Q vectors, a ring; random ones at first.

    Args:
        size: Q.
        width: E.
    """

    vectors: Tensor
    """[Q, E] of unit norm."""
    pointer: Tensor
    """[1] int64, where the next vector goes."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the queued vector nearest to each of ``vectors`` [S, E], [S, E].

        Autocast is off: in bf16 many are equally near.
        """
        with full_precision(vectors):
            near = vectors.to(self.vectors.dtype) @ self.vectors.T
        return self.vectors.index_select(0, near.argmax(1))

    @torch.no_grad()
    def append(self, vectors: Tensor) -> None:
        """Take in ``vectors`` [S, E]; of more than Q the last ones."""
        at = advance(self.pointer, len(vectors), len(self.vectors))
        self.vectors.index_copy_(0, at, vectors[-len(at) :].to(self.vectors.dtype))


def advance(pointer: Tensor, number: int, size: int) -> Tensor:
    """Return where in a ring of ``size`` the last of ``number`` new entries go; move ``pointer`` [1] behind them."""
    at = (pointer + torch.arange(number - min(number, size), number, device=pointer.device)) % size
    pointer.add_(number).remainder_(size)
    return at
