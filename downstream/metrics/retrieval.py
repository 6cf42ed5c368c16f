"""Image-text retrieval metrics from ranked indices, and an exact top-k search that never holds all similarities.

Legend: Ni images, Nt texts, Q queries, M keys, E embedding, K ranked candidates per query. Recalls are in [0, 1].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)


def topk_chunked(queries: Tensor, keys: Tensor, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The k keys with the largest inner product for each query, `chunk` queries and `chunk` keys at a time.

    Equal scores are ordered by the smaller key index, on every device (`torch.topk` leaves that open), so that
    duplicate captions or images rank the same in each run. Scores are computed in float32; another `chunk` means
    products of another shape, which may round differently in the last bit.

    Args:
        queries: Embeddings, `[Q, E]`.
        keys: Embeddings, `[M, E]`, on the device of `queries`.
        k: Number of keys wanted; at most M are returned.
        chunk: Rows of either side held at once: memory is O(chunk^2 + Q * k).

    Returns:
        Scores `[Q, min(k, M)]` in descending order, float32, and the keys' indices, int64, of the same shape.

    Raises:
        ValueError: `k` or `chunk` below 1, no keys, or a score that is not a number.
    """
    for field, value in (("k", k), ("chunk", chunk), ("keys", keys.shape[0])):
        if value < 1:
            raise ValueError(f"{field}: {value}; at least 1 is needed")
    scores, indices = [], []
    for rows in queries.split(chunk):
        best = torch.empty(rows.shape[0], 0, dtype=torch.int64, device=rows.device)
        for start in range(0, keys.shape[0], chunk):
            similarity = rows.float() @ keys[start : start + chunk].float().T  # [<= chunk, <= chunk]
            if similarity.isnan().any():
                raise ValueError("similarity: NaN between a query and a key; check the embeddings before ranking them")
            merged = torch.cat([best, _sort_keys(similarity, start)], dim=1)
            best = merged.topk(min(k, merged.shape[1]), dim=1).values
        scores.append(_scores_of(best))
        indices.append(_indices_of(best))
    if not scores:
        width = min(k, keys.shape[0])
        return queries.new_empty(0, width, dtype=torch.float32), queries.new_empty(0, width, dtype=torch.int64)
    return torch.cat(scores), torch.cat(indices)


