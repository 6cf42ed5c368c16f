"""Visual dialogue: which of the candidates answers a question about the image, given what was said before (VisDial).

Candidates are ranked by the matching head, which reads image, question, candidate and history together; or by how
likely the decoder finds them, after one look at image, question and history. A text is cut at its end, so the newest
round stands right behind the question and the caption last.
Data: image, question, caption, ``history`` (pairs of question and answer, oldest first), ``options`` (the candidates),
``answer_index``, and ``relevance`` of the candidates where there are dense annotations; image_id and round_id.
Shapes: B questions, A candidates, L text length.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from downstream.dialogue_data import CARRIED, Round, context, read_round, with_candidate
from downstream.metrics.dialogue import chance_ndcg, chance_sparse, ndcg, ranks_of, sparse_metrics
from downstream.task import (
    EvalSample,
    R,
    Result,
    TaskConfig,
    evaluating,
    gather,
    gather_bad,
    groups,
    make_batch,
    my_share,
    no_labels,
    read_samples,
    seen_samples,
)
from downstream.writing import fused_writer, writing
from encoders.types import Texts, Tokens
from objectives import ItmConfig, LmConfig, ObjectiveConfig
from objectives.base import Draw, Fuse, Rows, ViewText
from objectives.itm import Itm
from objectives.lm import text_losses
from objectives.rank import Rank
from vlp.config import build
from vlp.data.asking import ANSWER
from vlp.data.batch import Example, pad_texts
from vlp.data.fetch import Prepare
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Reader, Sample
from vlp.data.records import place_of
from vlp.generate import GenerationConfig, generate_text, room_of, writer_of
from vlp.model import Model
from vlp.passes import memory_of

if TYPE_CHECKING:
    from vlp.run import Parts, RunConfig

logger = logging.getLogger(__name__)

Asked: TypeAlias = tuple[EvalSample, Round]

_PAIRS = Fuse(rows="pairs")


@dataclass(frozen=True)
class DialogueSurvey:
    """How often the training dialogues give each answer: what answering blindly takes."""

    answers: Mapping[str, int]
    by_question: Mapping[str, Mapping[str, int]]
    samples: int

    def blind(self, one: Round) -> list[int]:
        """Return the candidates' ranks by how often they answered this question, then any question."""
        own = self.by_question.get(_same(one.question), {})
        keys = [(own.get(_same(option), 0), self.answers.get(_same(option), 0)) for option in one.options]
        ordered = sorted(set(keys))
        return ranks_of([float(ordered.index(key)) for key in keys])

    def majority(self, one: Round) -> list[int]:
        """Return the candidates' ranks by how often they answered any question."""
        return ranks_of([float(self.answers.get(_same(option), 0)) for option in one.options])


