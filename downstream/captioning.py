"""Captioning: the decoder writes what the image shows, scored against all references of the image.

Data: images with one or more captions each; rows of a table that name the same image are one image with several
captions. A field ``domain`` (NoCaps) splits the score. `vlp data convert` makes tables of the official files of COCO,
Karpathy's splits, NoCaps and TextCaps.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from downstream.metrics.captioning import caption_metrics, cider_d, rouge_l
from downstream.metrics.java import JavaMetric, java_metrics
from downstream.metrics.tokenize import tokenize
from downstream.nearest import TrainImages, by_embedding, by_pixels, nearest_captions
from downstream.scst import ScoredExample, Scst, ScstConfig, scored_id, settle_scst
from downstream.task import (
    EvalSample,
    R,
    Result,
    TaskConfig,
    batches,
    evaluating,
    gather,
    gather_bad,
    my_share,
    no_labels,
    read_samples,
    seen_samples,
)
from downstream.writing import Answered, decoder_beside, fused_writer, stated_lm
from encoders import TextConfig
from encoders.types import Batch
from objectives import LmConfig, ObjectiveConfig, Seq2SeqMlmConfig
from objectives.base import Encode, Fuse
from objectives.lm import Lm
from vlp.config import build
from vlp.data.asking import ANSWER, DESCRIBE
from vlp.data.fetch import Prepare, pair_example
from vlp.data.loader import DataConfig
from vlp.data.reader import Reader
from vlp.data.records import place_of
from vlp.fusion import NoFusionConfig
from vlp.generate import GenerationConfig, generate_text, room_of, trim
from vlp.generate_masked import generate_masked, masked_writer
from vlp.model import Model
from vlp.passes import memory_of

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig
    from vlp.train.step import Rewrite

logger = logging.getLogger(__name__)

CARRIED = ("image_id", "domain")
"""Fields that predictions carry on."""


@dataclass(frozen=True)
class CaptionSurvey:
    """The caption that the training data have most often."""

    caption: str
    count: int
    captions: int
    """All captions counted."""
    images: TrainImages | None = field(default=None, compare=False)
    """Whose captions the nearest-neighbour floor copies."""
    nearest: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict, compare=False)
    """What it copied, by way and fingerprint of the data: it does not change while a model is trained."""
    references: Mapping[int, Sequence[str]] = field(default_factory=dict, compare=False)
    """Captions of each image, by its id in training; only where sampled captions are held against them (scst)."""


class CaptioningConfig(TaskConfig):
    """Write captions."""

    kind: Literal["captioning"] = "captioning"
    generation: GenerationConfig = Field(default_factory=lambda: build(GenerationConfig, {"method": "beam"}))
    """How captions are written."""
    java: tuple[JavaMetric, ...] = ("METEOR", "SPICE")
    """Metrics of pycocoevalcap that are Java programs, computed where that package and Java are installed, before and
    after a finetuning."""
    neighbours: int = Field(10_000, ge=0)
    """Training images that the nearest-neighbour floor looks through; 0 = no such floor."""
    neighbours_by: str | None = None
    """Checkpoint by whose image embeddings it looks, beside pixels."""
    ask: str = DESCRIBE
    """What the encoder is asked where all that a checkpoint does is answers to instructions (OFA)."""
    scst: ScstConfig | None = None
    """Train on captions that the model draws, each by its CIDEr-D (self-critical sequence training); none = on the
    data's."""

    headline: ClassVar[str] = "CIDEr-D"
    of_data: ClassVar[tuple[str, ...]] = ("neighbours_by",)

    def survey(self, reader: Reader, data: DataConfig) -> CaptionSurvey:
        """Find the most frequent training caption; of equals, the first in the alphabet."""
        bad: dict[str, str] = {}
        counts: Counter[str] = Counter()
        first: dict[str, tuple[int, str]] = {}
        references: dict[int, list[str]] = {}
        for one in read_samples(reader, data, bad, images=False):
            counts.update(one.sample.texts)
            if self.scst is not None:
                references.setdefault(scored_id(one.sample, data), []).extend(one.sample.texts)
            first.setdefault(one.image, (one.index, one.sample.texts[0]))
        if not counts:
            raise ValueError(no_labels("train", len(reader), bad))
        caption, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        images = TrainImages(reader, data, dict(first.values())).some(self.neighbours)
        return CaptionSurvey(caption, count, counts.total(), images, references=references)

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: CaptionSurvey) -> R:
        """Train the decoder on the image tokens; fusion and text blocks, which nothing else reads, are left out.

        Where the user states further objectives (``--objectives.itm {}``), these keep the parts that they need. A
        checkpoint that writes by masks (BEiT-3's seq2seq_mlm) goes on so, unless lm is stated; ones that write with the
        fusion (GIT's lm of memory beside) or answer instructions (OFA) do too.
        """
        if self.scst is not None:
            return self._adapt(settle_scst(run, pretrained), pretrained)
        return self._adapt(run, pretrained)

    def _adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig]) -> R:
        objectives, model = dict(run.objectives), run.model
        by_masks = {name: one for name, one in pretrained.items() if isinstance(one, Seq2SeqMlmConfig)}
        if "lm" not in objectives and (by_masks or any(isinstance(o, Seq2SeqMlmConfig) for o in objectives.values())):
            model = model.model_copy(update={"decoder": None})
            stated = {name: one.over(by_masks.get(name)) for name, one in objectives.items()}
            return run.model_copy(update={"model": model, "objectives": by_masks | stated})
        known = pretrained.get("lm")
        if model.answers_instructions:
            objectives["lm"] = stated_lm(objectives, pretrained, "fused", ANSWER)
            return run.model_copy(update={"objectives": objectives})
        if model.decoder is None and isinstance(known, LmConfig) and known.memory == "beside":
            objectives["lm"] = stated_lm(objectives, pretrained, "beside", known.view)
            return run.model_copy(update={"objectives": objectives})
        objectives["lm"] = stated_lm(objectives, pretrained, "image", "causal")
        decoder = (model.decoder or decoder_beside(model)).model_copy(update={"memory": "image"})
        changes: dict[str, Any] = {"decoder": decoder}
        if len(objectives) == 1:
            # What it shares with a fusion that is about to go is copied instead.
            if getattr(decoder, "share", None) == "all_but_self_attention":
                changes["decoder"] = decoder.model_copy(update={"share": "embeddings"})
            if getattr(model.vision, "depth", None) != 0:  # else the fusion is the vision tower itself (ViLT)
                changes["fusion"] = NoFusionConfig()
            if isinstance(model.text, TextConfig):
                changes["text"] = model.text.model_copy(update={"layers": 0})
        return run.model_copy(update={"model": model.model_copy(update=changes), "objectives": objectives})

    def prepare(self, run: RunConfig) -> Prepare:
        """Return image and one of its captions, drawn anew each time; as an answer where that is how it is written."""
        if run.model.answers_instructions:
            return Answered(self.ask)
        return pair_example if self.scst is None else ScoredExample(run.data)

    def rewrite(self, parts: Parts, survey: CaptionSurvey) -> Rewrite | None:
        """Return what draws captions and weighs them by their scores, where ``scst`` is set."""
        if self.scst is None:
            return None
        writer = _writer(parts.model)
        assert writer is not None
        return Scst(self.scst, parts.tokenizer, writer, survey.references)

    def lacks(self, model: Model) -> str | None:
        """Captioning takes a decoder that reads images, or masks that become words (BEiT-3)."""
        writes = _writer(model) is not None or masked_writer(model) is not None
        return None if writes else "a decoder over images (objective lm, memory image)"

    def evaluate(self, parts: Parts, reader: Reader, survey: CaptionSurvey | None = None) -> Result:
        """Return CIDEr-D, BLEU-1..4, ROUGE-L, METEOR, SPICE and the share of exact matches, of all images.

        Where images have a domain, also of each domain's, as a corpus of its own ("CIDEr-D/near-domain").
        Exact match: equal to a reference after the metrics' own tokenisation (case and punctuation do not count).
        Floors: "most frequent caption", the commonest of the training data for every image; "nearest image", the first
        caption of the training image with the most similar pixels, and, where ``neighbours_by`` names a checkpoint, of
        the one with the most similar embedding.
        """
        bad: dict[str, str] = {}
        first: dict[str, int] = {}
        references: dict[str, list[str]] = {}
        for one in read_samples(reader, parts.run.data, bad, images=False):
            first.setdefault(one.image, one.index)
            references.setdefault(one.image, []).extend(one.sample.texts)
        mine = list(first.values())[my_share(len(first))]
        rows = gather(list(self._captions(parts, seen_samples(parts, reader, bad, indices=mine, texts=False))))
        bad = gather_bad(bad)
        if not rows:
            raise ValueError(no_labels("val", len(reader), bad))
        for row in rows:
            known = references[row["image"]]
            row |= {"references": known, "exact": _is_exact(row["caption"], known)}
        references = {row["image"]: references[row["image"]] for row in rows}
        floors = {}
        if survey is not None:
            floors["most frequent caption"] = _score(dict.fromkeys(references, survey.caption), references)
            for name, captions in self._nearest(parts, reader, survey, list(first.values())).items():
                floors[name] = _score({image: captions.get(image, "") for image in references}, references)
        scored = _score({row["image"]: row["caption"] for row in rows}, references, rows)
        more, reasons = self._more(rows)
        return Result(scored | more, floors, rows, bad, (*self._notes(references, survey), *reasons))

    def _more(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], list[str]]:
        """Metrics of Java and of each domain, and why some of them are not there."""
        parts: dict[str, list[Mapping[str, Any]]] = {"": list(rows)}
        for row in rows:
            if row.get("domain"):
                parts.setdefault(f"/{row['domain']}", []).append(row)
        found: dict[str, float] = {}
        reasons: dict[str, None] = {}
        for suffix, some in sorted(parts.items()):
            captions = {row["image"]: row["caption"] for row in some}
            references = {row["image"]: row["references"] for row in some}
            scores, why_not = java_metrics(captions, references, self.java)
            scores |= _score(captions, references) if suffix else {}
            found |= {name + suffix: value for name, value in scores.items()}
            reasons |= dict.fromkeys(why_not)
        return found, list(reasons)

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the official format of COCO, NoCaps and TextCaps: image_id and caption of each image."""
        lacking = next((row for row in predictions if "image_id" not in row), None)
        if lacking is not None:
            raise ValueError(
                f"task captioning: image {lacking['key']} has no field image_id, by which a submission names it; "
                "convert the official files with vlp data convert"
            )
        keys = [row["image_id"] for row in predictions]
        if all(isinstance(key, str) and key.isdecimal() for key in keys):  # a csv holds integers as text
            keys = [int(key) for key in keys]
        return [{"image_id": key, "caption": row["caption"]} for key, row in zip(keys, predictions, strict=True)]

    def _nearest(
        self, parts: Parts, reader: Reader, survey: CaptionSurvey, indices: Sequence[int]
    ) -> dict[str, dict[str, str]]:
        """Captions of the nearest training images, under the floors' names."""
        if not self.neighbours or survey.images is None:
            return {}
        found, data = {}, parts.run.data
        for way in ("pixels", self.neighbours_by):
            if way is None:
                continue
            known = way, reader.fingerprint
            if known not in survey.nearest:
                describe = by_pixels(data) if way == "pixels" else by_embedding(way, data, parts.model.device)
                survey.nearest[known] = nearest_captions(describe, survey.images, reader, data, indices)
            if survey.nearest[known]:
                found["nearest image" if way == "pixels" else "nearest embedding"] = survey.nearest[known]
        return found

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, image, caption and its score (log-probability over length) for each sample."""
        bad: dict[str, str] = {}
        yield from self._captions(parts, seen_samples(parts, reader, bad, texts=False))
        for key, reason in bad.items():
            logger.warning("%s%s: no caption, %s", key, place_of(key), reason)

    def _captions(self, parts: Parts, samples: Iterator[EvalSample]) -> Iterator[dict[str, Any]]:
        """One row a sample, in order."""
        model = parts.model
        if (missing := self.lacks(model)) is not None:
            raise ValueError(
                f"task captioning: this model lacks {missing}; finetune it with vlp finetune captioning first"
            )
        if model.config.answers_instructions:
            samples = (replace(one, sample=replace(one.sample, texts=(self.ask,))) for one in samples)
        for group, batch in batches(parts, samples, self.batch):
            with evaluating(model):
                ids, scores = self._write(parts, batch)
            for one, each, score in zip(group, ids, scores.tolist(), strict=True):
                known = {name: one.sample.fields[name] for name in CARRIED if name in one.sample.fields}
                caption = parts.tokenizer.decode(each)
                yield {"key": one.sample.key, "image": one.image, **known, "caption": caption, "score": score}

    def _write(self, parts: Parts, batch: Batch) -> tuple[list[list[int]], Tensor]:
        """Ids of a caption of each image, and their scores [B]."""
        model, words = parts.model, parts.tokenizer.vocabulary
        writer = _writer(model)
        room = parts.run.data.max_length if writer is None else room_of(model)
        length = min(self.generation.max_length, room)
        generation = self.generation.model_copy(update={"max_length": length})
        if writer is None:
            found = generate_masked(model, batch.images["clean"], words, generation)
            return trim(found.ids, 1, words.sep), found.scores
        if model.config.answers_instructions:
            memory = memory_of(model.run([Fuse()], batch)[Fuse()], "both")
        else:
            memory = model.run([Encode("image")], batch)[Encode("image")]
        return generate_text(model, memory, words, generation, objective=writer)

    def _notes(self, references: Mapping[str, Sequence[str]], survey: CaptionSurvey | None) -> tuple[str, ...]:
        notes = [
            f"{len(references)} images, {sum(map(len, references.values()))} references; CIDEr-D is in 0..10 "
            "(papers print 100 times it), its document frequencies are those of these references"
        ]
        if survey is None:
            notes.append("no training data were named, so the floor is unknown; name them with --data.train")
        else:
            notes.append(
                f"most frequent caption: {survey.caption!r}, {survey.count} of {survey.captions} training captions"
            )
        return tuple(notes)


def _writer(model: Model) -> str | None:
    """Name of the objective whose head writes captions, with the decoder or, where there is none, the fusion."""
    if model.config.answers_instructions:
        return fused_writer(model)
    memory = "beside" if model.decoder is None else "image"
    return next((n for n, one in model.objectives.items() if isinstance(one, Lm) and one.config.memory == memory), None)


def _is_exact(caption: str, references: Iterable[str]) -> bool:
    return tokenize(caption) in [tokenize(reference) for reference in references]


def _score(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], rows: Sequence[dict[str, Any]] = ()
) -> dict[str, float]:
    """All metrics; ``rows``, in the captions' order, are told what each adds to those that are means."""
    exact = [float(_is_exact(caption, references[name])) for name, caption in captions.items()]
    if rows:
        said = [tokenize(caption) for caption in captions.values()]
        known = [[tokenize(reference) for reference in references[name]] for name in captions]
        for row, *values in zip(rows, cider_d(said, known)[1], rouge_l(said, known)[1], exact, strict=True):
            row["metrics"] = dict(zip(("CIDEr-D", "ROUGE-L", "exact match"), values, strict=True))
    return caption_metrics(captions, references) | {"exact match": sum(exact) / len(exact)}
