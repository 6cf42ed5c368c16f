"""Two-stage search over a gallery: the k best of each query by their embeddings, then those again by the fused model.

Each rank holds the embeddings of its own images and texts alone and searches for its own queries; the others' keys come
by in turn, in chunks, so that no table of all pairs is ever made. The pairs of both directions are merged before they
are matched: none is matched twice.
Shapes: N images, S texts, E embedding, Q queries, C keys, K candidates of each query.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from downstream.gallery import Gallery, Matcher, embed_shares, match_pairs, unreadable
from downstream.metrics.retrieval import topk_chunked
from objectives.collectives import gather_no_grad, rank, world_size
from vlp.model import Model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Vectors of one side of a gallery, contiguous parts of which lie on each rank."""

    vectors: Tensor
    """[n, E], this rank's."""
    sizes: tuple[int, ...]
    """Vectors of every rank."""

    @property
    def own(self) -> range:
        """Which of all vectors are this rank's."""
        first = sum(self.sizes[: rank()])
        return range(first, first + len(self.vectors))

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """Yield every rank's vectors in turn, and the number of their first; all ranks must read them to the end."""
        first = 0
        for source, size in enumerate(self.sizes):
            part = self.vectors
            if world_size() > 1:
                part = part.contiguous() if source == rank() else part.new_empty(size, part.shape[1])
                dist.broadcast(part, source)
            yield first, part
            first += size

    def keep(self, kept: Collection[int]) -> Share:
        """Return the share of these vectors alone, ascending numbers of all ranks' vectors."""
        sizes, first = [], 0
        for size in self.sizes:
            sizes.append(sum(first <= n < first + size for n in kept))
            first += size
        mine = [n - self.own.start for n in kept if n in self.own]
        return Share(self.vectors[mine], tuple(sizes))

    def gather(self, rows: Tensor) -> Tensor:
        """Return all ranks' rows, where each rank has one for every vector of its own; on the CPU."""
        return gather_no_grad(rows, self.sizes).cpu()


@dataclass(frozen=True)
class Features:
    """The embeddings of a gallery."""

    images: Share
    texts: Share
    scale: float
    """Of the cosines: 1 / temperature."""