class DialogueConfig(TaskConfig):
    """Answer questions of a dialogue by ranking candidates."""

    kind: Literal["dialogue"] = "dialogue"
    generative: bool = False
    """Train the decoder to write the answer, and rank by it; else train the matching head."""
    by: Literal["auto", "matching", "writing"] = "auto"
    """What ranks the candidates. `auto`: writing where `generative` or where there is no matching head."""
    history: int = Field(10, ge=0)
    """Rounds before the question that are read, the newest ones."""
    per_word: bool = False
    """Rank by the mean log-probability of a candidate's words instead of the sum (writing)."""
    pairs: int = Field(512, ge=1)
    """Candidates that the fusion or the decoder reads at once."""
    generation: GenerationConfig = Field(default_factory=lambda: build(GenerationConfig, {"max_length": 20}))
    """How answers are written where no candidates are given."""

    headline: ClassVar[str] = "MRR"

    def settings(self, data: DataConfig) -> DataConfig:
        """Texts are questions: the field of that name unless the user names another."""
        return data if data.text is not None else data.model_copy(update={"text": "question"})

    def survey(self, reader: Reader, data: DataConfig) -> DialogueSurvey:
        """Count the answers of the training dialogues."""
        bad: dict[str, str] = {}
        answers: Counter[str] = Counter()
        by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for _, one in self._rounds(read_samples(reader, data, bad, images=False, several=False), bad):
            if one.answer is not None:
                answers[_same(one.options[one.answer])] += 1
                by_question[_same(one.question)][_same(one.options[one.answer])] += 1
        if not answers:
            raise ValueError(no_labels("train", len(reader), bad))
        return DialogueSurvey(answers, by_question, answers.total())

    def adapt(self, run: R, pretrained: Mapping[str, ObjectiveConfig], survey: DialogueSurvey) -> R:
        """Train matching of true and false answers, or writing of the true one."""
        objectives, model = dict(run.objectives), run.model
        if self.generative:
            model, objectives = writing(model, objectives, pretrained, ANSWER)
        else:
            known = next((one for one in pretrained.values() if isinstance(one, ItmConfig)), ItmConfig())
            stated = objectives.get("itm", ItmConfig()).over(known)
            objectives["itm"] = stated.model_copy(update={"scheme": "given", "masked": False})
            if not any(isinstance(one, LmConfig) for one in objectives.values()):
                model = model.model_copy(update={"decoder": None})
        return run.model_copy(update={"model": model, "objectives": objectives})

    def prepare(self, run: RunConfig) -> Prepare:
        """Return a true or, half of the time, a false candidate in its context; or context and true answer."""
        return DialoguePrepare(self.history, self.generative)

    def lacks(self, model: Model) -> str | None:
        """It takes a matching head, or a decoder that reads the fused question."""
        if self._ranker(model) is not None:
            return None
        matching, writing = "a matching head (objective itm)", "a decoder over fused texts (objective lm, memory fused)"
        return {"matching": matching, "writing": writing, "auto": f"{matching} or {writing}"}[self.by]

    def evaluate(self, parts: Parts, reader: Reader, survey: DialogueSurvey | None = None) -> Result:
        """Return MRR, R@1, 5, 10, the mean rank, and NDCG where there are dense annotations.

        Floors: "chance", a random order; of the training data "majority", by how often a candidate was any answer, and
        "question only", first by how often it answered the same question.
        """
        bad: dict[str, str] = {}
        mine = range(len(reader))[my_share(len(reader))]
        samples = self._rounds(seen_samples(parts, reader, bad, several=False, indices=mine), bad, options=True)
        found = gather(list(self._ranked(parts, samples)))
        bad = gather_bad(bad)
        if not any(one.answer is not None for _, one in found):
            if found:
                raise ValueError("data.val: no question has its answer (answer_index); rank them with vlp predict")
            raise ValueError(no_labels("val", len(reader), bad))
        rounds = [one for _, one in found]
        rows = [
            row if one.answer is None else row | {"answer": one.options[one.answer], "rank": row["ranks"][one.answer]}
            for row, one in found
        ]
        for row in rows:
            if "rank" in row:
                row["metrics"] = {"MRR": 1 / row["rank"]} | {f"R@{k}": float(row["rank"] <= k) for k in (1, 5, 10)}
        floors = {"chance": _chance(rounds)}
        if survey is not None:
            floors["majority"] = _metrics(rounds, [survey.majority(one) for one in rounds])
            floors["question only"] = _metrics(rounds, [survey.blind(one) for one in rounds])
        dense = sum(one.relevance is not None for one in rounds)
        notes = [
            f"candidates are ranked by {self._ranker(parts.model)}, {self.history} rounds of history are read",
            f"NDCG is of {dense} questions with dense annotations, the others of all {len(rows)}"
            if dense
            else "no dense annotations, so no NDCG",
        ]
        if survey is None:
            notes.append("no training data were named, so the blind floors are unknown; name them with --data.train")
        return Result(_metrics(rounds, [row["ranks"] for row in rows]), floors, rows, bad, tuple(notes))

    def predict(self, parts: Parts, reader: Reader) -> Iterator[dict[str, Any]]:
        """Yield key, image, question, and the best candidate with all ranks; or the written answer without any."""
        bad: dict[str, str] = {}
        for one, asked in self._rounds(seen_samples(parts, reader, bad, several=False), bad):
            if asked.options:
                yield from (row for row, _ in self._ranked(parts, iter([(one, asked)])))
            elif (writer := fused_writer(parts.model)) is None:
                bad[one.sample.key] = "no options to rank, and the model cannot write"
            else:
                yield self._row(one, asked) | {"best": self._write(parts, one, asked, writer)}
        for key, reason in bad.items():
            logger.warning("%s%s: no answer, %s", key, place_of(key), reason)

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return EvalAI's format: image_id, round_id and the ranks of the candidates, each in its own order.

        Raises:
            ValueError: a row lacks one of them.
        """
        for row in predictions:
            if missing := [name for name in ("image_id", "round_id", "ranks") if row.get(name) is None]:
                raise ValueError(f"submission: row {row.get('key')!r} lacks {', '.join(missing)}; convert the data")
        return [
            {"image_id": int(row["image_id"]), "round_id": int(row["round_id"]), "ranks": list(row["ranks"])}
            for row in predictions
        ]

    def _ranker(self, model: Model) -> str | None:
        """What ranks: matching or writing."""
        can = [
            name for name, one in (("matching", _matcher(model)), ("writing", fused_writer(model))) if one is not None
        ]
        if self.by != "auto":
            return self.by if self.by in can else None
        return "writing" if self.generative and "writing" in can else next(iter(can), None)

    def _rounds(
        self, samples: Iterable[EvalSample], bad: dict[str, str], options: bool = False
    ) -> Iterator[tuple[EvalSample, Round]]:
        for one in samples:
            try:
                found = read_round(one.sample)
                if options and not found.options:
                    raise BadSample(one.sample.key, "no options, the candidate answers")
            except BadSample as error:
                bad[error.key] = error.reason
            else:
                yield one, found

    def _row(self, one: EvalSample, asked: Round) -> dict[str, Any]:
        row = {"key": one.sample.key, "image": one.image}
        row |= {name: one.sample.fields[name] for name in CARRIED if name in one.sample.fields}
        return row | {"question": asked.question}

    def _ranked(self, parts: Parts, samples: Iterator[Asked]) -> Iterator[tuple[dict[str, Any], Round]]:
        """Row and round of each question, in order."""
        ranker = self._ranker(parts.model)
        if ranker is None:
            missing = self.lacks(parts.model)
            raise ValueError(f"task dialogue: this model lacks {missing}; finetune it with vlp finetune dialogue first")
        score: Callable[[Parts, list[Asked]], list[Tensor]] = self._match if ranker == "matching" else self._likelihoods
        for group in groups(samples, max(1, self.pairs // 100)):
            with evaluating(parts.model):
                scores = score(parts, group)
            for (one, asked), each in zip(group, scores, strict=True):
                ranks = ranks_of(each.tolist())
                yield self._row(one, asked) | {"best": asked.options[ranks.index(1)], "ranks": ranks}, asked

    def _match(self, parts: Parts, group: list[Asked]) -> list[Tensor]:
        """Matching logits [A] of each question's candidates; an image is encoded once for its questions here."""
        model, words, data = parts.model, parts.tokenizer, parts.run.data
        head = _matcher(model)
        assert head is not None
        first: dict[str, Asked] = {}
        for one, asked in group:
            first.setdefault(one.image, (one, asked))
        place = {image: number for number, image in enumerate(first)}
        batch = make_batch(parts, [one.shown("") for one, _ in first.values()])
        texts = [with_candidate(asked, option, self.history) for _, asked in group for option in asked.options]
        image = [place[one.image] for one, asked in group for _ in asked.options]
        found = []
        for start in range(0, len(texts), self.pairs):
            some = texts[start : start + self.pairs]
            ids = [ViewText(words.encode(text, data.max_length)[0]) for text in some]
            view = pad_texts(ids, "full", words.vocabulary.pad, data.max_length)
            at = torch.tensor(image[start : start + self.pairs], device=model.device)
            rows = Rows(at, torch.arange(len(some), device=model.device))
            given = replace(batch, texts={"clean": view}).to(model.device)
            fused = model.run([_PAIRS], given, rows={"pairs": rows})[_PAIRS]
            found.append(head.score(fused.pooled).float().cpu())
        return list(torch.cat(found).split([len(asked.options) for _, asked in group]))

    def _likelihoods(self, parts: Parts, group: list[Asked]) -> list[Tensor]:
        """Log-probabilities [A] of each question's candidates; image, question and history are fused once."""
        name = fused_writer(parts.model)
        assert name is not None
        memory, found = self._memory(parts, group), []
        for row, (_, asked) in enumerate(group):
            scores, words = score_texts(parts, memory, row, asked.options, name, self.pairs)
            found.append(scores / words if self.per_word else scores)
        return found

    def _memory(self, parts: Parts, group: Sequence[Asked]) -> Tokens:
        """What the decoder reads of each question."""
        assert parts.model.decoder is not None
        examples = [one.shown(context(asked, self.history)) for one, asked in group]
        fused = parts.model.run([Fuse()], make_batch(parts, examples))[Fuse()]
        return memory_of(fused, parts.model.decoder.config.memory)

    def _write(self, parts: Parts, one: EvalSample, asked: Round, writer: str) -> str:
        """An answer without candidates."""
        room = min(self.generation.max_length, room_of(parts.model))
        with evaluating(parts.model):
            memory = self._memory(parts, [(one, asked)])
            config = self.generation.model_copy(update={"max_length": room})
            ids, _ = generate_text(parts.model, memory, parts.tokenizer.vocabulary, config, objective=writer)
        return parts.tokenizer.decode(ids[0])


