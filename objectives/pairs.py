"""Which image and text of a step belong together, over this rank's batch or all ranks'.

Shapes: B images, T texts of this rank, N images, S texts of the whole candidate set.
"""

from __future__ import annotations

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


def true_pairs(batch: Batch, rule: Positives, device: torch.device, everywhere: bool) -> tuple[Tensor, Tensor]:
    """Return which pairs are true: (own images x candidate texts [B, S], own texts x candidate images [T, N]), bool.

    Args:
        batch: this rank's.
        rule: "diagonal": a text's own image only; "id": also every image of equal ``image_id``; "id_or_caption": also
            where a caption of that image has equal ``caption_id``.
        device: where the masks are made.
        everywhere: candidates are the batches of all ranks, else this rank's.
    """
    sizes = batch.counts if everywhere else None
    image_sizes, text_sizes = (
        (None, None) if sizes is None else (tuple(s[0] for s in sizes), tuple(s[1] for s in sizes))
    )
    num_images = batch.num_images or batch.num_texts
    first = 0
    if everywhere:
        first = rank() * num_images if image_sizes is None else sum(image_sizes[: rank()])

    def collect(x: Tensor, of: tuple[int, ...] | None) -> Tensor:
        return gather_no_grad(x, of) if everywhere else x

    own_image = torch.arange(num_images, device=device) + first  # [B]
    own_text = image_of_text(batch, device) + first  # [T] global image index of each text
    all_image, all_text = collect(own_image, image_sizes), collect(own_text, text_sizes)
    by_image = own_image[:, None] == all_text[None]  # [B, S]
    by_text = own_text[:, None] == all_image[None]  # [T, N]
    if rule != "diagonal" and batch.image_id is not None:
        own_id = batch.image_id
        text_id = own_id[own_text - first]
        by_image = by_image | (own_id[:, None] == collect(text_id, text_sizes)[None])
        by_text = by_text | (text_id[:, None] == collect(own_id, image_sizes)[None])
    if rule == "id_or_caption" and batch.caption_id is not None:
        captions = collect(batch.caption_id, text_sizes)
        same = batch.caption_id[:, None] == captions[None]  # [T, S]
        # Image and text share words if any text of the image equals the text: add each text's row to its image's.
        by_image = by_image.float().index_add(0, own_text - first, same.float()) > 0
        by_text = by_text.float().index_add(1, all_text, same.float()) > 0
    return by_image, by_text
