"""The vocabulary of objectives: names of passes, rows, randomness, and what an objective is.

An objective declares the passes it needs by name and reads their results; it never calls an encoder.
Shapes: B images, T texts, L text length, D width, E embedding, M fused rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from encoders.codebook import Codebook
from encoders.precision import finest
from encoders.types import AttentionKind, Batch, Modality, Tokens, Vocabulary

MAIN = "main"
"""Name of the usual branch and of its contrastive space."""

WHOLE = "whole"
"""View of the pictures that the clean images are regions of (`Images.owner`); the clean images where they are none."""

AGAIN = "again"
"""View of the images with another augmentation of each."""

EDITED = "edited"
"""View of the texts with some words changed."""

Side: TypeAlias = Literal["image", "text", "pooled", "memory"]
"""What of a :class:`Fused` is read; `memory` is the side that the model's decoder reads."""


@dataclass(frozen=True)
class Encode:
    """States of one modality's tower -> :class:`Tokens`."""

    modality: Modality
    view: str = "clean"
    branch: str = MAIN
    """Which way through a stack that has several (VLMo: its vision-language feed-forward on one modality alone)."""
    teacher: bool = False
    """By the momentum teacher, without gradient."""


@dataclass(frozen=True)
class Embed:
    """The unit-norm contrastive vector of one modality -> Tensor [B or T, E]; of ``tokens`` [B or T, N, E]."""

    modality: Modality
    view: str = "clean"
    branch: str = MAIN
    """Which space; its encode is of the same branch."""
    teacher: bool = False
    """By the momentum teacher, without gradient."""
    tokens: bool = False
    """Every state of the tower in the space, instead of its pooled vector (FILIP)."""
    unit: bool = True
    """Scaled to unit norm; else the vector as it is projected."""


@dataclass(frozen=True)
class Fuse:
    """Image and text fused, one row per pair -> :class:`Fused`.

    Without ``rows`` the pairs are the batch's own (each text with its image); with ``rows`` they are those that the
    objective of that name gives. ``image=None`` or ``text=None`` runs the fusion with that side missing, on one row a
    text or an image.
    """

    image: str | None = "clean"
    text: str | None = "clean"
    rows: str | None = None
    teacher: bool = False
    """By the momentum teacher, without gradient."""


@dataclass(frozen=True)
class Decode:
    """Decoder states of a text view that reads a memory -> :class:`Tokens`."""

    memory: Encode | Fuse
    text: str = "causal"
    teacher: bool = False
    """By the momentum teacher, without gradient; its memory is then the teacher's too."""


Pass: TypeAlias = Encode | Embed | Fuse | Decode


@dataclass(frozen=True)
class Rows:
    """Pairs that only this step can know, by index into the step's images and texts."""

    image_index: Tensor
    """[M] int64, or [M, I] for I images per row."""
    text_index: Tensor
    """[M] int64."""
    everywhere: bool = False
    """The indices are into the images and texts of all ranks, in rank order."""


@dataclass(frozen=True)
class Fused:
    """What a fusion gives for M rows."""

    image: Tokens | None
    """Image side, states [M, N, D]; None where the fusion leaves images as they were or had none."""
    text: Tokens | None
    """Text side, states [M, L, D]."""
    pooled: Tensor
    """[M, fusion.pooled_width]."""


