"""Retrieval: the text of an image and the image of a text, first by embeddings, then by matching the best of them.

Data: images with one or several captions; every image and every caption of the data is the gallery. Reported are "ITC"
(the embeddings alone), "ITM rerank" (the first k again by the matching logit, as ALBEF) and "ITM + w x ITC" (by the sum
of both logits, w chosen on other data).
Shapes: N images, S texts, Q queries, K candidates of each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from downstream.gallery import Gallery, embed_gallery, match_pairs, open_gallery, true_ranks
from downstream.metrics.retrieval import RECALL_AT, retrieval_metrics, topk_chunked
from downstream.task import R, Result, TaskConfig, no_labels
from objectives import ItcConfig, ItmConfig, LmConfig, ObjectiveConfig
from objectives.itm import Itm
from vlp.data.benchmark import STYLES, emoji_path, emoji_split_hash
from vlp.data.fetch import Prepare, pair_example
from vlp.data.reader import BadSample, Reader, open_reader
from vlp.fusion import NoFusionConfig
from vlp.model import Model

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

logger = logging.getLogger(__name__)

ITC, ITM, SUM = "ITC", "ITM rerank", "ITM + w x ITC"
SHOWN = 10
"""Candidates that a prediction names."""
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
ALL_PAIRS = 10_000_000
"""Most pairs that a model without embeddings, which must match all of them, is asked to match."""


@dataclass(frozen=True)
class Candidates:
    """One direction: what each query finds, on the CPU."""

    index: Tensor
    """[Q, K] int64, best by ITC first."""
    itc: Tensor | None
    """[Q, K] contrastive logits; None without embeddings (then all keys are candidates)."""
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


def choose_weight(found: Found, grid: Sequence[float]) -> float:
    """Return the weight of the ITC logit with the best mean reciprocal rank over both directions, the first of equals.

    Recall is too coarse for this on a small validation set.
    """

    def quality(weight: float) -> float:
        return sum((1 / one.ranked(weight)[2].double()).mean().item() for one in (found.i2t, found.t2i))

    return max(grid, key=quality)


class RetrievalConfig(TaskConfig):
    """Find the text of an image, and the image of a text."""

    kind: Literal["retrieval"] = "retrieval"
    k: int = Field(16, ge=max(RECALL_AT))
    """Candidates of each query that are matched again (128 or 256 in the literature)."""
    pairs: int = Field(512, ge=1)
    """Pairs that the fusion runs at once."""
    weight: float | None = Field(None, ge=0)
    """Weight of the ITC logit beside the ITM logit; none = chosen on weight_data."""
    weight_data: str | tuple[str, ...] | None = None
    """Data to choose the weight on, other than what is evaluated, in the forms of data.val."""
    weight_where: dict[str, Any] = Field(default_factory=dict)
    """Only samples of weight_data whose fields have these values, as {split: val}."""
    weights: tuple[float, ...] = Field(WEIGHTS, min_length=1)
    """Weights to choose from."""

    headline: ClassVar[str] = "t2i/R@1"

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: Any) -> R:
        """Keep the checkpoint's contrastive and matching objectives; negatives are hard from the start."""
        fused = not isinstance(run.model.fusion, NoFusionConfig)
        wanted = (ItcConfig, ItmConfig) if fused else (ItcConfig,)
        objectives: dict[str, ObjectiveConfig] = {n: one for n, one in pretrained.items() if isinstance(one, wanted)}
        for name, one in objectives.items():
            if isinstance(one, ItmConfig):  # the ramp is for training from scratch
                objectives[name] = one.model_copy(update={"random_until": 0, "hard_from": 0})
        objectives |= run.objectives
        if not any(isinstance(one, wanted) for one in objectives.values()):
            objectives["itc"] = ItcConfig()
        if fused and not any(isinstance(one, ItmConfig) for one in objectives.values()):
            objectives["itm"] = ItmConfig()  # else nothing would train the fusion
        model = run.model
        if not any(isinstance(one, LmConfig) for one in objectives.values()):
            model = model.model_copy(update={"decoder": None})
        return run.model_copy(update={"model": model, "objectives": objectives})

    def prepare(self, run: RunConfig) -> Prepare:
        """Return pairs: an image and one of its captions, drawn anew each time."""
        return pair_example

    def lacks(self, model: Model) -> str | None:
        """Retrieval takes embeddings, or a matching head."""
        if model.space() is None and matching_head(model) is None:
            return "a contrastive embedding (objective itc) or a matching head (objective itm)"
        return None

    def evaluate(self, parts: Parts, reader: Reader, survey: Any = None) -> Result:
        """Return the recalls of every scoring that the model has; those without a prefix are of the last one.

        The order is ITC, ITM rerank, ITM + w x ITC. Where images have several captions, image-to-text recall is
        reported under both definitions, i2t_any and i2t_mean, else as i2t. ``floors`` is what a random order scores;
        ``notes`` name the gallery and the hash of its data.
        """
        found = self.find(parts, reader)
        scorings, notes = self._scorings(parts, reader, found)
        tables = {name: self._metrics(found, weight) for name, weight in scorings.items()}
        last = list(tables)[-1]
        named = tables[last] | {
            f"{name}/{metric}": value for name, table in tables.items() for metric, value in table.items()
        }
        metrics = {metric: value for metric, value in named.items() if "chance/" not in metric}
        chance = {metric.replace("chance/", ""): value for metric, value in named.items() if "chance/" in metric}
        gallery = found.gallery
        notes = (
            f"gallery: {gallery.num_images} images, {gallery.num_texts} texts; {data_hash(reader)}",
            f"recalls without a prefix are of {last}",
            *notes,
            *_definition(gallery),
        )
        return Result(metrics, {"chance": chance}, list(_rows(found, scorings, labelled=True)), found.bad, notes)

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield the best texts of each image, then the best images of each text, among the reader's own."""
        found = self.find(parts, reader, labelled=False)
        scorings, _ = self._scorings(parts, reader, found)
        yield from _rows(found, scorings, labelled=False)

    def find(self, parts: Parts, reader: Reader, labelled: bool = True) -> Found:
        """Embed the gallery, take the k best of each query, and match those; all ranks share the work.

        Raises:
            ValueError: the model can neither embed nor match, or no sample can be used.
        """
        model, data = parts.model, parts.run.data
        if (missing := self.lacks(model)) is not None:
            raise ValueError(
                f"task retrieval: this model lacks {missing}; finetune it with vlp finetune retrieval first"
            )
        bad: dict[str, str] = {}
        gallery = open_gallery(reader, data, parts.tokenizer, model.config.vision.image_size, bad, texts=labelled)
        return self.search(model, gallery, bad)

    def search(self, model: Model, gallery: Gallery, bad: dict[str, str]) -> Found:
        """Do what ``find`` does on an open gallery; unusable images leave it and are added to ``bad``."""
        embedded = None
        if (space := model.space()) is not None and gallery.num_images and gallery.num_texts:
            images, texts, broken = embed_gallery(model, gallery, self.batch)
            if broken:
                bad |= {gallery.image_keys[n]: reason for n, reason in broken.items()}
                kept = [n for n in range(gallery.num_images) if n not in broken]
                images, texts = images[kept], texts[gallery.texts_of(kept)]
                gallery = gallery.without(broken)
            embedded = images, texts, space.logit_scale.detach().float().exp().item()
        if not gallery.num_images or not gallery.num_texts:
            raise ValueError(no_labels("val", gallery.num_images + len(bad), bad))
        own = torch.arange(gallery.num_images)
        i2t = self._first(embedded, own, gallery.image_of_text)
        turned = None if embedded is None else (embedded[1], embedded[0], embedded[2])
        t2i = self._first(turned, gallery.image_of_text, own)
        return Found(gallery, *self._match(model, gallery, i2t, t2i), bad)

    def _first(
        self, embedded: tuple[Tensor, Tensor, float] | None, query_image: Tensor, key_image: Tensor
    ) -> Candidates:
        """The k best keys of each query by their embeddings (queries, keys, logit scale); all without embeddings."""
        if embedded is None:
            if (number := len(query_image) * len(key_image)) > ALL_PAIRS:
                raise ValueError(
                    f"task retrieval: this model has no embeddings, so that all {number:,} pairs would be matched; "
                    f"take at most {ALL_PAIRS:,} (data.where), or finetune it with objective itc"
                )
            index = torch.arange(len(key_image)).expand(len(query_image), -1)
            return Candidates(index, None, None, None, query_image[:, None] == key_image[None])
        queries, keys, scale = embedded
        score, index = (x.cpu() for x in topk_chunked(queries, keys, self.k))
        true = query_image[:, None] == key_image[index]
        rank = true.int().argmax(1) + 1
        missed = (~true.any(1)).nonzero()[:, 0]
        on = queries.device
        rank[missed] = true_ranks(queries[missed.to(on)], keys, query_image[missed].to(on), key_image.to(on)).cpu()
        return Candidates(index, score * scale, None, rank, true)

    def _match(self, model: Model, gallery: Gallery, i2t: Candidates, t2i: Candidates) -> tuple[Candidates, Candidates]:
        """Match the pairs of both directions, each pair once."""
        head = matching_head(model)
        if head is None:
            return i2t, t2i
        texts = gallery.num_texts
        image, text = torch.arange(gallery.num_images)[:, None], torch.arange(texts)[:, None]
        flat = image * texts + i2t.index, t2i.index * texts + text
        pairs = torch.cat([one.flatten() for one in flat]).unique()  # sorted, so grouped by image
        logger.info("matching %d pairs of %d images and %d texts", len(pairs), gallery.num_images, texts)
        scores = match_pairs(model, gallery, pairs, head, self.pairs, self.batch)
        itm = [scores[torch.searchsorted(pairs, one)] for one in flat]
        return replace(i2t, itm=itm[0]), replace(t2i, itm=itm[1])

    def _scorings(self, parts: Parts, reader: Reader, found: Found) -> tuple[dict[str, float | None], tuple[str, ...]]:
        """The weight of each scoring that there is, and what to say about them."""
        scorings: dict[str, float | None] = {}
        if found.i2t.itc is not None:
            scorings[ITC] = None
        if found.i2t.itm is None:
            return scorings, ("this model has no matching head, so nothing is reranked",)
        scorings[ITM] = 0.0
        if found.i2t.itc is None:
            return scorings, ("this model has no embeddings, so all pairs were matched",)
        width = found.i2t.index.shape[1], found.t2i.index.shape[1]
        notes = [f"reranked: the first {width[0]} texts of an image and {width[1]} images of a text"]
        weight, source = self._weight(parts, reader)
        if weight is not None:
            scorings[SUM] = weight
        return scorings, (*notes, source)

    def _weight(self, parts: Parts, reader: Reader) -> tuple[float | None, str]:
        """The weight of the ITC logit, and where it is from."""
        if self.weight is not None:
            return self.weight, f"w = {self.weight:g}, given"
        data, spec = parts.run.data, self.weight_data
        if spec is None:
            return None, "no data to choose w on, so no sum of ITM and ITC; name them with --task.weight-data"
        other = open_reader(spec, image=data.image, text=data.text, root=data.root, where=self.weight_where)
        if other.fingerprint == reader.fingerprint:
            return None, "w cannot be chosen on what is evaluated, so no sum; name other data with --task.weight-data"
        weight = self.find_weight(parts, other)
        name = spec if isinstance(spec, str) else ", ".join(spec)
        return weight, f"w = {weight:g}, chosen on {len(other)} samples of {name} {self.weight_where or ''}".rstrip()

    def find_weight(self, parts: Parts, reader: Reader) -> float:
        """Choose the weight of the ITC logit from ``weights`` on validation data."""
        return choose_weight(self.find(parts, reader), self.weights)

    def _metrics(self, found: Found, weight: float | None) -> dict[str, float]:
        i2t, t2i = found.i2t.ranked(weight), found.t2i.ranked(weight)
        metrics = retrieval_metrics(i2t[0], t2i[0], found.gallery.image_of_text)
        for name, rank in (("i2t", i2t[2]), ("t2i", t2i[2])):
            metrics[f"{name}/median_rank"] = rank.double().quantile(0.5).item()
        if _several(found.gallery):
            return metrics
        return {name.replace("i2t_any", "i2t"): value for name, value in metrics.items() if "i2t_mean" not in name}


