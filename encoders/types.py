"""What encoders eat and give: the batch of one step and its parts.

Shapes: B images, T texts (may differ from B), P patches, N image tokens, L text length, D width, K labelled positions.
A mask is always called ``keep``: bool, True = attend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

Modality = Literal["image", "text"]
AttentionKind = Literal["full", "causal", "prefix"]


@dataclass(frozen=True)
class Images:
    """One view of a step's images. ``uint8`` pixels are normalised by the encoder, floats are taken as they are."""

    pixels: Tensor
    """[B, 3, H, W], uint8 in 0..255 or already normalised float."""
    keep: Tensor | None = None
    """[B, P] bool, patches that hold image (None = all)."""
    owner: Tensor | None = None
    """[B] int64, where images are regions of pictures: the row of ``pixels`` that each is a region of, whose patches
    ``keep`` says (None = row b)."""
    masked: Tensor | None = None
    """[B, P] bool, patches to replace by the mask token (None = none); of cells with a dictionary, all that share the
    entry of one of these."""
    masked_at: Tensor | None = None
    """[K] int64 flat positions b * P + p of these, padded with -1 to a multiple of 8 (no boolean indexing)."""
    boxes: Tensor | None = None
    """[B, R, 4] float, boxes that texts may name: left, top, right, bottom as shares of the image's sides; an empty box
    is none."""
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    """What is to be predicted of the patches, by name: "codes" [B, P] int64, or "codebook_pixels" [B, 3, h, w]."""


@dataclass(frozen=True)
class Regions:
    """One view of a step's images as a detector saw them: features and boxes of R regions."""

    features: Tensor
    """[B, R, F] float."""
    boxes: Tensor
    """[B, R, G] float, the geometry that the encoder's recipe names (4, 5, 6 or 7 values)."""
    keep: Tensor | None = None
    """[B, R] bool, real regions (None = all)."""
    masked: Tensor | None = None
    """[B, R] bool, regions whose features are hidden (None = none)."""
    segments: Tensor | None = None
    """[B, R] int64 segment ids (None = the encoder's own)."""
    positions: Tensor | None = None
    """[B, R] or [B, R, A] int64, text positions that a region is aligned with, -1 = none (VisualBERT on VCR)."""
    predict: Tensor | None = None
    """[B, R] bool, regions that are to be predicted (None = the masked ones); some may show their features (LXMERT)."""
    predict_at: Tensor | None = None
    """[K] int64 flat positions b * R + r of these, padded with -1 to a multiple of 8 (no boolean indexing)."""
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    """What the detector said of each region, by name: "features" [B, R, F], "classes" [B, R, C], "objects" [B, R]."""


Vision: TypeAlias = Images | Regions
"""What a vision encoder may be given."""


@dataclass(frozen=True)
class Texts:
    """One view of a step's texts: what a masked, causal or prefix text is, with its own labels and attention."""

    ids: Tensor
    """[T, L] int64."""
    keep: Tensor
    """[T, L] bool, False at padding."""
    attention: AttentionKind = "full"
    prefix: Tensor | None = None
    """[T] int64, tokens of each text that all tokens may see (attention "prefix")."""
    segments: Tensor | None = None
    """[T, L] int64 segment ids (None = all zero)."""
    positions: Tensor | None = None
    """[T, L] int64 position ids (None = counted from zero)."""
    labels: Tensor | None = None
    """[T, L] int64 targets, -100 where there is none. A causal view's labels are already shifted."""
    label_at: Tensor | None = None
    """[K] int64 flat positions t * L + l of the labels, padded with -1 to a multiple of 8 (no boolean indexing)."""
    owner: Tensor | None = None
    """[T] int64 row of the clean view that each text belongs to, where their numbers differ (a question's answers)."""
    weight: Tensor | None = None
    """[T] float, how much each text counts in its loss (None = all the same)."""
    boxes: Tensor | None = None
    """[T, L] int64, which of its image's boxes each word names, -1 = none (None = none does)."""


