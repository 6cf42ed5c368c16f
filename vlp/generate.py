"""Writing text: greedy, beam and nucleus decoding over any model that gives the next word's logits.

The algorithms know a model only as a :class:`Stepper`. Lengths count all ids from the first on, the prompt included;
results follow transformers' `generate`, so that published captioning settings mean the same here.
Shapes: B rows asked for, K beams, N = B x K rows run, L text length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import Cache
from encoders.text import TextEmbeddings, TextEncoder
from encoders.types import Texts, Tokens, Vocabulary
from objectives.base import Draw
from objectives.lm import Lm
from vlp.config import Config
from vlp.fusion.single import SingleStream
from vlp.model import Model
from vlp.multimodal import AnyDecoder

NEVER = -1e9
"""Score of a beam that cannot win; finite, so that sums of it stay comparable."""


class GenerationConfig(Config):
    """How text is written."""

    method: Literal["greedy", "beam", "nucleus"] = "greedy"
    """The likeliest next word; the likeliest text of `beams` kept at a time; or a draw from the likeliest words."""
    beams: int = Field(3, ge=1)
    """Texts kept at a time (beam)."""
    length_penalty: float = 1.0
    """A text's score is its log-probability over (words written) ** this; > 0 favours long texts (beam)."""
    score_length: Literal["written", "all", "whole"] = "written"
    """Which ids that length counts. `written`: words written, and the end. `all`: from the first id on, the prompt
    included and the end not, as transformers 4.15 did for the captions that BLIP and ALBEF published. `whole`: from the
    first id to the end, where the search also goes on until no text could win (BEiT-3, OSCAR) (beam)."""
    early_stopping: bool = False
    """Stop as soon as `beams` texts have ended, also where another could still win (beam)."""
    min_length: int = Field(0, ge=0)
    """Ids before which the text may not end, prompt included."""
    max_length: int = Field(30, ge=2)
    """Ids at which the text stops, prompt included."""
    force_end: bool = False
    """The last id that there is room for is the end (open_clip's CoCa; greedy, nucleus)."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Draw from the fewest words whose probabilities sum to this (nucleus)."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits before the draw (nucleus)."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Divides the positive logits, and multiplies the negative ones, of ids that the text has already."""
    seed: int = 0
    """Of the draws (nucleus)."""


class Stepper(Protocol):
    """A model that reads texts from left to right and remembers what it has read."""

    def step(self, ids: Tensor) -> Tensor:
        """Read the newest ids [N, L'] of each row -> logits [N, V] of the next word."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Go on with the rows ``index`` [M], in that order; a row may be taken several times."""
        ...


@dataclass(frozen=True)
class Generated:
    """Texts and how likely they are."""

    ids: Tensor
    """[B, L] int64, prompt first, padded after the last id."""
    scores: Tensor
    """[B] log-probability of what was written, over its length ** length_penalty."""


class DecoderStepper:
    """Our decoder and a head over its states, reading a memory.

    Args:
        decoder: in evaluation mode.
        head: states [N, D] -> logits [N, V].
        memory: what the decoder reads, [S, M, D].
        rows: [B] int64, the memory row of each text; None: row b reads memory b.
        use_cache: keep keys and values of what was read; without, everything is read again at each step (for tests).
    """

    def __init__(
        self, decoder: AnyDecoder, head: nn.Module, memory: Tokens, rows: Tensor | None = None, use_cache: bool = True
    ) -> None:
        self.decoder, self.head, self.memory, self.use_cache = decoder, head, memory, use_cache
        first = torch.arange(memory.states.shape[0], device=memory.states.device)
        self.rows = first if rows is None else rows
        self.caches = decoder.start()
        self.read: Tensor | None = None

    def step(self, ids: Tensor) -> Tensor:
        """Read ids [N, L'] -> logits [N, V]."""
        if self.use_cache:
            states = self.decoder.step(ids, self.memory, self.caches, self.rows)
        else:
            self.read = ids if self.read is None else torch.cat([self.read, ids], 1)
            texts = Texts(self.read, torch.ones_like(self.read, dtype=torch.bool), attention="causal")
            states = self.decoder(texts, self.memory, self.rows).states
        return self.head(states[:, -1])

    def reorder(self, index: Tensor) -> None:
        """Go on with the rows ``index`` [M]."""
        self.rows = self.rows.index_select(0, index)
        for cache in self.caches:
            cache.reorder(index)
        self.read = None if self.read is None else self.read.index_select(0, index)


