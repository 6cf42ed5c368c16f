"""`single_stream`: image and text tokens in one sequence, one transformer (merge-attention: VisualBERT, UNITER, ViLT).

Shapes: B images, M rows, N image tokens, L text length, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.layers import Cache, attention_mask, initialise, with_bias
from encoders.text import BesideConfig, StackConfig, load_bert
from encoders.types import AttentionKind, Tokens
from encoders.vit_weights import load_vit
from objectives.base import Fused, Side
from vlp.fusion.each import ImagesPerText, fuse_each, image_modality, modality_table, pooled_width
from vlp.fusion.joined import joined_mask, split_sides
from vlp.fusion.pooler import Pooler, PoolerKind, add_order, gather_images
from vlp.fusion.untied import UntiedConfig, UntiedPositions, untied_scale


class SingleStreamConfig(BesideConfig):
    """Concatenation, then one stack with shared weights."""

    kind: Literal["single_stream"] = "single_stream"
    modality_embedding: bool = True
    """Add a learned vector that tells image from text tokens."""
    before_norm: bool = False
    """Read the towers' states before their last norm (FLAVA, section 3)."""
    project: Literal["widths", "both", "image_norm"] = "widths"
    """Which sides are projected: those of another width; both (FLAVA); or the image, with a norm behind (GIT)."""
    project_eps: float = 1e-5
    """Epsilon of that norm."""
    class_token: bool = False
    """A class token of the fusion's own before all others, which `pooled` reads (FLAVA)."""
    words_see: Literal["none", "image", "named"] = "none"
    """`image`: every word carries the image's one vector, `pooled` of the vision encoder (VL-BERT, whose is the whole
    picture's); texts alone carry nothing, or `absent_image`. `named`: a word carries the box that it names, the first
    word the whole image (B2T2, with `model.vision.tokens boxes`)."""
    words_see_by: Literal["norm", "tanh"] = "norm"
    """How: normalised (VL-BERT), or through a dense layer with tanh, words that carry nothing too (B2T2)."""
    words_see_start: float = 1.0
    """Weight that that norm starts with (VL-BERT 0: the text begins as BERT reads it)."""
    image_tokens: bool = True
    """The image's tokens stand in the sequence; else words alone carry what is seen (B2T2)."""
    absent_image: bool = False
    """A learned vector that words carry where there is no image (VL-BERT's texts alone)."""
    join_norm: bool = False
    """Layer norm and dropout over all embeddings once they are complete, which then come without their own: a BERT's
    embedding norm (VL-BERT)."""
    untied: UntiedConfig | None = None
    """Positions of image cells and words that attention reads apart from the content (TUPE, OFA); none = what the
    encoders add."""
    mask_text: bool = True
    """Padding of texts is hidden; torchmultimodal's FLAVA, which has no mask here, shows it."""
    pooler: PoolerKind = "tanh"
    """How `pooled` is made."""
    pool_at: Literal["first", "before_last"] = "first"
    """Which of the text's states `pooled` reads: the first, or the one before [SEP] (VisualBERT's [MASK], on VQA)."""
    images: ImagesPerText = "one"
    """Images per text: one; two laid behind each other (`pair`); or two that the text is fused with one after the other
    (`each`: NLVR2 in ViLT)."""
    init_layer: int = 0
    """First layer of `init` to take. `init: timm:NAME` takes a ViT's blocks."""

    any_form: ClassVar[bool] = True

    def build(
        self, image_width: int, text_width: int, reads: frozenset[Side], grid: tuple[int, int] | None = None
    ) -> SingleStream:
        """Build the fusion; ``reads`` says which sides anyone reads, ``grid`` is the rows and columns of all images."""
        return SingleStream(self, image_width, text_width, reads, grid)


