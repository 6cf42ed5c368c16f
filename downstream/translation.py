"""Multimodal translation: a sentence about an image, in another language (Multi30k; Elliott et al. 2016).

The decoder reads image and source sentence fused and writes the target sentence. Source and target share the
checkpoint's vocabulary, which therefore has to know both languages.
Data: image, ``source``, and ``target`` (a text, or a list of several translations).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from downstream.metrics.translation import bleu4, meteor, need_sacrebleu
from downstream.task import (
    EvalSample,
    R,
    Result,
    TaskConfig,
    batches,
    blanked,
    evaluating,
    labelled_rows,
    no_labels,
    only_text,
    read_samples,
    seen_samples,
)
from downstream.writing import fused_writer, writing
from encoders.types import Batch
from objectives import ObjectiveConfig
from objectives.base import Fuse
from vlp.config import build
from vlp.data.batch import Example
from vlp.data.fetch import Prepare
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, Sample
from vlp.data.records import place_of
from vlp.data.tokenizer import Tokenizer
from vlp.generate import GenerationConfig, generate_text, room_of
from vlp.model import Model
from vlp.passes import memory_of

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

logger = logging.getLogger(__name__)

WRITTEN = "lm:translation"
"""Text view of the translation that the decoder learns to write."""
BLEU, METEOR = "BLEU-4", "METEOR"


@dataclass(frozen=True)
class TranslationSurvey:
    """The translation that the training data have most often."""

    target: str
    count: int
    samples: int


def read_targets(sample: Sample, name: str) -> tuple[str, ...]:
    """Return the translations of a sample, stripped; none where there are none.

    Raises:
        BadSample: the field holds something else than texts.
    """
    value = sample.fields.get(name)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str) for one in listed):
        raise BadSample(sample.key, f"{name} holds something else than texts")
    return tuple(one.strip() for one in listed if one.strip())


class TranslationConfig(TaskConfig):
    """Translate sentences about images."""

    kind: Literal["translation"] = "translation"
    target: str = "target"
    """Field with the translation, or a list of several."""
    language: str = "de"
    """Of the translations, two letters; METEOR asks for it."""
    lowercase: bool = False
    """BLEU without regard to case, as in much of the work on Multi30k."""
    tokenizer: str = "13a"
    """BLEU's tokenizer, by sacrebleu's name."""
    meteor: bool = True
    """Also METEOR, a Java program, where it can be run; during training it is not."""
    meteor_jar: str | None = None
    """meteor-1.5.jar with its data beside it; none = pycocoevalcap's, which knows English alone."""
    blank_images: bool = False
    """Also translate with the images blanked: what the model knows from the sentence alone. Doubles the time."""
    generation: GenerationConfig = Field(
        default_factory=lambda: build(GenerationConfig, {"method": "beam", "max_length": 60})
    )
    """How translations are written."""

    headline: ClassVar[str] = BLEU
    of_data: ClassVar[tuple[str, ...]] = ("target", "meteor_jar")

    def settings(self, data: DataConfig) -> DataConfig:
        """Texts are source sentences: the field `source` unless the user names another."""
        return data if data.text is not None else data.model_copy(update={"text": "source"})

    def survey(self, reader: Reader, data: DataConfig) -> TranslationSurvey:
        """Find the most frequent translation; of equals, the first in the alphabet.

        Raises:
            ValueError: there are no translations, or sacrebleu, which will be needed, is not installed.
        """
        need_sacrebleu()
        bad: dict[str, str] = {}
        labelled = self._labelled(read_samples(reader, data, bad, images=False, several=False), bad)
        counts = Counter(target for _, targets in labelled for target in targets)
        if not counts:
            raise ValueError(no_labels("train", len(reader), bad))
        target, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        return TranslationSurvey(target, count, counts.total())

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: TranslationSurvey) -> R:
        """Train the decoder to write the translation from the fused source sentence."""
        model, objectives = writing(run.model, run.objectives, pretrained, WRITTEN)
        return run.model_copy(update={"model": model, "objectives": objectives})

    def prepare(self, run: RunConfig) -> Prepare:
        """Return source sentence and one of its translations, drawn anew each time."""
        return TranslationPrepare(self.target)

    def lacks(self, model: Model) -> str | None:
        """Translating takes a decoder that reads the fused source sentence."""
        return None if fused_writer(model) is not None else "a decoder over fused texts (objective lm, memory fused)"

    def evaluate(self, parts: Parts, reader: Reader, survey: TranslationSurvey | None = None) -> Result:
        """Return BLEU-4 of the corpus in 0..1, METEOR where it can be computed, and the share of exact matches.

        Floors: "copy" repeats the source sentence, "most frequent" gives the commonest training translation to every
        sentence; with ``blank_images`` the same model on grey images.
        """
        need_sacrebleu()
        rows, targets, bad = labelled_rows(
            parts, reader, self._labelled, lambda samples: self._translations(parts, samples)
        )
        for row, given in zip(rows, targets, strict=True):
            row |= {"targets": list(given), "metrics": {"exact match": float(_is_exact(row["translation"], given))}}
        metrics, notes = self._score([row["translation"] for row in rows], targets, java=self.meteor)
        floors = {"copy": self._score([row["source"] for row in rows], targets, java=False)[0]}
        if survey is not None:
            floors["most frequent"] = self._score([survey.target] * len(rows), targets, java=False)[0]
            notes.append(f"most frequent: {survey.target!r}, {survey.count} of {survey.samples} training translations")
        else:
            notes.append("no training data were named, so one floor is unknown; name them with --data.train")
        if self.blank_images:
            floors["blank images"] = self._score([row["blank_translation"] for row in rows], targets, java=False)[0]
        if (share := unwritable(parts.tokenizer, targets)) > 0:
            notes.append(f"{share:.1%} of the words of the translations cannot be written with this vocabulary")
        return Result(metrics, floors, rows, bad, tuple(notes))

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, image, source, translation and its score (log-probability over length) for each sentence."""
        bad: dict[str, str] = {}
        yield from self._translations(parts, seen_samples(parts, reader, bad, several=False))
        for key, reason in bad.items():
            logger.warning("%s%s: no translation, %s", key, place_of(key), reason)

    def _labelled(
        self, samples: Iterable[EvalSample], bad: dict[str, str]
    ) -> Iterator[tuple[EvalSample, tuple[str, ...]]]:
        for one in samples:
            try:
                targets = read_targets(one.sample, self.target)
            except BadSample as error:
                bad[error.key] = error.reason
                continue
            if targets:
                yield one, targets
            else:
                bad[one.sample.key] = f"no {self.target}; name the field of the translations with --task.target"

    def _translations(self, parts: Parts, samples: Iterator[EvalSample]) -> Iterator[dict[str, Any]]:
        """One row a sentence, in order."""
        if (missing := self.lacks(parts.model)) is not None:
            raise ValueError(
                f"task translation: this model lacks {missing}; finetune it with vlp finetune translation first"
            )
        for group, batch in batches(parts, samples, self.batch):
            with evaluating(parts.model):
                found = self._write(parts, batch)
                blank = self._write(parts, blanked(batch)) if self.blank_images else found
            for one, (text, score), (without, _) in zip(group, found, blank, strict=True):
                row: dict[str, Any] = {"key": one.sample.key, "image": one.image, "source": one.sample.texts[0]}
                row |= {"translation": text, "score": score}
                yield row | ({"blank_translation": without} if self.blank_images else {})

    def _write(self, parts: Parts, batch: Batch) -> list[tuple[str, float]]:
        """Translation and its score for each sentence."""
        model = parts.model
        assert model.decoder is not None
        memory = memory_of(model.run([Fuse()], batch)[Fuse()], model.decoder.config.memory)
        config = self.generation.model_copy(update={"max_length": min(self.generation.max_length, room_of(model))})
        ids, scores = generate_text(model, memory, parts.tokenizer.vocabulary, config, objective=fused_writer(model))
        return [(parts.tokenizer.decode(each), score) for each, score in zip(ids, scores.tolist(), strict=True)]

    def _score(
        self, translations: Sequence[str], targets: Sequence[Sequence[str]], java: bool = True
    ) -> tuple[dict[str, float], list[str]]:
        """Metrics and how they were computed."""
        bleu, signature = bleu4(translations, targets, lowercase=self.lowercase, tokenizer=self.tokenizer)
        exact = [_is_exact(one, given) for one, given in zip(translations, targets, strict=True)]
        metrics = {BLEU: bleu, "exact match": sum(exact) / len(exact)}
        notes = [f"BLEU-4 is in 0..1 (papers print 100 times it), sacrebleu {signature}"]
        if java:
            score, how = meteor(translations, targets, self.language, self.meteor_jar)
            notes.append(how)
            if score is not None:
                metrics[METEOR] = score
        return metrics, notes


@dataclass(frozen=True)
class TranslationPrepare:
    """A training sample -> its example; picklable, for loader workers."""

    target: str

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Example:
        """Make the example.

        Raises:
            BadSample: no source sentence or no translation.
        """
        targets = read_targets(sample, self.target)
        if not targets:
            raise BadSample(sample.key, f"no {self.target}")
        chosen = targets[int(generator.integers(len(targets)))]
        return Example(sample.key, sample.images, only_text(sample), {WRITTEN: chosen})


def unwritable(tokenizer: Tokenizer, targets: Sequence[Sequence[str]]) -> float:
    """Return the share of the translations' words that are not the same after the tokenizer, case aside, in 0..1."""
    lost = total = 0
    for target in (one for given in targets for one in given):
        words = re.findall(r"\w+", target.lower())
        known = set(re.findall(r"\w+", tokenizer.decode(tokenizer.encode(target, 512)[0].tolist()).lower()))
        total, lost = total + len(words), lost + sum(word not in known for word in words)
    return lost / max(total, 1)


def _is_exact(translation: str, targets: Sequence[str]) -> bool:
    """Whether the words are those of a target; case and punctuation do not count."""
    return _plain(translation) in [_plain(target) for target in targets]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