class FusedStepper:
    """A single stream that writes the text beside the image itself (GIT), and a head over its states.

    Args:
        model: in evaluation mode; its texts come to the fusion as bare embeddings.
        head: states [N, D] -> logits [N, V].
        image: image tokens, [S, M, D].
        rows: [B] int64, the image of each text; None: row b reads image b.
        use_cache: keep keys and values of what was read; without, everything is read again at each step (for tests).
    """

    def __init__(
        self, model: Model, head: nn.Module, image: Tokens, rows: Tensor | None = None, use_cache: bool = True
    ) -> None:
        if not isinstance(model.fusion, SingleStream) or not isinstance(model.text, TextEncoder) or not model.text.bare:
            raise ValueError(
                "objectives.lm.memory beside writes with model.fusion.kind single_stream and model.text of kind text "
                "with layers 0; change them, or use a decoder and memory image"
            )
        self.fusion, self.text, self.head, self.image, self.use_cache = model.fusion, model.text, head, image, use_cache
        first = torch.arange(image.states.shape[0], device=image.states.device)
        self.rows = first if rows is None else rows
        self.caches = [Cache() for _ in model.fusion.blocks]
        self.read: Tensor | None = None

    def step(self, ids: Tensor) -> Tensor:
        """Read ids [N, L'] -> logits [N, V]."""
        before, self.read = self.read, ids if self.read is None else torch.cat([self.read, ids], 1)
        if before is None or not self.use_cache:
            texts = Texts(self.read, torch.ones_like(self.read, dtype=torch.bool), attention="causal")
            caches = self.caches if self.use_cache else None
            fused = self.fusion(self.image, self.text(texts), self.rows, "causal", caches=caches)
            assert fused.text is not None
            return self.head(fused.text.states[:, -1])
        texts = Texts(ids, torch.ones_like(ids, dtype=torch.bool))
        newest = self.text.embeddings(texts, first=before.shape[1])
        keep, own = None, self.fusion.num_prefix
        if self.image.keep is not None:
            seen = self.image.keep.index_select(0, self.rows)
            past = self.caches[0].past
            assert past is not None
            more = seen.new_ones(len(seen), past.keys.shape[2] + 1 - seen.shape[1])
            keep = torch.cat([more[:, :own], seen, more[:, own:]], 1)
        number = own + self.image.states.shape[1]
        return self.head(self.fusion.step(newest, keep, self.caches, number)[:, -1])

    def reorder(self, index: Tensor) -> None:
        """Go on with the rows ``index`` [M]."""
        self.rows = self.rows.index_select(0, index)
        for cache in self.caches:
            cache.reorder(index)
        self.read = None if self.read is None else self.read.index_select(0, index)


@torch.no_grad()
def generate_text(
    model: Model,
    memory: Tokens,
    vocabulary: Vocabulary,
    config: GenerationConfig,
    prompt_ids: Tensor | None = None,
    *,
    objective: str | None = None,
    rows: Tensor | None = None,
    use_cache: bool = True,
) -> tuple[list[list[int]], Tensor]:
    """Write one text for each row of ``memory`` with a model's decoder.

    Args:
        model: in evaluation mode; an objective of kind lm owns the head.
        memory: what the decoder reads, states [B, S, D] (image tokens, or a fused question).
        vocabulary: its bos begins each text, its eos ends it.
        config: how to write.
        prompt_ids: [B, L] int64 ids that each text begins with, bos first; None: bos and the objective's own prompt.
        objective: name of the objective whose head writes; needed where there are several of kind lm.
        rows: [B] int64 memory row of each text; None: text b reads memory b.
        use_cache: as for :class:`DecoderStepper`.

    Returns:
        The ids of each text from bos to eos (or to ``max_length``) without padding, and their scores [B]; the
        objective's own prompt is left out.

    Raises:
        ValueError: the model cannot write, or the lengths do not fit it.
    """
    decoder, writer = writer_of(model, objective)
    limit = room_of(model)
    if config.max_length > limit:
        raise ValueError(f"max_length {config.max_length} is more than the {limit} positions of texts; lower it")
    own = () if prompt_ids is not None else writer.config.prompt
    if prompt_ids is None:
        number = memory.states.shape[0] if rows is None else rows.shape[0]
        prompt_ids = torch.tensor([[vocabulary.bos, *own]], device=memory.states.device).expand(number, -1)
    stepper: Stepper
    if decoder is None:
        stepper = FusedStepper(model, writer.head, memory, rows, use_cache)
    else:
        stepper = DecoderStepper(decoder, writer.head, memory, rows, use_cache)
    found = generate(stepper, prompt_ids, config, eos=vocabulary.eos, pad=vocabulary.pad)
    texts = trim(found.ids, prompt_ids.shape[1], vocabulary.eos)
    return [text[:1] + text[1 + len(own) :] for text in texts], found.scores