class SingleStream(nn.Module):
    """Image and text tokens through one stack.

    Raises:
        ValueError: settings that do not fit each other.
    """

    attention_kinds: tuple[AttentionKind, ...] = ("full", "causal", "prefix")

    def __init__(
        self,
        config: SingleStreamConfig,
        image_width: int,
        text_width: int,
        reads: frozenset[Side],
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.config, stack = config, config.stack
        self.text_width = width = stack.width
        # No states of images: objectives that read them are refused.
        self.image_width = width if config.image_tokens else None
        self.before_norm, both = config.before_norm, config.project == "both"
        self.image_project: nn.Module = nn.Linear(image_width, width) if both or image_width != width else nn.Identity()
        self.text_project = nn.Linear(text_width, width) if both or text_width != width else nn.Identity()
        if config.project == "image_norm":
            self.image_project = nn.Sequential(nn.Linear(image_width, width), nn.LayerNorm(width, config.project_eps))
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.num_prefix = int(config.class_token)
        _check(config)
        if not config.image_tokens:
            self.image_project = nn.Identity()
        self.modality = modality_table(width, config.images) if config.modality_embedding else None
        self.order = nn.Parameter(torch.zeros(2, width)) if config.images == "pair" else None
        self.words_see = None if config.words_see == "none" else _WordsSee(config, image_width, stack)
        if self.words_see is not None:
            self.attention_kinds = ("full",)  # a text that is written has no image in its caches
        self.join_norm = nn.LayerNorm(width, stack.eps) if config.join_norm else None
        self.join_drop = nn.Dropout(stack.dropout if config.join_norm else 0.0)
        scale = None if config.untied is None else untied_scale(stack)
        self.blocks = nn.ModuleList(stack.block(scale=scale) for _ in range(stack.layers))
        self.final_norm = stack.new_norm()
        self.buckets = stack.form.new_buckets(stack.heads, both_ways=True)
        initialise(self)
        if self.words_see is not None and self.words_see.norm is not None:
            nn.init.constant_(self.words_see.norm.weight, config.words_see_start)
        self.untied = None if config.untied is None else self._untied(config.untied, grid)
        self.pooler = Pooler(config.pooler, width, width) if "pooled" in reads else None
        self.pooled_width = pooled_width(self.pooler, config.images)

    def _untied(self, config: UntiedConfig, grid: tuple[int, int] | None) -> UntiedPositions:
        if grid is None:
            raise ValueError(
                "model.fusion.untied needs image tokens that are all cells of one grid; use model.vision.kind grid or "
                "patch, with no part of them drawn or pooled (sample, patch_drop, queries), or set it to none"
            )
        if self.config.images != "one" or self.config.class_token:
            raise ValueError(
                "model.fusion.untied has places for one image and the text alone; set model.fusion.images to one and "
                "class_token to false, or it to none"
            )
        return UntiedPositions(config, self.config.stack, grid)

    def load_pretrained(self) -> None:
        """Fill the blocks from ``config.init``, where the recipe names one."""
        if self.config.init is None:
            return
        if self.config.init.startswith("timm:"):
            load_vit(self, self.config.init.removeprefix("timm:"))
            return
        load_bert(self, self.config.init, embeddings=False, first=self.config.init_layer)
        if self.join_norm is not None:
            whole = nn.ModuleDict({"embeddings": nn.ModuleDict({"norm": self.join_norm})})
            load_bert(whole, self.config.init, embeddings=True)

    def forward(
        self,
        image: Tokens | None,
        text: Tokens | None,
        image_index: Tensor | None = None,
        attention: AttentionKind = "full",
        prefix: Tensor | None = None,
        layers: bool = False,
        caches: Sequence[Cache] | None = None,
    ) -> Fused:
        """Image states [B, N, D] at rows ``image_index`` with text states [M, L, D] -> Fused of M rows.

        Under "causal" and "prefix" attention all tokens see the image and the text's prefix, and text tokens the words
        before them (PrefixLM, Wang et al. 2022, SimVLM, section 3.1). Empty ``caches``, one a block, are filled for
        :meth:`step`.
        """
        if self.config.images == "each" and image is not None and text is not None:
            return fuse_each(partial(self._fuse, image, layers=layers), text, image_index, attention, prefix)
        return self._fuse(image, text, image_index, attention, prefix, layers=layers, caches=caches)

    def step(self, text: Tensor, keep: Tensor | None, caches: Sequence[Cache], num_image: int) -> Tensor:
        """Read the newest embedding [M, 1, D] of each text after what ``caches`` hold -> states [M, 1, D].

        ``keep`` [M, S] says what of that, and of the new, is seen (None: all); the first ``num_image`` are no words.
        """
        states = self.text_project(text)
        if self.modality is not None:
            states = states + self.modality.weight[1]
        states = self._joined(states)
        mask, past = attention_mask(keep), caches[0].past
        first = 0 if past is None else past.keys.shape[2] - num_image
        if self.buckets is not None and past is not None:
            mask = with_bias(mask, F.pad(self.buckets(1, first + 1, first), (num_image, 0)))
        biases, _ = self._positions(num_image, first + 1)
        for block, bias, cache in zip(self.blocks, biases, caches, strict=True):
            states = block(states, with_bias(mask, None if bias is None else bias[:, :, -1:]), cache=cache)
        return self.final_norm(states)

    def _positions(self, num_image: int, length: int) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """Bias of every block on attention, [1, H, S, S] each, and the positions [1, S, D] that they are made of."""
        if self.untied is None:
            return [None] * len(self.blocks), None
        positions = self.untied(num_image, length)
        return self.untied.biases(positions, num_image), positions

    def _fuse(
        self,
        image: Tokens | None,
        text: Tokens | None,
        image_index: Tensor | None,
        attention: AttentionKind,
        prefix: Tensor | None,
        number: Tensor | None = None,
        layers: bool = False,
        caches: Sequence[Cache] | None = None,
    ) -> Fused:
        """As ``forward``, without ``images: each``, whose every row is here the text's image ``number`` [M]."""
        carried = image  # by words
        if not self.config.image_tokens:
            if text is None:
                raise ValueError("model.fusion.image_tokens false: an image without a text is no sequence; set it true")
            image = None
        parts: list[Tensor] = []
        keeps: list[Tensor] = []
        for tokens, project in ((image, self.image_project), (text, self.text_project)):
            if tokens is None:
                continue
            states, keep = gather_images(tokens.states, tokens.keep, image_index if tokens is image else None)
            states = project(states)
            if tokens is image:
                states = add_order(states, image_index, self.order)
            if self.modality is not None:
                of_image = tokens is image
                states = states + (image_modality(self.modality, number) if of_image else self.modality.weight[1])
            if tokens is text and self.words_see is not None:
                states = states + self.words_see(carried, text, image_index)
            parts.append(states)
            if keep is None or (tokens is text and not self.config.mask_text):
                keep = states.new_ones(states.shape[:2], dtype=torch.bool)
            keeps.append(keep)
        num_image = parts[0].shape[1] if image is not None else 0
        if self.class_token is not None:
            num_image += 1
            parts.insert(0, self.class_token.to(parts[0].dtype).expand(len(parts[0]), -1, -1))
            keeps.insert(0, torch.ones_like(keeps[0][:, :1]))
        keep = torch.cat(keeps, 1)
        mask = joined_mask(keep, num_image, attention, prefix)
        if self.buckets is not None:  # words know their distances, from the image there is none (VL-T5)
            length = keep.shape[1] - num_image
            mask = with_bias(mask, F.pad(self.buckets(length, length), (num_image, 0, num_image, 0)))
        states = self._joined(torch.cat(parts, 1))
        every = [states]
        biases, positions = self._positions(num_image, states.shape[1] - num_image)
        for place, (block, bias) in enumerate(zip(self.blocks, biases, strict=True)):
            states = block(states, with_bias(mask, bias), cache=None if caches is None else caches[place])
            every.append(states)
        states = self.final_norm(states)
        kept = tuple(every) if layers else None
        image, text = split_sides(states, keep, num_image, image is not None, text is not None, kept)
        if positions is not None:
            image = None if image is None else replace(image, positions=positions[:, :num_image])
            text = None if text is None else replace(text, positions=positions[:, num_image:])
        return Fused(image, text, self._pool(states, image, text))

    def _joined(self, states: Tensor) -> Tensor:
        """What the first block reads of complete embeddings [M, S, D]."""
        return states if self.join_norm is None else self.join_drop(self.join_norm(states))

    def _pool(self, states: Tensor, image: Tokens | None, text: Tokens | None) -> Tensor:
        """States [M, S, D] and their sides -> [M, pooled_width], empty without a pooler."""
        if self.pooler is None:
            return states.new_zeros(states.shape[0], 0)
        own = text.pooled if text else None
        if self.class_token is not None:
            own = states[:, 0]
        elif text is not None and self.config.pool_at == "before_last":
            own = _before_last(text)
        return self.pooler(image.pooled if image else None, own)


def _check(config: SingleStreamConfig) -> None:
    """Refuse settings that do not fit each other."""
    one_side = config.pooler in ("cls", "tanh", "relu")
    if config.class_token and not one_side:
        raise ValueError(
            f"model.fusion.pooler {config.pooler} reads both sides, but model.fusion.class_token true is read "
            "instead of them; use cls, tanh or relu"
        )
    if config.words_see == "none" and config.absent_image:
        raise ValueError(
            "model.fusion.absent_image true is what words carry without an image, but they carry none with one; "
            "set model.fusion.words_see to image, or absent_image to false"
        )
    if config.words_see != "none" and config.images == "pair":
        raise ValueError(
            f"model.fusion.words_see {config.words_see} adds one image's vector to a word, but model.fusion.images "
            "pair lays two behind each other; use images each"
        )
    if not config.image_tokens and (config.words_see == "none" or not one_side):
        raise ValueError(
            "model.fusion.image_tokens false leaves the image out of the sequence, but nothing carries it, or a pooler "
            f"{config.pooler} reads it; set model.fusion.words_see, and a pooler of cls, tanh or relu"
        )


class _WordsSee(nn.Module):
    """What words carry of the image: its one vector (Su et al. 2020, VL-BERT, section 3.2), or what they name."""

    def __init__(self, config: SingleStreamConfig, image_width: int, stack: StackConfig) -> None:
        super().__init__()
        self.named, tanh = config.words_see == "named", config.words_see_by == "tanh"
        linear = tanh or image_width != stack.width
        self.project = nn.Linear(image_width, stack.width) if linear else nn.Identity()
        self.norm = None if tanh else nn.LayerNorm(stack.width, stack.eps)
        self.width = image_width
        self.absent = nn.Parameter(0.02 * torch.randn(image_width)) if config.absent_image else None

    def forward(self, image: Tokens | None, text: Tokens, index: Tensor | None) -> Tensor:
        """Images [B] at rows ``index`` [M] and the texts -> [M, L or 1, D] that each row's words carry."""
        if image is None:
            if self.absent is None and self.norm is not None:
                return text.states.new_zeros(1, 1, 1)
            found = text.states.new_zeros(self.width) if self.absent is None else self.absent
            return self._by(found[None, None])
        if not self.named:
            pooled = image.pooled if index is None else image.pooled.index_select(0, index)
            return self._by(pooled[:, None])
        states, keep = gather_images(image.states, image.keep, index)
        if keep is not None:
            states = states * keep[..., None]
        none = states.shape[1]  # behind the whole image, its place 0, and its boxes
        named = text.states.new_full(text.states.shape[:2], -1, dtype=torch.int64) if text.named is None else text.named
        place = torch.where((named >= 0) & (named < none - 1), named + 1, none)
        place = F.pad(place[:, 1:], (1, 0), value=0)
        seen = F.pad(states, (0, 0, 0, 1))
        return self._by(seen.gather(1, place[..., None].expand(-1, -1, seen.shape[2])))

    def _by(self, seen: Tensor) -> Tensor:
        return torch.tanh(self.project(seen)) if self.norm is None else self.norm(self.project(seen))


def _before_last(text: Tokens) -> Tensor:
    """State of each text's token before its last real one, [M, D]."""
    assert text.keep is not None
    at = (text.keep.sum(1) - 2).clamp(min=0)
    return text.states.gather(1, at[:, None, None].expand(-1, 1, text.states.shape[2]))[:, 0]