@dataclass(frozen=True)
class Candidates:
    """One direction: what each query finds, on the CPU."""

    index: Tensor
    """[Q, K] int64, best by ITC first."""
    itc: Tensor | None
    """[Q, K] contrastive logits, or cosines; None without embeddings (then all keys are candidates)."""
    itm: Tensor | None
    """[Q, K] matching logits; None without a matching head."""
    rank: Tensor | None
    """[Q] int64 rank of the best true key by ITC among all keys, 1 = first."""
    true: Tensor
    """[Q, K] bool, candidates that are of the query's image."""

    def ranked(self, weight: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Order the candidates by ITM + ``weight`` x ITC, None = by ITC alone.

        Returns:
            Keys and scores, both [Q, K], best first, and the rank of each query's best true key among all keys, [Q].
        """
        if weight is None:
            assert self.itc is not None and self.rank is not None
            return self.index, self.itc, self.rank
        assert self.itm is not None
        score = self.itm if self.itc is None else self.itm + weight * self.itc
        score, order = score.sort(dim=1, descending=True, stable=True)
        true = self.true.gather(1, order)
        rank = true.int().argmax(1) + 1  # the first of equal values
        if self.rank is not None:  # what ITC ranks below the first K stays where it is
            rank = torch.where(true.any(1), rank, self.rank)
        return self.index.gather(1, order), score, rank


@dataclass(frozen=True)
class Found:
    """Both directions over one gallery."""

    gallery: Gallery
    i2t: Candidates
    t2i: Candidates
    bad: dict[str, str]
    """Samples that could not be used: key -> reason."""


def choose_weight(found: Found, grid: Sequence[float], asking: Collection[str] | None = None) -> float:
    """Return the weight of the ITC logit by the mean reciprocal ranks of both directions.

    Of the weights that are within one standard error of the best, paired by query, it is the largest, the nearest to
    ITC alone: few validation queries do not tell them apart, and ITM has to show what it adds (the rule of one standard
    error, Breiman et al. 1984; the directions taken as independent). Recall is too coarse for this.

    Args:
        found: both directions over a gallery for which the answers are known.
        grid: weights to choose from.
        asking: names of the images whose queries, and whose texts' queries, count; None = all.

    Raises:
        ValueError: none of these images is there.
    """
    gallery = found.gallery
    images = torch.tensor([asking is None or key in asking for key in gallery.image_keys])
    if not images.any():
        raise ValueError(
            "task.weight_among has none of the images of task.weight_where, whose queries choose the weight; let it "
            "include them"
        )
    sides = (found.i2t, images), (found.t2i, images[gallery.image_of_text])
    scores = {weight: [1 / one.ranked(weight)[2][mine].double() for one, mine in sides] for weight in grid}
    best = max(scores.values(), key=lambda both: sum(one.mean() for one in both))

    def level(weight: float) -> bool:
        worse = [most - one for most, one in zip(best, scores[weight], strict=True)]
        error = torch.stack([one.var(correction=0) / len(one) for one in worse]).sum().sqrt()
        return bool(torch.stack([one.mean() for one in worse]).sum() <= error)

    return max(filter(level, grid))


def embed_usable(
    model: Model, gallery: Gallery, batch: int, bad: dict[str, str], cosine: bool = False
) -> tuple[Gallery, Features | None]:
    """Embed a gallery; return it without the images that cannot be used, which are added to ``bad``.

    Args:
        model: None is returned for the embeddings of one that has none.
        gallery: of images and texts.
        batch: samples run at once.
        bad: image key -> reason, filled on all ranks.
        cosine: leave the scores unscaled.
    """
    space = model.space()
    if not gallery.num_images or not gallery.num_texts:
        return gallery, None
    if space is None:
        broken = unreadable(gallery, batch)
        bad |= {gallery.image_keys[n]: reason for n, reason in broken.items()}
        return gallery.without(broken) if broken else gallery, None
    images, texts, broken = embed_shares(model, gallery, batch)
    scale = 1.0 if cosine else space.logit_scale.detach().float().exp().item()
    features = Features(Share(*images), Share(*texts), scale)
    if not broken:
        return gallery, features
    bad |= {gallery.image_keys[n]: reason for n, reason in broken.items()}
    return part_of(gallery, features, [n for n in range(gallery.num_images) if n not in broken])


def part_of(gallery: Gallery, features: Features | None, images: Sequence[int]) -> tuple[Gallery, Features | None]:
    """Return these images (ascending) of a gallery with their texts, and their embeddings."""
    kept = set(images)
    if features is not None:
        texts = gallery.texts_of(kept)
        features = replace(features, images=features.images.keep(images), texts=features.texts.keep(texts))
    return gallery.without([n for n in range(gallery.num_images) if n not in kept]), features


def first_stage(features: Features, gallery: Gallery, k: int) -> tuple[Candidates, Candidates]:
    """Return the k best texts of each image and the k best images of each text by their embeddings."""
    own = torch.arange(gallery.num_images)
    i2t = _nearest(features.images, features.texts, features.scale, own, gallery.image_of_text, k)
    t2i = _nearest(features.texts, features.images, features.scale, gallery.image_of_text, own, k)
    return i2t, t2i


def every_pair(gallery: Gallery) -> tuple[Candidates, Candidates]:
    """Return all texts of each image and all images of each text as candidates."""
    own, owner = torch.arange(gallery.num_images), gallery.image_of_text
    sides = ((own, owner), (owner, own))
    i2t, t2i = (
        Candidates(torch.arange(len(keys)).expand(len(queries), -1), None, None, None, queries[:, None] == keys[None])
        for queries, keys in sides
    )
    return i2t, t2i


def second_stage(
    model: Model, head: Matcher, gallery: Gallery, i2t: Candidates, t2i: Candidates, pairs: int, images: int
) -> tuple[Candidates, Candidates]:
    """Match the candidates of both directions, each pair once; ``pairs`` and ``images`` are the most of one block."""
    wanted = merged_pairs(gallery, i2t, t2i)
    logger.info("matching %d pairs of %d images and %d texts", len(wanted), gallery.num_images, gallery.num_texts)
    scores = match_pairs(model, gallery, wanted, head, pairs, images)
    itm = [scores[torch.searchsorted(wanted, one)] for one in _numbered(gallery, i2t, t2i)]
    return replace(i2t, itm=itm[0]), replace(t2i, itm=itm[1])


def merged_pairs(gallery: Gallery, i2t: Candidates, t2i: Candidates) -> Tensor:
    """Return the candidates of both directions, image x S + text [P]: none twice, grouped by image."""
    return torch.cat([one.flatten() for one in _numbered(gallery, i2t, t2i)]).unique()


def _numbered(gallery: Gallery, i2t: Candidates, t2i: Candidates) -> tuple[Tensor, Tensor]:
    texts = gallery.num_texts
    image, text = torch.arange(gallery.num_images)[:, None], torch.arange(texts)[:, None]
    return image * texts + i2t.index, t2i.index * texts + text


def _nearest(queries: Share, keys: Share, scale: float, query_image: Tensor, key_image: Tensor, k: int) -> Candidates:
    """The k best keys of each query by cosine."""
    own = query_image[queries.own.start : queries.own.stop]
    score, index = (x.cpu() for x in topk_shares(queries.vectors, keys, k))
    true = own[:, None] == key_image[index]
    place = true.int().argmax(1) + 1
    missed = (~true.any(1)).nonzero()[:, 0]
    on = queries.vectors.device
    place[missed] = true_ranks(queries.vectors[missed.to(on)], keys, own[missed].to(on), key_image.to(on)).cpu()
    score, index, true, place = (queries.gather(x.to(on)) for x in (score, index, true.to(torch.uint8), place))
    return Candidates(index, score * scale, None, place, true.bool())


def topk_shares(queries: Tensor, keys: Share, k: int) -> tuple[Tensor, Tensor]:
    """Return the k keys with the largest inner product for this rank's queries [Q, E]; all ranks must call it.

    Returns:
        Scores and keys as of ``topk_chunked``: equal scores are ordered by the smaller number.
    """
    scores = queries.new_empty(len(queries), 0, dtype=torch.float32)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first, part in keys.parts():
        if len(part):
            score, found = topk_chunked(queries, part, k)
            scores, index = torch.cat([scores, score], 1), torch.cat([index, found + first], 1)
            scores, order = scores.sort(dim=1, descending=True, stable=True)  # what came before has the smaller number
            scores, index = scores[:, :k], index.gather(1, order[:, :k])
    return scores, index


def true_ranks(queries: Tensor, keys: Share, query_image: Tensor, key_image: Tensor, chunk: int = 1024) -> Tensor:
    """Return the rank (1 = best) of the best true key of this rank's queries among all keys, in chunks.

    Equal scores are ordered by the smaller key number, as ``topk_chunked`` does. All ranks must call it.

    Args:
        queries: [Q, E].
        keys: C in all.
        query_image: [Q] int64; a key is true if it is of the same image.
        key_image: [C] int64.
        chunk: rows of either side held at once.

    Returns:
        [Q] int64; one more than the number of keys where none is true.
    """
    best = queries.new_full((len(queries),), -torch.inf, dtype=torch.float32)
    place = torch.full_like(query_image, sum(keys.sizes))
    for rows, start, score in _tiles(queries, keys, chunk):
        true = query_image[rows, None] == key_image[None, start : start + score.shape[1]]
        top, at = score.masked_fill(~true, -torch.inf).max(1)  # the first of equal values
        place[rows] = torch.where(top > best[rows], at + start, place[rows])
        best[rows] = torch.maximum(best[rows], top)
    better = torch.ones_like(query_image)
    for rows, start, score in _tiles(queries, keys, chunk):
        at = torch.arange(start, start + score.shape[1], device=score.device)
        limit, last = best[rows, None], place[rows, None]
        better[rows] += ((score > limit) | ((score == limit) & (at < last))).sum(1)
    return better


def _tiles(queries: Tensor, keys: Share, chunk: int) -> Iterator[tuple[slice, int, Tensor]]:
    """Similarities of each chunk of queries with each chunk of keys: which queries, and the first key's number."""
    for first, part in keys.parts():
        for start in range(0, len(part), chunk):
            for row in range(0, len(queries), chunk):
                rows = slice(row, min(row + chunk, len(queries)))
                yield rows, first + start, queries[rows].float() @ part[start : start + chunk].float().T