def room_of(model: Model) -> int:
    """Return the ids that the longest written text may have."""
    part = model.text if model.decoder is None else model.decoder
    embeddings = part.embeddings
    assert isinstance(embeddings, TextEmbeddings)
    return embeddings.max_length


def writer_of(model: Model, objective: str | None) -> tuple[AnyDecoder | None, Lm]:
    """Return the decoder, and the objective of this name (or the only one) whose head writes.

    There is no decoder where the fusion writes itself.

    Raises:
        ValueError: the model has no decoder, or not just one such objective.
    """
    writers = {name: one for name, one in model.objectives.items() if isinstance(one, Lm) and objective in (None, name)}
    beside = len(writers) == 1 and next(iter(writers.values())).config.memory == "beside"
    if not beside and (model.decoder is None or len(writers) != 1):
        what = (
            f"objectives of kind lm that could write: {sorted(writers)}" if model.decoder else "model.decoder is none"
        )
        raise ValueError(
            f"this model cannot write text, {what}; pretrain it with model.decoder.kind causal and one objective lm"
        )
    return None if beside else model.decoder, next(iter(writers.values()))


@torch.no_grad()
def generate(stepper: Stepper, prompt: Tensor, config: GenerationConfig, *, eos: int, pad: int) -> Generated:
    """Continue each row of ``prompt`` [B, L] until ``eos`` or ``config.max_length``; after eos rows hold ``pad``.

    Raises:
        ValueError: the prompt leaves no room.
    """
    if prompt.shape[1] >= config.max_length:
        raise ValueError(
            f"max_length {config.max_length} leaves no room after a prompt of {prompt.shape[1]} ids; raise it"
        )
    if config.method == "beam":
        return _beam(stepper, prompt, config, eos, pad)
    return _one_by_one(stepper, prompt, config, eos, pad)


def trim(ids: Tensor, prompt: int, eos: int) -> list[list[int]]:
    """Cut each row of ids [B, L] after its first ``eos`` behind the first ``prompt`` ids."""
    found = []
    for row in ids.tolist():
        end = row.index(eos, prompt) + 1 if eos in row[prompt:] else len(row)
        found.append(row[:end])
    return found