class Draw:
    """The only source of randomness in objectives and views.

    Batch-level draws are keyed by (run seed, name, step, candidate group), per-sample draws by (run seed, name, sample
    position): adding an objective changes no other's draws, and the number of ranks changes no sample's.
    """

    def __init__(self, seed: int = 0, step: int = 0, group: int = 0) -> None:
        self.seed, self.step, self.group = seed, step, group

    def sample(self, name: str, position: int) -> np.random.Generator:
        """Return the host generator of one sample, a pure function of (seed, name, position)."""
        return _generator(self.seed, name, position)

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """Return float32 [*shape] in [0, 1)."""
        values = _generator(self.seed, name, self.step, self.group).random(tuple(shape), dtype=np.float32)
        return torch.from_numpy(values).to(device, non_blocking=True)

    def categorical(self, name: str, weights: Tensor) -> Tensor:
        """Return one column per row of ``weights`` [R, C] (>= 0), drawn in proportion, int64 [R].

        A column of weight zero is never drawn unless its whole row is zero (then the last column is returned and the
        caller must leave the row out).
        """
        level = self.uniform(name, weights.shape[:1], weights.device)
        exact = finest(weights.device)
        mass = weights.to(exact).cumsum(1)
        # Inverse of the cumulative distribution: the first column whose mass exceeds the level, which is < the total.
        threshold = level.to(exact)[:, None] * mass[:, -1:]
        return (mass <= threshold).sum(1).clamp(max=weights.shape[1] - 1)

    def bernoulli(self, name: str, probability: float, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """Return bool [*shape], True with ``probability``."""
        return self.uniform(name, shape, device) < probability


class Replay(Draw):
    """Stands in for :class:`Draw` in tests: returns recorded draws by name.

    Raises:
        ValueError: a draw that was not recorded is asked for.
    """

    def __init__(self, recorded: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.recorded = recorded

    def _get(self, name: str) -> Tensor:
        if name not in self.recorded:
            raise ValueError(f"draw {name!r} was not recorded; recorded are {sorted(self.recorded)}")
        return self.recorded[name]

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
        return self._get(name).to(device)

    def categorical(self, name: str, weights: Tensor) -> Tensor:
        return self._get(name).to(weights.device)

    def bernoulli(self, name: str, probability: float, shape: Sequence[int], device: torch.device | str) -> Tensor:
        return self._get(name).to(device).bool()


def _generator(*key: Any) -> np.random.Generator:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


@dataclass(frozen=True)
class ViewText:
    """One text of a view, before padding."""

    ids: np.ndarray
    """[L] int64."""
    labels: np.ndarray | None = None
    """[L] int64, -100 where there is none."""
    prefix: int | None = None


class ImageView(Protocol):
    """Which patches of an image are hidden: a small frozen, picklable object."""

    def make(self, generator: np.random.Generator) -> np.ndarray:
        """Return which patches are hidden, [P] bool; ``generator`` is keyed by (seed, view name, sample position)."""
        ...


@dataclass(frozen=True)
class RegionMask:
    """What of an image's regions a view hides."""

    masked: np.ndarray
    """[R] bool, features are hidden."""
    predict: np.ndarray
    """[R] bool, regions that are to be predicted; some may show their features."""
    replaced: np.ndarray
    """[R] int64, which of another image's regions shows its features there, counted round; -1 = none."""


class RegionView(Protocol):
    """Which regions of a detector are hidden: a small frozen, picklable object."""

    @property
    def replaces(self) -> bool:
        """Whether features of another image's regions are shown."""
        ...

    def make(self, boxes: np.ndarray, generator: np.random.Generator) -> RegionMask:
        """Hide regions with relative corners ``boxes`` [R, 4]; ``generator`` is keyed by (seed, view, position)."""
        ...


class View(Protocol):
    """How a text view is made on the host from the tokenised caption: a small frozen, picklable object.

    Views that cut one text in parts have an attribute ``draws``, the name by which the draws of all of them are keyed.
    """

    @property
    def attention(self) -> AttentionKind:
        """How the view's tokens see each other."""
        ...

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Make the view of one text.

        Args:
            ids: [L] int64 of the clean text, with its special ids.
            word_starts: [L] bool, True where a word begins (False at special ids and at word pieces that continue).
            vocabulary: the tokenizer's special ids.
            generator: keyed by (seed, view name, sample position).
        """
        ...


def draws_of(name: str, view: View) -> str:
    """Return the name by which a view's draws are keyed: its own, or the one that it shares with others."""
    return getattr(view, "draws", name)


@dataclass(frozen=True)
class LossOutput:
    """What an objective gives: the mean over its own terms, and what to log beside it (detached scalars)."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSpec:
    """What an objective may know of the model when it builds its head."""

    vocabulary_size: int
    text_width: int
    """Width of the text states after fusion (or of the text tower without one)."""
    pooled_width: int | None
    """Width of ``Fused.pooled``; None without a fusion."""
    decoder_width: int | None
    embed_width: int | None
    """Width of the contrastive embedding; None when no objective trains one."""
    word_embedding: nn.Parameter | None
    """[V, D] of the text encoder, for tied heads."""
    decoder_words: nn.Parameter | None = None
    """[V, D] of the decoder, which may be the text encoder's; None without a decoder."""
    fusion: str = "none"
    fusion_attention: tuple[AttentionKind, ...] = ()
    """Attention kinds of texts that the fusion can honour without leaking."""
    text_eps: float = 1e-12
    image_tower_width: int = 0
    """Width of the states of an image alone."""
    image_prefix: int = 1
    """Image tokens before the first patch (the class token)."""
    image_width: int | None = None
    """Width of the image states after fusion; None where the fusion gives none."""
    image_grid: tuple[int, int] | None = None
    """Rows and columns of an image's patches; None where it has none."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    dictionary: tuple[int, int] | None = None
    """Entries of the vision encoder's dictionary that can be hidden, and cells of an image; None where it has none."""
    max_length: int | None = None
    """Ids of the longest text; None where the text encoder does not say."""
    reads_pixels: bool = True
    """Whether images are pixels, which can be augmented, and not a detector's regions."""
    feature_projection: nn.Parameter | None = None
    """[D, F] that regions' features go through in the vision encoder, for tied heads."""


class Results(dict[Pass, Any]):
    """Results of the passes by name, with the model's temperatures."""

    scales: Mapping[str, Tensor]
    """[1] each, log of the inverse temperature, by contrastive space."""
    biases: Mapping[str, Tensor]
    """[1] each, bias of the logits, of the spaces that have one (SigLIP)."""
    rows: Mapping[str, Rows]
    """The rows that objectives gave in this step, by name."""
    teacher_heads: Mapping[str, nn.Module] | nn.ModuleDict
    """The momentum copies of objectives' heads, by objective; empty without a teacher."""
    codebook: Codebook | None
    """What names patches by codes, where the model has one."""

    def __init__(self, scales: Mapping[str, Tensor] | None = None, biases: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.scales, self.biases = scales or {}, biases or {}
        self.rows, self.teacher_heads, self.codebook = {}, {}, None

    def teacher_head(self, objective: str) -> nn.Module:
        """Return the momentum copy of an objective's head."""
        head = self.teacher_heads[objective].head
        assert isinstance(head, nn.Module)
        return head


class Objective(nn.Module):
    """tokens -> loss. A subclass sets ``needs`` (and ``views``) in its constructor.

    ``needs`` are the passes it reads, ``without_gradient`` those of them (beside the teacher's) that it trains nothing
    through, ``views`` how its text views are made. Its config says by class variables whether
    the contrastive projections get their gradient from it (``trains_embed``) and which sides of a fusion it reads
    (``reads``).
    """

    teaches_head = False
    """Whether the momentum teacher keeps a copy of it, ``results.teacher_heads[name]``."""
    name = ""
    """Its name in the model, which sets it."""
    source: str | None = None
    """Source of the data that trains it, which the model sets; None: every one that has what it reads."""
    one_modality = False
    """Whether it is meant for one modality alone, so that a model of it need not read the other."""
    unpaired = False
    """Whether only batches of one modality train it, and pairs do not."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: frozenset[Pass] = frozenset()
        self.without_gradient: frozenset[Pass] = frozenset()
        self.views: dict[str, View] = {}
        self.image_views: dict[str, ImageView] = {}

    def rows(self, results: Results, batch: Batch, draw: Draw) -> dict[str, Rows]:
        """Return the pairs of this step that its ``Fuse(rows=name)`` passes ask for, by name; embeds are ready."""
        return {}

    def count(self, batch: Batch) -> Tensor | float:
        """Return over how many terms the loss of this batch is a mean: the weight of a rank or micro-batch."""
        return float(batch.num_texts)

    def chance(self, candidates: int) -> float | None:
        """Return the loss of guessing by the label prior, with ``candidates`` pairs per step; None if unknown."""
        return None

    def before_step(self) -> None:
        """Bring what it learns back into its bounds, before the forward of an optimizer step."""

    def after_step(self) -> None:
        """Keep what a finished optimizer step leaves for the next (a queue of features)."""

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        raise AssertionError(f"{type(self).__name__} does not define forward")