def matching_head(model: Model) -> Itm | None:
    """Return the model's matching head; None without one."""
    return next((one for one in model.objectives.values() if isinstance(one, Itm)), None)


def data_hash(reader: Reader) -> str:
    """Return in words what tells this data from others: the emoji benchmark's split, else the reader's fingerprint."""
    try:
        source = reader[0].source
    except BadSample:
        source = ""
    if source in {str(emoji_path(style)) for style in STYLES}:
        return f"emoji split sha256 {emoji_split_hash()}"
    return f"data fingerprint {reader.fingerprint}"


def _several(gallery: Gallery) -> bool:
    """Whether any image has several captions, so that its recall has two definitions."""
    return gallery.num_texts > gallery.num_images


def _definition(gallery: Gallery) -> tuple[str, ...]:
    if not _several(gallery):
        return ()
    return (
        f"{gallery.num_texts / gallery.num_images:.1f} captions an image: i2t_any counts an image as found if any "
        "caption of it is (as papers print), i2t_mean is the share of its captions that are found",
    )


def _rows(found: Found, scorings: Mapping[str, float | None], labelled: bool) -> Iterator[dict[str, Any]]:
    """One row a query: images, then texts; what the last scoring finds, and the true key's rank in each."""
    gallery = found.gallery
    owner = gallery.image_of_text.tolist()
    captions: list[list[int]] = [[] for _ in range(gallery.num_images)]
    number = []
    for text, image in enumerate(owner):
        number.append(len(captions[image]))
        captions[image].append(text)
    for name, side, names in (("i2t", found.i2t, gallery.captions), ("t2i", found.t2i, gallery.image_keys)):
        ranked = {scoring: side.ranked(weight) for scoring, weight in scorings.items()}
        index, scores, _ = list(ranked.values())[-1]
        ranks = {scoring: one[2].tolist() for scoring, one in ranked.items()}
        for query, (best, score) in enumerate(zip(index[:, :SHOWN].tolist(), scores[:, :SHOWN].tolist(), strict=True)):
            image = query if name == "i2t" else owner[query]
            row: dict[str, Any] = {"key": f"{name}/{gallery.image_keys[image]}", "direction": name}
            if name == "t2i":
                row["key"] += f"/{number[query]}"
                row["text"] = gallery.captions[query]
            if name == "i2t" or labelled:
                row["image"] = gallery.image_keys[image]
            if labelled:
                of_image = [gallery.captions[s] for s in captions[image]]
                row["true"] = of_image if name == "i2t" else [gallery.image_keys[image]]
                row["ranks"] = {scoring: each[query] for scoring, each in ranks.items()}
            yield row | {"found": [names[key] for key in best], "scores": score}