@torch.no_grad()
def score_texts(
    parts: Parts, memory: Tokens, row: int, texts: Sequence[str], objective: str, most: int
) -> tuple[Tensor, Tensor]:
    """Return the log-probability [A] of each text as the decoder's answer to one memory row, and of how many words
    (the end among them) it is the sum [A]; float32 on the CPU.

    Args:
        parts: a model with a decoder.
        memory: what the decoder reads, states [B, S, D].
        row: which of it.
        texts: A of them.
        objective: name of the objective of kind lm whose head scores.
        most: texts at once.
    """
    decoder, writer = writer_of(parts.model, objective)
    assert decoder is not None
    words, device = parts.tokenizer, parts.model.device
    view = writer.views[writer.config.view]
    length = min(parts.run.data.max_length, room_of(parts.model))
    found, number = [], []
    for start in range(0, len(texts), most):
        some = texts[start : start + most]
        made = [view.make(*words.encode(text, length), words.vocabulary, Draw().sample("", 0)) for text in some]
        padded = pad_texts(made, "causal", words.vocabulary.pad)
        assert padded.labels is not None
        given = Texts(padded.ids.to(device), padded.keep.to(device), "causal", labels=padded.labels.to(device))
        states = decoder(given, memory, torch.full((len(some),), row, device=device)).states
        found.append(-text_losses(writer.head, states, given).float().cpu())
        number.append((padded.labels != -100).sum(1).float())
    return torch.cat(found), torch.cat(number)