def retrieval_metrics(
    i2t_ranked: Tensor, t2i_ranked: Tensor, image_of_text: Tensor, ks: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Recall at k in both directions, rSum, median ranks and the chance level.

    With several captions per image, image-to-text recall has two usual definitions, and both are reported:

    * `i2t_any/R@k`: an image counts as found if any of its captions is among the first k. Papers on COCO and Flickr30K
      print this one (Karpathy and Fei-Fei, CVPR 2015), and so does CLIP_benchmark in its results.
    * `i2t_mean/R@k`: the fraction of an image's captions among the first k, as information retrieval defines recall;
      with five captions R@1 cannot exceed 0.2. A text has one image, so text to image has only `t2i/R@k`.

    Args:
        i2t_ranked: For each image text indices, best first, `[Ni, K]`, without repetitions in a row.
        t2i_ranked: For each text image indices, best first, `[Nt, K']`, without repetitions in a row.
        image_of_text: For each text the index of its image, `[Nt]`.
        ks: Cut-offs; each needs as many ranked candidates, unless the whole gallery is ranked.

    Returns:
        The keys above; `rSum`, the sum of `i2t_any` and `t2i` recalls over `ks` in points (600 at best for 1, 5, 10);
        `i2t/median_rank` and `t2i/median_rank` (1 is best) where the whole gallery is ranked; and `chance/...` for each
        recall and for rSum: what a random order scores on average.

    Raises:
        ValueError: Too few ranked candidates for a cut-off, shapes that do not fit, or an image without text.
    """
    images, texts = i2t_ranked.shape[0], t2i_ranked.shape[0]
    image_of_text = image_of_text.to(i2t_ranked.device)
    captions = _captions_per_image(image_of_text, images, texts)  # [Ni]
    _check_width("i2t_ranked", i2t_ranked, texts, ks)
    _check_width("t2i_ranked", t2i_ranked, images, ks)

    own = torch.arange(images, device=i2t_ranked.device)
    i2t_hits = image_of_text[i2t_ranked] == own[:, None]  # [Ni, K]
    t2i_hits = t2i_ranked.to(image_of_text.device) == image_of_text[:, None]  # [Nt, K']

    result: dict[str, float] = {}
    chance: dict[str, float] = {}
    for k in ks:
        found = i2t_hits[:, :k].sum(dim=1)
        result[f"i2t_any/R@{k}"] = (found > 0).double().mean().item()
        result[f"i2t_mean/R@{k}"] = (found.double() / captions).mean().item()
        result[f"t2i/R@{k}"] = t2i_hits[:, :k].any(dim=1).double().mean().item()
        chance[f"i2t_any/R@{k}"] = _chance_of_any(captions, texts, k)
        chance[f"i2t_mean/R@{k}"] = min(1.0, k / texts)
        chance[f"t2i/R@{k}"] = min(1.0, k / images)
    for values in (result, chance):
        values["rSum"] = 100 * sum(v for name, v in values.items() if not name.startswith("i2t_mean"))
    for name, hits, gallery in (("i2t", i2t_hits, texts), ("t2i", t2i_hits, images)):
        if hits.shape[1] == gallery:
            first = hits.int().argmax(dim=1) + 1  # argmax gives the first of equal values
            result[f"{name}/median_rank"] = first.double().quantile(0.5).item()
    return result | {f"chance/{name}": value for name, value in chance.items()}


def rank_metrics(i2t_rank: Tensor, t2i_rank: Tensor) -> dict[str, float]:
    """Median and mean rank in both directions (1 is best), as Karpathy's code and VSE++ report them.

    With several captions an image has the rank of its best one. The median of an even number of ranks is the mean of
    the two in the middle, where those codes round down.

    Args:
        i2t_rank: Rank of each image's best caption among all texts, `[Ni]`.
        t2i_rank: Rank of each text's image among all images, `[Nt]`.

    Returns:
        `i2t/median_rank`, `i2t/mean_rank`, `t2i/median_rank`, `t2i/mean_rank`.
    """
    result: dict[str, float] = {}
    for name, rank in (("i2t", i2t_rank.double()), ("t2i", t2i_rank.double())):
        result |= {f"{name}/median_rank": rank.quantile(0.5).item(), f"{name}/mean_rank": rank.mean().item()}
    return result


def _sort_keys(similarity: Tensor, start: int) -> Tensor:
    """One int64 for each score that sorts by score, then by smaller index: both are unpacked from it again."""
    bits = (similarity + 0.0).contiguous().view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # two's complement order is now the floats' order
    index = torch.arange(start, start + similarity.shape[1], device=similarity.device)
    return (ordered << 32) | (0xFFFFFFFF - index)


def _scores_of(packed: Tensor) -> Tensor:
    ordered = packed >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(torch.int32).view(torch.float32)


def _indices_of(packed: Tensor) -> Tensor:
    return 0xFFFFFFFF - (packed & 0xFFFFFFFF)


def _captions_per_image(image_of_text: Tensor, images: int, texts: int) -> Tensor:
    if image_of_text.shape != (texts,):
        raise ValueError(
            f"image_of_text: shape {tuple(image_of_text.shape)}, but t2i_ranked has {texts} rows; give one each"
        )
    if texts == 0 or not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < images:
        raise ValueError(f"image_of_text: indices outside the {images} rows of i2t_ranked, or none; check the split")
    captions = torch.bincount(image_of_text, minlength=images)
    if not captions.all():
        empty = int((captions == 0).nonzero()[0])
        raise ValueError(f"image_of_text: image {empty} has no text, so its recall is undefined; drop the image")
    return captions


def _check_width(field: str, ranked: Tensor, gallery: int, ks: Sequence[int]) -> None:
    needed = min(max(ks), gallery)
    if ranked.shape[1] < needed:
        raise ValueError(f"{field}: {ranked.shape[1]} ranked candidates cannot give R@{max(ks)}; rank {needed} or more")


def _chance_of_any(captions: Tensor, texts: int, k: int) -> float:
    """Mean over images of 1 - C(texts - m, k) / C(texts, k): the chance that one of m captions is among k drawn."""
    k = min(k, texts)
    sizes, counts = captions.unique(return_counts=True)
    misses = sum(n * math.comb(texts - m, k) / math.comb(texts, k) for m, n in zip(sizes.tolist(), counts.tolist()))
    return 1 - misses / len(captions)