def _constrain(scores: Tensor, ids: Tensor, config: GenerationConfig, eos: int) -> Tensor:
    """Scores [N, V] of the next word after ids [N, L], with repetitions made less likely and no early end."""
    if config.repetition_penalty != 1.0:
        seen = scores.gather(1, ids)
        seen = torch.where(seen < 0, seen * config.repetition_penalty, seen / config.repetition_penalty)
        scores = scores.scatter(1, ids, seen)
    if ids.shape[1] < config.min_length:
        scores = scores.clone()
        scores[:, eos] = -torch.inf
    return scores


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return the probabilities [N, V] of the fewest words that sum to ``top_p`` (at least one), others 0."""
    if top_p == 1:  # every word: rounding must not cut off the rare ones
        return logits.softmax(1)
    ordered, words = logits.softmax(1).sort(1, descending=True)
    outside = ordered.cumsum(1) - ordered >= top_p  # what stands before a word is enough already
    return torch.zeros_like(ordered).scatter(1, words, ordered.masked_fill(outside, 0.0))


def _one_by_one(stepper: Stepper, prompt: Tensor, config: GenerationConfig, eos: int, pad: int) -> Generated:
    """Greedy and nucleus: one text a row."""
    ids = newest = prompt
    ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    total = torch.zeros(prompt.shape[0], device=prompt.device)
    written = torch.zeros_like(total)
    while ids.shape[1] < config.max_length and not bool(ended.all()):
        logits = _constrain(stepper.step(newest).float(), ids, config, eos)
        if config.method == "nucleus":
            weights = nucleus(logits / config.temperature, config.top_p)
            word = Draw(config.seed, ids.shape[1]).categorical("generate.nucleus", weights)
        else:
            word = logits.argmax(1)
        if config.force_end and ids.shape[1] + 1 == config.max_length:
            word = torch.full_like(word, eos)
        total += logits.log_softmax(1).gather(1, word[:, None])[:, 0].masked_fill(ended, 0.0)
        written += (~ended).float()
        word = word.masked_fill(ended, pad)
        ended = ended | (word == eos)
        newest = word[:, None]
        ids = torch.cat([ids, newest], 1)
    return Generated(ids, total / written**config.length_penalty)


class _Ended:
    """The best texts of each row that have ended, K of them at most."""

    def __init__(self, batch: int, beams: int, length: int, pad: int, device: torch.device) -> None:
        self.ids = torch.full((batch, beams, length), pad, device=device)
        self.scores = torch.full((batch, beams), NEVER, device=device)
        self.real = torch.zeros((batch, beams), dtype=torch.bool, device=device)
        self.pad = pad

    def add(self, texts: Tensor, scores: Tensor, which: Tensor) -> None:
        """Take in those ``which`` [B, C] of the texts [B, C, L] that are among the best."""
        texts = F.pad(texts, (0, self.ids.shape[2] - texts.shape[2]), value=self.pad)
        every = torch.cat([self.scores, torch.where(which, scores, NEVER)], 1)
        self.scores, kept = every.topk(self.scores.shape[1])
        self.ids = _rows(torch.cat([self.ids, texts], 1), kept)
        self.real = torch.cat([self.real, which], 1).gather(1, kept)

    @property
    def full(self) -> Tensor:
        """[B] whether K texts have ended."""
        return self.real.all(1)

    def beaten(self, score: Tensor) -> Tensor:
        """Return whether no text of this score [B] would be among the K best, [B]."""
        return torch.where(self.full, self.scores[:, -1], NEVER) >= score


def _beam(stepper: Stepper, prompt: Tensor, config: GenerationConfig, eos: int, pad: int) -> Generated:
    """Beam search: ``running`` texts go on, others have ``ended``; both sorted by score, best first."""
    batch, first = prompt.shape
    beams, device, limit = config.beams, prompt.device, config.max_length
    all_ids, whole = config.score_length == "all", config.score_length == "whole"
    offset = torch.arange(batch, device=device)[:, None] * beams
    logits = stepper.step(prompt).repeat_interleave(beams, 0)
    stepper.reorder(torch.arange(batch, device=device).repeat_interleave(beams))
    running = prompt[:, None].expand(batch, beams, first)  # [B, K, L]
    scores = torch.full((batch, beams), NEVER, device=device)
    scores[:, 0] = 0.0  # the beams are equal at the start: only the first may go on, in several ways
    ended = _Ended(batch, beams, limit, pad, device)
    going = torch.ones(batch, dtype=torch.bool, device=device)
    while True:
        step = _constrain(logits.float().log_softmax(1), running.flatten(0, 1), config, eos)  # [N, V]
        total = (step.unflatten(0, (batch, beams)) + scores[:, :, None]).flatten(1)
        # Twice as many as beams: at least `beams` of them do not end with this word.
        best, at = total.topk(2 * beams)
        beam, word = at // step.shape[1], at % step.shape[1]
        texts = torch.cat([_rows(running, beam), word[:, :, None]], 2)  # [B, 2K, L + 1]
        length = texts.shape[2]
        counted = {"all": length - 1, "written": length - first, "whole": length}[config.score_length]
        weight = counted**config.length_penalty
        ending = word == eos if all_ids else (word == eos) | (length == limit)
        ends = ending & going[:, None]
        if whole:  # what ends counts as long as there are not enough better ones that go on
            ends &= (~ending).cumsum(1) < beams
        else:
            ends[:, beams:] = False  # the second half are only there to go on
        ended.add(texts, best / weight, ends)
        scores, kept = torch.where(ending, NEVER, best).topk(beams)
        running = _rows(texts, kept)
        if whole:
            going = going & (ended.scores[:, 0] < best[:, 0] / limit**config.length_penalty)
        else:
            going = going & ~ended.beaten((best if all_ids else scores)[:, 0] / weight)
        if config.early_stopping:
            going = going & ~ended.full
        if length == limit or not bool(going.any()):
            if all_ids:  # what has not ended counts with all its ids
                ended.add(running, scores / length**config.length_penalty, going[:, None].expand(-1, beams))
            return Generated(ended.ids[:, 0], ended.scores[:, 0])
        stepper.reorder((beam.gather(1, kept) + offset).flatten())
        logits = stepper.step(running[:, :, -1:].flatten(0, 1))


def _rows(texts: Tensor, index: Tensor) -> Tensor:
    """Texts [B, K, L] at index [B, M] -> [B, M, L]."""
    return texts.gather(1, index[:, :, None].expand(-1, -1, texts.shape[2]))