@dataclass(frozen=True)
class DialoguePrepare:
    """A training sample -> its example; picklable, for loader workers."""

    history: int
    generative: bool

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Example:
        """Make the example.

        Raises:
            BadSample: no answer, or no other candidate to make a false one of.
        """
        one = read_round(sample)
        if one.answer is None:
            raise BadSample(sample.key, "no answer_index, so nothing to learn")
        if self.generative:
            other = {ANSWER: one.options[one.answer]}
            return Example(sample.key, sample.images, context(one, self.history), other)
        true, chosen = bool(generator.random() < 0.5), one.answer
        others = [number for number, option in enumerate(one.options) if option != one.options[one.answer]]
        if not true:
            if not others:
                raise BadSample(sample.key, "no candidate besides the answer, so none is false")
            chosen = others[int(generator.integers(len(others)))]
        text = with_candidate(one, one.options[chosen], self.history)
        return Example(sample.key, sample.images, text, targets={"match": np.array(int(true), dtype=np.int64)})


def _matcher(model: Model) -> Itm | Rank | None:
    if model.fusion is None:
        return None
    return next((one for one in model.objectives.values() if isinstance(one, Itm | Rank)), None)


def _same(text: str) -> str:
    return " ".join(text.lower().split()).rstrip("?.! ")


def _metrics(rounds: Sequence[Round], ranks: Sequence[Sequence[int]]) -> dict[str, float]:
    """NDCG of the questions with dense annotations, the rest of those with an answer."""
    gains = [ndcg(one, asked.relevance) for asked, one in zip(rounds, ranks, strict=True) if asked.relevance]
    dense = [gain for gain in gains if gain is not None]
    found = {} if not dense else {"NDCG": sum(dense) / len(dense)}
    given = [one[asked.answer] for asked, one in zip(rounds, ranks, strict=True) if asked.answer is not None]
    return found | sparse_metrics(given)


def _chance(rounds: Sequence[Round]) -> dict[str, float]:
    gains = [chance_ndcg(one.relevance) for one in rounds if one.relevance]
    dense = [gain for gain in gains if gain is not None]
    found = {} if not dense else {"NDCG": sum(dense) / len(dense)}
    return found | chance_sparse([len(one.options) for one in rounds if one.answer is not None])
