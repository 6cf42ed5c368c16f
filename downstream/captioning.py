"""Captioning: the decoder writes what the image shows, scored against all references of the image.

Data: images with one or more captions each; rows of a table that name the same image are one image with several
captions.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from downstream.metrics.captioning import caption_metrics
from downstream.metrics.tokenize import tokenize
from downstream.task import (
    EvalSample,
    R,
    Result,
    TaskConfig,
    batches,
    decoder_beside,
    evaluating,
    gather,
    gather_bad,
    my_share,
    no_labels,
    read_samples,
)
from encoders import TextConfig
from objectives import LmConfig, ObjectiveConfig
from objectives.base import Encode
from objectives.lm import Lm
from vlp.config import build
from vlp.data.fetch import Prepare, pair_example
from vlp.data.loader import DataConfig
from vlp.data.reader import Reader
from vlp.fusion import NoFusionConfig
from vlp.generate import GenerationConfig, generate_text
from vlp.model import Model

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionSurvey:
    """The caption that the training data have most often."""

    caption: str
    count: int
    captions: int
    """All captions counted."""


class CaptioningConfig(TaskConfig):
    """Write captions."""

    kind: Literal["captioning"] = "captioning"
    generation: GenerationConfig = Field(default_factory=lambda: build(GenerationConfig, {"method": "beam"}))
    """How captions are written."""

    headline: ClassVar[str] = "CIDEr-D"

    def survey(self, reader: Reader, data: DataConfig) -> CaptionSurvey:
        """Find the most frequent training caption; of equals, the first in the alphabet."""
        bad: dict[str, str] = {}
        counts = Counter(text for one in read_samples(reader, data, bad, images=False) for text in one.sample.texts)
        if not counts:
            raise ValueError(no_labels("train", len(reader), bad))
        caption, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        return CaptionSurvey(caption, count, counts.total())

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: CaptionSurvey) -> R:
        """Train the decoder on the image tokens; fusion and text blocks, which nothing else reads, are left out.

        Where the user states further objectives (``--objectives.itm {}``), these keep the parts that they need.
        """
        objectives, model = dict(run.objectives), run.model
        known = pretrained.get("lm")
        if not (isinstance(known, LmConfig) and known.memory == "image"):
            known = LmConfig()
        objectives["lm"] = objectives.get("lm", known).model_copy(update={"memory": "image", "view": "causal"})
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
        """Return image and one of its captions, drawn anew each time."""
        return pair_example

    def lacks(self, model: Model) -> str | None:
        """Captioning takes a decoder that reads images."""
        return None if _writer(model) is not None else "a decoder over images (objective lm, memory image)"

    def evaluate(self, parts: Parts, reader: Reader, survey: CaptionSurvey | None = None) -> Result:
        """Return CIDEr-D, BLEU-1..4, ROUGE-L and the share of exact matches, of all images.

        Exact match: equal to a reference after the metrics' own tokenisation (case and punctuation do not count).
        Floor: "most frequent caption", the commonest of the training data for every image.
        """
        bad: dict[str, str] = {}
        first: dict[str, int] = {}
        references: dict[str, list[str]] = {}
        for one in read_samples(reader, parts.run.data, bad, images=False):
            first.setdefault(one.image, one.index)
            references.setdefault(one.image, []).extend(one.sample.texts)
        mine = list(first.values())[my_share(len(first))]
        rows = gather(list(self._captions(parts, read_samples(reader, parts.run.data, bad, indices=mine, texts=False))))
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
        return Result(
            _score({row["image"]: row["caption"] for row in rows}, references),
            floors,
            rows,
            bad,
            self._notes(references, survey),
        )

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, image, caption and its score (log-probability over length) for each sample."""
        bad: dict[str, str] = {}
        yield from self._captions(parts, read_samples(reader, parts.run.data, bad, texts=False))
        for key, reason in bad.items():
            logger.warning("%s: no caption, %s", key, reason)

    def _captions(self, parts: Parts, samples: Iterator[EvalSample]) -> Iterator[dict[str, Any]]:
        """One row a sample, in order."""
        model = parts.model
        if (missing := self.lacks(model)) is not None:
            raise ValueError(
                f"task captioning: this model lacks {missing}; finetune it with vlp finetune captioning first"
            )
        assert model.decoder is not None
        length = min(self.generation.max_length, model.decoder.embeddings.max_length)
        generation = self.generation.model_copy(update={"max_length": length})
        for group, batch in batches(parts, samples, self.batch):
            with evaluating(model):
                memory = model.run([Encode("image")], batch)[Encode("image")]
                ids, scores = generate_text(
                    model, memory, parts.tokenizer.vocabulary, generation, objective=_writer(model)
                )
            for one, each, score in zip(group, ids, scores.tolist(), strict=True):
                yield {
                    "key": one.sample.key,
                    "image": one.image,
                    "caption": parts.tokenizer.decode(each),
                    "score": score,
                }

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
    """Name of the objective whose head writes captions."""
    if model.decoder is None:
        return None
    return next(
        (n for n, one in model.objectives.items() if isinstance(one, Lm) and one.config.memory == "image"), None
    )


def _is_exact(caption: str, references: Iterable[str]) -> bool:
    return tokenize(caption) in [tokenize(reference) for reference in references]


def _score(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    exact = [_is_exact(caption, references[name]) for name, caption in captions.items()]
    return caption_metrics(captions, references) | {"exact match": sum(exact) / len(exact)}
