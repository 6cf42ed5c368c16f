"""Which image and text of a step belong together, over this rank's batch or all ranks'.

Shapes: B images, T texts of this rank, N images, S texts of the whole candidate set, Q pairs of earlier steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from encoders.types import Batch
from objectives.collectives import gather_no_grad, rank

Positives = Literal["diagonal", "id", "id_or_caption"]


def image_of_text(batch: Batch, device: torch.device) -> Tensor:
    """Return the image index of each text, [T]; of its first image where it has several."""
    index = batch.image_of_text
    if index is None:
        return torch.arange(batch.num_texts, device=device)
    return index if index.dim() == 1 else index[:, 0]


def matched(batch: Batch) -> Tensor:
    """Return which texts belong to their image, [T] bool, where the data have false pairs (``targets["match"]``).

    Where none does, all count (as in FLAVA), and so they do in a batch without false pairs.
    """
    found = batch.targets.get("match")
    if found is None:
        device = next(iter(batch.texts.values())).ids.device
        return torch.ones(batch.num_texts, dtype=torch.bool, device=device)
    true = found != 0
    return true | ~true.any()


def first_numbers(batch: Batch, everywhere: bool) -> tuple[int, int]:
    """Return the numbers of this rank's first image and text, among all ranks' where ``everywhere``."""
    if not everywhere:
        return 0, 0
    if batch.counts is None:
        return rank() * (batch.num_images or batch.num_texts), rank() * batch.num_texts
    before = batch.counts[: rank()]
    return sum(images for images, _ in before), sum(texts for _, texts in before)


@dataclass(frozen=True)
class Pairing:
    """How this rank's images and texts are paired, and the candidates they are compared with."""

    own_image: Tensor
    """[B] each own image's number among the candidates."""
    own_text: Tensor
    """[T] number of each own text's image among the candidates."""
    first: int
    """Number of the first own image."""
    all_image: Tensor
    """[N] number of each candidate image."""
    all_text: Tensor
    """[S] number of each candidate text's image."""
    image_id: Tensor | None
    """[B] of the own images; None where the rule does not ask for ids or the batch has none."""
    all_image_id: Tensor | None
    """[N] of the candidates."""
    caption_id: Tensor | None
    """[T] of the own texts; None where the rule does not ask for captions or the batch has none."""
    all_caption_id: Tensor | None
    """[S] of the candidates."""

    @property
    def text_id(self) -> Tensor | None:
        """[T] id of each own text's image."""
        return None if self.image_id is None else self.image_id[self.own_text - self.first]

    @property
    def all_text_id(self) -> Tensor | None:
        """[S] id of each candidate text's image."""
        return None if self.all_image_id is None else self.all_image_id[self.all_text]


def find_pairs(batch: Batch, rule: Positives, device: torch.device, everywhere: bool) -> Pairing:
    """Number images and texts of this rank's batch, or, ``everywhere``, of all ranks'."""
    sizes = batch.counts if everywhere else None
    image_sizes, text_sizes = (
        (None, None) if sizes is None else (tuple(s[0] for s in sizes), tuple(s[1] for s in sizes))
    )
    num_images = batch.num_images or batch.num_texts
    first, _ = first_numbers(batch, everywhere)

    def collect(x: Tensor, of: tuple[int, ...] | None) -> Tensor:
        return gather_no_grad(x, of) if everywhere else x

    own_image = torch.arange(num_images, device=device) + first
    own_text = image_of_text(batch, device) + first
    image_id = None if rule == "diagonal" else batch.image_id
    caption_id = batch.caption_id if rule == "id_or_caption" else None
    return Pairing(
        own_image,
        own_text,
        first,
        collect(own_image, image_sizes),
        collect(own_text, text_sizes),
        image_id,
        None if image_id is None else collect(image_id, image_sizes),
        caption_id,
        None if caption_id is None else collect(caption_id, text_sizes),
    )


def true_pairs(pairs: Pairing) -> tuple[Tensor, Tensor]:
    """Return which pairs are true: (own images x candidate texts [B, S], own texts x candidate images [T, N]), bool.

    The rule is that of :func:`find_pairs`. "diagonal": a text's own image only; "id": also every image of equal
    ``image_id``; "id_or_caption": also where a caption of that image has equal ``caption_id``.
    """
    by_image = pairs.own_image[:, None] == pairs.all_text[None]
    by_text = pairs.own_text[:, None] == pairs.all_image[None]
    if pairs.image_id is not None and pairs.all_image_id is not None:
        assert pairs.all_text_id is not None and pairs.text_id is not None
        by_image = by_image | (pairs.image_id[:, None] == pairs.all_text_id[None])
        by_text = by_text | (pairs.text_id[:, None] == pairs.all_image_id[None])
    if pairs.caption_id is not None and pairs.all_caption_id is not None:
        same = pairs.caption_id[:, None] == pairs.all_caption_id[None]  # [T, S]
        # Image and text share words if any text of the image equals the text: add each text's row to its image's.
        by_image = by_image.float().index_add(0, pairs.own_text - pairs.first, same.float()) > 0
        by_text = by_text.float().index_add(1, pairs.all_text, same.float()) > 0
    return by_image, by_text


def true_queued(pairs: Pairing, image_id: Tensor | None, caption_id: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return which pairs with queued ones are true: own images x queued texts [B, Q], own texts x queued images [T, Q].

    Args:
        pairs: of this step.
        image_id: [Q] of the queued pairs, negative = unknown; None: the rule does not ask for ids.
        caption_id: [Q] of the queued pairs, negative = unknown; None: the rule does not ask for captions.
    """
    queued = next(x for x in (image_id, caption_id) if x is not None)
    by_image = torch.zeros(len(pairs.own_image), len(queued), dtype=torch.bool, device=queued.device)
    by_text = torch.zeros(len(pairs.own_text), len(queued), dtype=torch.bool, device=queued.device)
    if image_id is not None and pairs.image_id is not None:
        assert pairs.text_id is not None
        known = image_id >= 0
        by_image = by_image | (pairs.image_id[:, None] == image_id[None]) & known
        by_text = by_text | (pairs.text_id[:, None] == image_id[None]) & known
    if caption_id is not None and pairs.caption_id is not None:
        same = (pairs.caption_id[:, None] == caption_id[None]) & (caption_id >= 0)  # [T, Q]
        by_image = by_image.float().index_add(0, pairs.own_text - pairs.first, same.float()) > 0
        by_text = by_text | same
    return by_image, by_text