@dataclass(frozen=True)
class Tokens:
    """What an encoder gives."""

    states: Tensor
    """[B, N, D]."""
    keep: Tensor | None
    """[B, N] bool; None = all attended."""
    pooled: Tensor
    """[B, D], one vector for the whole input."""
    layers: tuple[Tensor, ...] | None = None
    """Hidden states of every layer, on request."""
    labels: Tensor | None = None
    """[B, N] int64, what a dictionary knew at each token that the encoder hid, -100 at the others."""
    positions: Tensor | None = None
    """[1, N, D], what a cross-attention whose positions are apart from the content reads of these tokens' places."""
    named: Tensor | None = None
    """[B, L] int64, of words: which of the image's boxes each names, -1 = none."""


@dataclass(frozen=True)
class Batch:
    """One step's input on one rank. Texts may be more than images; either may be missing."""

    images: Mapping[str, Images | Regions] = field(default_factory=dict)
    """By view: "clean", "masked"."""
    texts: Mapping[str, Texts] = field(default_factory=dict)
    """By view: "clean", "masked", "causal", "prefix" or "objective:name"."""
    image_of_text: Tensor | None = None
    """[T] int64 index of each text's image, or [T, I] where a text has I images (NLVR2)."""
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    """What tasks need, by name; every tensor's first axis is texts."""
    image_id: Tensor | None = None
    """[B] int64; equal ids mark the same image (or concept)."""
    caption_id: Tensor | None = None
    """[T] int64 hash of the caption; equal ids mark the same words."""
    position: Tensor | None = None
    """[B] int64 global position of each sample in the run's data order."""
    source: str = ""
    """Of the data, ``main`` or one of `data.sources`: objectives of another one stand aside; "": none in particular."""
    seen: int = 0
    """Samples that the run had seen before this step, over all ranks; drives ramps."""
    counts: tuple[tuple[int, int], ...] | None = None
    """(images, texts) of every rank's batch in this step, where they differ (the last, uneven batch)."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on ``device``; the copies do not block."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch with every tensor in page-locked memory; torch's DataLoader looks for this name."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())

    @property
    def missing(self) -> frozenset[Modality]:
        """What it does not bring."""
        given: dict[Modality, Mapping[str, Any]] = {"image": self.images, "text": self.texts}
        return frozenset(modality for modality, views in given.items() if not views)

    @property
    def num_images(self) -> int:
        """Images of this rank."""
        if not self.images:
            return 0
        first = next(iter(self.images.values()))
        if isinstance(first, Regions):
            return first.features.shape[0]
        return (first.pixels if first.owner is None else first.owner).shape[0]

    @property
    def num_texts(self) -> int:
        """Texts of this rank."""
        return next(iter(self.texts.values())).ids.shape[0] if self.texts else 0


@dataclass(frozen=True)
class Vocabulary:
    """The special ids of a tokenizer, what a view needs to know of it."""

    size: int
    pad: int
    cls: int
    sep: int
    mask: int | None
    bos: int
    """First id of a generated text."""
    eos: int
    """Last id of a generated text."""
    sentinels: tuple[int, ...] = ()
    """Ids that stand for hidden spans, in their order (T5's <extra_id_0> and on)."""

    @property
    def special(self) -> frozenset[int]:
        """Ids that are never masked and never drawn."""
        ids = (self.pad, self.cls, self.sep, self.mask, self.bos, self.eos, *self.sentinels)
        return frozenset(i for i in ids if i is not None)


Tree = TypeVar("Tree")


def _map_tensors(tree: Tree, function: Any) -> Tree:
    """Apply ``function`` to every tensor of nested dataclasses and mappings."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {name: _map_tensors(value, function) for name, value in tree.items()}  # type: ignore[return-value]
    if isinstance(tree, Images | Regions | Texts | Batch):
        return replace(tree, **{f.name: _map_tensors(getattr(tree, f.name), function) for f in fields(tree)})
    return tree
