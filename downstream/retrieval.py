"""Retrieval: the text of an image and the image of a text, first by embeddings, then by matching the best of them.

Data: images with one or several captions; every image and every caption of the data is the gallery. Reported are "ITC"
(the embeddings alone), "ITM rerank" (the first k again by the matching logit, as ALBEF) and "ITM + w x ITC" (by the sum
of both logits, w chosen on other data).
Recall of an image with several captions has two definitions, reported under two names: i2t_any, any hit, which papers
print, and i2t_mean, the fraction of its captions that are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from downstream.gallery import Gallery, Matcher, open_gallery
from downstream.metrics.retrieval import RECALL_AT, rank_metrics, retrieval_metrics
from downstream.search import (
    Features,
    Found,
    choose_weight,
    embed_usable,
    every_pair,
    first_stage,
    part_of,
    second_stage,
)
from downstream.task import R, Result, TaskConfig, image_key, no_labels, read_samples
from objectives import ItcConfig, ItmConfig, LmConfig, ObjectiveConfig, RankConfig
from objectives.itm import Itm
from objectives.rank import Rank
from vlp.data.benchmark import STYLES, emoji_path, emoji_split_hash
from vlp.data.fetch import Prepare, pair_example
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, open_reader
from vlp.fusion import NoFusionConfig
from vlp.model import Model

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

ITC, ITM, SUM = "ITC", "ITM rerank", "ITM + w x ITC"
SHOWN = 10
"""Candidates that a prediction names."""
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
ALL_PAIRS = 10_000_000
"""Most pairs that a model without embeddings, which must match all of them, is asked to match."""


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
    weight_among: dict[str, Any] | None = None
    """Samples of weight_data among which those of weight_where are sought, as {split: [train, val]}; none = themselves.
    The best weight depends on the size of the gallery: let it be like that of what is evaluated."""
    weights: tuple[float, ...] = Field(WEIGHTS, min_length=1)
    """Weights to choose from."""
    weight_unit: Literal["logit", "cosine"] = "logit"
    """What the weight multiplies: ITC logits, or the cosines that they are the scaled form of. BLIP's published scores
    are matching logit + cosine: weight 1, unit cosine."""
    folds: int = Field(1, ge=1)
    """Also report means over the images cut into so many galleries, in their order ("COCO 1K": 5 of the 5,000)."""

    headline: ClassVar[str] = "t2i/R@1"
    of_data: ClassVar[tuple[str, ...]] = ("weight_data", "weight_where", "weight_among")

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: Any) -> R:
        """Keep the checkpoint's contrastive, matching and ranking objectives; negatives are hard from the start."""
        fused = not isinstance(run.model.fusion, NoFusionConfig)
        wanted = (ItcConfig, ItmConfig, RankConfig) if fused else (ItcConfig,)
        objectives: dict[str, ObjectiveConfig] = {n: one for n, one in pretrained.items() if isinstance(one, wanted)}
        for name, one in objectives.items():
            if isinstance(one, ItmConfig):  # the ramp is for training from scratch
                objectives[name] = one.model_copy(update={"random_until": 0, "hard_from": 0})
        objectives |= {name: one.over(objectives.get(name)) for name, one in run.objectives.items()}
        if not any(isinstance(one, wanted) for one in objectives.values()):
            objectives["itc"] = ItcConfig()
        if fused and not any(isinstance(one, ItmConfig | RankConfig) for one in objectives.values()):
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
            return "a contrastive embedding (objective itc) or a matching head (objective itm or rank)"
        return None

    def evaluate(self, parts: Parts, reader: Reader, survey: Any = None) -> Result:
        """Return the recalls of every scoring that the model has; those without a prefix are of the last one.

        The order is ITC, ITM rerank, ITM + w x ITC. Where images have several captions, image-to-text recall is
        reported under both definitions, i2t_any and i2t_mean, else as i2t. ``floors`` is what a random order scores;
        ``notes`` name the gallery and the hash of its data.
        """
        gallery, bad = self._open(parts, reader, labelled=True)
        gallery, features = self._embed(parts.model, gallery, bad)
        if not 1 <= self.folds <= gallery.num_images:
            raise ValueError(f"task.folds {self.folds} of {gallery.num_images} images; choose fewer")
        found = self._stages(parts.model, gallery, features, bad)
        scorings, notes = self._scorings(parts, reader, found)
        named = self._tables(found, scorings)
        if self.folds > 1:
            tables = [self._tables(one, scorings) for one in self._folds(parts.model, gallery, features)]
            named |= {f"{self.folds} folds/{name}": fmean(table[name] for table in tables) for name in tables[0]}
            size = gallery.num_images // self.folds
            notes += (f"{self.folds} folds: means over galleries of {size} images each, in the data's order",)
        metrics = {metric: value for metric, value in named.items() if "chance/" not in metric}
        chance = {metric.replace("chance/", ""): value for metric, value in named.items() if "chance/" in metric}
        notes = (
            f"gallery: {gallery.num_images} images, {gallery.num_texts} texts; {data_hash(reader)}",
            f"recalls without a prefix are of {list(scorings)[-1]}",
            *notes,
            *_definition(gallery),
        )
        counts = {"images": gallery.num_images, "texts": gallery.num_texts}
        rows = list(_rows(found, scorings, labelled=True))
        return Result(metrics, {"chance": chance}, rows, bad, notes, counts)

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
        return self.search(parts.model, *self._open(parts, reader, labelled))

    def _open(self, parts: Parts, reader: Reader, labelled: bool) -> tuple[Gallery, dict[str, str]]:
        model, data, bad = parts.model, parts.run.data, dict[str, str]()
        if (missing := self.lacks(model)) is not None:
            raise ValueError(
                f"task retrieval: this model lacks {missing}; finetune it with vlp finetune retrieval first"
            )
        return open_gallery(reader, data, parts.tokenizer, model.config, bad, texts=labelled), bad

    def search(self, model: Model, gallery: Gallery, bad: dict[str, str]) -> Found:
        """Do what ``find`` does on an open gallery; unusable images leave it and are added to ``bad``."""
        return self._stages(model, *self._embed(model, gallery, bad), bad)

    def _embed(self, model: Model, gallery: Gallery, bad: dict[str, str]) -> tuple[Gallery, Features | None]:
        total = gallery.num_images + len(bad)
        gallery, features = embed_usable(model, gallery, self.batch, bad, self.weight_unit == "cosine")
        if not gallery.num_images or not gallery.num_texts:
            raise ValueError(no_labels("val", total, bad))
        return gallery, features

    def _stages(self, model: Model, gallery: Gallery, features: Features | None, bad: dict[str, str]) -> Found:
        if features is not None:
            sides = first_stage(features, gallery, self.k)
        elif (number := gallery.num_images * gallery.num_texts) <= ALL_PAIRS:
            sides = every_pair(gallery)
        else:
            raise ValueError(
                f"task retrieval: this model has no embeddings, so that all {number:,} pairs would be matched; "
                f"take at most {ALL_PAIRS:,} (data.where), or finetune it with objective itc"
            )
        if (head := matching_head(model)) is not None:
            sides = second_stage(model, head, gallery, *sides, self.pairs, self.batch)
        return Found(gallery, *sides, bad)

    def _folds(self, model: Model, gallery: Gallery, features: Features | None) -> Iterator[Found]:
        """Search in each fold of the images alone."""
        edges = [n * gallery.num_images // self.folds for n in range(self.folds + 1)]
        for first, last in pairwise(edges):
            yield self._stages(model, *part_of(gallery, features, range(first, last)), {})

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
        among, asking = other, None
        if self.weight_among is not None:
            among = open_reader(spec, image=data.image, text=data.text, root=data.root, where=self.weight_among)
            asking = image_names(other, data)
        weight = choose_weight(self.find(parts, among), self.weights, asking)
        name = spec if isinstance(spec, str) else ", ".join(spec)
        source = f"w = {weight:g}, chosen on {len(other)} samples of {name} {self.weight_where or ''}".rstrip()
        return weight, source if among is other else f"{source}, sought among {len(among)}"

    def _tables(self, found: Found, scorings: Mapping[str, float | None]) -> dict[str, float]:
        """The metrics of each scoring under its name, and of the last one without a prefix."""
        tables = {name: _metrics(found, weight) for name, weight in scorings.items()}
        prefixed = {f"{name}/{metric}": value for name, table in tables.items() for metric, value in table.items()}
        return list(tables.values())[-1] | prefixed


def image_names(reader: Reader, data: DataConfig) -> set[str]:
    """Return the names of the images of all samples that can be read, as a gallery has them."""
    return {image_key(one.sample, data) for one in read_samples(reader, data, {}, images=False)}


def _metrics(found: Found, weight: float | None) -> dict[str, float]:
    i2t, t2i = found.i2t.ranked(weight), found.t2i.ranked(weight)
    metrics = retrieval_metrics(i2t[0], t2i[0], found.gallery.image_of_text) | rank_metrics(i2t[2], t2i[2])
    if _several(found.gallery):
        return metrics
    return {name.replace("i2t_any", "i2t"): value for name, value in metrics.items() if "i2t_mean" not in name}


def matching_head(model: Model) -> Matcher | None:
    """Return the model's matching head, else its ranking head (ViLT, METER, UNITER); None without one."""
    heads = [one for kind in (Itm, Rank) for one in model.objectives.values() if isinstance(one, kind)]
    return next(iter(heads), None)


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
        "caption of it is (any hit, as papers print), i2t_mean is the fraction of its captions that are found",
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
                row["metrics"] = _of_rank(name, list(ranks.values())[-1][query])
            yield row | {"found": [names[key] for key in best], "scores": score}


def _of_rank(direction: str, rank: int) -> dict[str, float]:
    """What a query adds to the recalls (any hit), and its reciprocal rank, by which two runs are compared."""
    hits = {f"{direction}/R@{k}": float(rank <= k) for k in RECALL_AT}
    return hits | {f"{direction}/reciprocal rank": 1 / rank}
