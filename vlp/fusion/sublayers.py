"""`sublayers`: two streams, described sublayer by sublayer (Bugliarello et al. 2021, VOLTA, section 3.3).

A sublayer is attention or feed-forward. Attention says who reads whom: `tt` text reads text, `tv` text reads image,
`vt` image reads text, `vv` image reads image; who reads both has one softmax over both. That covers ViLBERT, LXMERT
and, with weights that the streams share, VisualBERT and UNITER.
Shapes: B images, M rows, N image tokens, L text length, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from encoders.layers import Attention, FeedForward, KeyValues, attention_mask, initialise
from encoders.text import BesideConfig, StackConfig, load_bert
from encoders.types import AttentionKind, Tokens
from objectives.base import Fused, Side
from vlp.fusion.each import fuse_each, pooled_width
from vlp.fusion.pooler import Pooler, PoolerKind, gather_images

Stream: TypeAlias = Literal["t", "v"]
NAMES: dict[Stream, str] = {"t": "text", "v": "image"}
READS = ("tt", "tv", "vt", "vv")


class SublayersConfig(BesideConfig):
    """Sublayers in order; sizes are the text stream's where they do not say image."""

    kind: Literal["sublayers"] = "sublayers"
    sublayers: tuple[str, ...] = ()
    """Each in words: `tt tv vt vv` (attention) or `t v` (feed-forward of a stream), and `shared` where the streams have
    the same weights, as "tv vt shared" (LXMERT). Empty = `layers` times "tt tv vt vv shared", "t v shared"."""
    image_width: int | None = None
    """Width of the image stream; none = the vision encoder's."""
    image_heads: int | None = None
    """Attention heads of the image stream where it has weights of its own; none = `heads`."""
    image_hidden: int | None = None
    """Width inside the image stream's own feed-forward; none = `hidden`, or 4 x `image_width` where widths differ."""
    cross_width: int | None = None
    """Width of all heads together where the streams read each other; none = the stream's (ViLBERT: 1024)."""
    cross_heads: int | None = None
    """Heads where the streams read each other; none = `heads`."""
    pooler: PoolerKind = "tanh"
    """How `pooled` is made."""
    pooled_width: int | None = None
    """Width of `pooled`; none = the text stream's."""
    images: Literal["one", "each"] = "one"
    """Images per text: one, or two, each fused with the text by itself and pooled side by side (NLVR2)."""

    def build(self, image_width: int, text_width: int, reads: frozenset[Side]) -> Sublayers:
        """Build the fusion; ``reads`` says which sides anyone reads."""
        return Sublayers(self, image_width, text_width, reads)


@dataclass(frozen=True)
class _Plan:
    """What of a sublayer runs, and how."""

    attention: bool
    reads: frozenset[str]
    """Of `tt tv vt vv`, those whose reader's states anyone reads later."""
    runs: frozenset[Stream]
    """Streams that it changes."""
    keys: frozenset[Stream]
    """Streams that are read in it."""
    shared: bool
    idle: frozenset[Stream]
    """Streams that it would change, but whose states nobody reads later."""


def _plan(sublayers: tuple[str, ...], alive: frozenset[Stream]) -> list[_Plan]:
    """Read the description from its end on: what nobody reads later is left out; ``alive`` are read after the last."""
    found: list[_Plan] = []
    for number in reversed(range(len(sublayers))):
        words = set(sublayers[number].split())
        reads, feeds, shared = words & set(READS), words & {"t", "v"}, "shared" in words
        _check(number, sublayers[number], words, reads, feeds)
        changes: set[Stream] = {s for s in NAMES if s in feeds or any(word[0] == s for word in reads)}
        runs = frozenset(changes & alive)
        used = frozenset(word for word in reads if word[0] in runs)
        keys: frozenset[Stream] = frozenset(s for s in NAMES if any(word[1] == s for word in used))
        found.append(_Plan(bool(reads), used, runs, keys, shared, frozenset(changes - alive)))
        alive = alive | keys
    return found[::-1]


def _check(number: int, text: str, words: set[str], reads: set[str], feeds: set[str]) -> None:
    """Refuse what is no sublayer."""
    name = f"model.fusion.sublayers[{number}] {text!r}"
    if unknown := words - {*READS, "t", "v", "shared"}:
        raise ValueError(f"{name}: unknown {sorted(unknown)}; use tt, tv, vt, vv, or t, v, and shared")
    if bool(reads) == bool(feeds):
        raise ValueError(f"{name} is not one of attention and feed-forward; give either tt, tv, vt, vv, or t, v")
    if ("tv" in reads) != ("vt" in reads):
        raise ValueError(f"{name}: the streams read each other, or neither; give tv and vt, or use kind dual_stream")
    if "shared" in words and {word[0] for word in reads | feeds} != {"t", "v"}:
        raise ValueError(f"{name}: only one stream is there to share; leave shared out, or name both")


@dataclass(frozen=True)
class _Sizes:
    """Sizes of one stream in one sublayer."""

    width: int
    heads: int
    hidden: int
    inner: int


class Keys(nn.Module):
    """Key and value projections of a stream that is read, but reads nothing itself any more."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.key, self.value = heads, nn.Linear(width, inner), nn.Linear(width, inner)

    def project(self, memory: Tensor) -> KeyValues:
        """[M, S, D] -> keys and values, [M, H, S, inner / H] each."""
        split = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.key(memory), self.value(memory)))
        return KeyValues(*split)


class Half(nn.Module):
    """One stream's part of a sublayer: attention or feed-forward, with its layer norm."""

    def __init__(self, plan: _Plan, sizes: _Sizes, stack: StackConfig, runs: bool) -> None:
        super().__init__()
        self.pre = stack.norm == "pre"
        self.attention: Attention | Keys | None = None
        if plan.attention and runs:
            self.attention = Attention(sizes.width, sizes.heads, inner=sizes.inner, dropout=stack.dropout)
        elif plan.attention:
            self.attention = Keys(sizes.width, sizes.heads, sizes.inner)
        self.feed = None if plan.attention else FeedForward(sizes.width, sizes.hidden, stack.activation)
        self.norm = nn.LayerNorm(sizes.width, stack.eps) if runs or self.pre else None
        self.drop = nn.Dropout(stack.dropout)

    def read(self, states: Tensor) -> Tensor:
        """What the branch reads of the stream, [M, S, D]."""
        return self.norm(states) if self.pre and self.norm is not None else states

    def add(self, states: Tensor, branch: Tensor) -> Tensor:
        """The stream with a branch's output added, [M, S, D]."""
        assert self.norm is not None
        states = states + self.drop(branch)
        return states if self.pre else self.norm(states)


Streams: TypeAlias = dict[Stream, Tensor]


class Sublayer(nn.Module):
    """Attention or feed-forward of both streams."""

    def __init__(self, plan: _Plan, sizes: dict[Stream, _Sizes], stack: StackConfig) -> None:
        super().__init__()
        self.plan = plan
        self.text = self.image = None
        if plan.shared:
            if plan.runs:
                self.text = self.image = Half(plan, sizes["t"], stack, True)
            return
        if "t" in plan.runs | plan.keys:
            self.text = Half(plan, sizes["t"], stack, "t" in plan.runs)
        if "v" in plan.runs | plan.keys:
            self.image = Half(plan, sizes["v"], stack, "v" in plan.runs)

    def unread(self) -> tuple[str, ...]:
        """Return patterns of the weights that it would have if somebody read its outcome."""
        if self.plan.shared:
            return () if self.plan.runs else ("text.*", "image.*")
        found = []
        for stream in sorted(self.plan.idle):
            half = self._half(stream)
            parts = ["*"] if half is None else ["attention.query.*", "attention.out.*"]
            if half is not None and half.norm is None:
                parts.append("norm.*")
            found += [f"{NAMES[stream]}.{part}" for part in parts]
        return tuple(found)

    def forward(self, streams: Streams, masks: dict[Stream, Tensor | None]) -> Streams:
        """States [M, S, D] and masks of the streams that a row has -> the states after it."""
        halves: dict[Stream, Half] = {s: half for s in streams if (half := self._half(s)) is not None}
        read = {s: half.read(streams[s]) for s, half in halves.items()}
        memory = {s: halves[s].attention.project(read[s]) for s in self.plan.keys if s in halves}  # type: ignore[union-attr]
        after = dict(streams)
        for s in sorted(self.plan.runs & halves.keys()):
            half = halves[s]
            if half.feed is not None:
                after[s] = half.add(streams[s], half.feed(read[s]))
            elif seen := [other for other in NAMES if s + other in self.plan.reads and other in memory]:
                keys, mask = _join([memory[other] for other in seen], [masks[other] for other in seen])
                assert isinstance(half.attention, Attention)
                after[s] = half.add(streams[s], half.attention(read[s], keys, mask))
        return after

    def _half(self, stream: Stream) -> Half | None:
        half = self.text if stream == "t" else self.image
        assert half is None or isinstance(half, Half)
        return half


def _join(memories: list[KeyValues], masks: list[Tensor | None]) -> tuple[KeyValues, Tensor | None]:
    """Lay what is read behind each other, under one softmax."""
    if len(memories) == 1:
        return memories[0], masks[0]
    keys, values = torch.cat([m.keys for m in memories], 2), torch.cat([m.values for m in memories], 2)
    if all(mask is None for mask in masks):
        return KeyValues(keys, values), None
    given = [
        m.keys.new_ones((len(m.keys), 1, 1, m.keys.shape[2]), dtype=torch.bool) if mask is None else mask
        for m, mask in zip(memories, masks, strict=True)
    ]
    return KeyValues(keys, values), torch.cat(given, -1)


class Sublayers(nn.Module):
    """Two streams through a list of sublayers.

    Raises:
        ValueError: the description is not one, or streams of different widths shall share weights.
    """

    attention_kinds: tuple[AttentionKind, ...] = ("full",)

    def __init__(self, config: SublayersConfig, image_width: int, text_width: int, reads: frozenset[Side]) -> None:
        super().__init__()
        stack = config.stack
        if stack.normformer:
            raise ValueError("model.fusion.normformer true: sublayers have no norms of that kind; set it to false")
        self.text_width, self.image_width = stack.width, config.image_width or image_width
        described = config.sublayers or ("tt tv vt vv shared", "t v shared") * stack.layers
        self.config = config.model_copy(update={"sublayers": described, "image_width": self.image_width})
        self.text_project = _linear(text_width, self.text_width)
        self.image_project = _linear(image_width, self.image_width)
        text, image = self._sizes(stack)
        pooled = "pooled" in reads
        pooler = Pooler(config.pooler, self.text_width, self.image_width, config.pooled_width) if pooled else None
        alive: set[Stream] = set()
        if "text" in reads or "memory" in reads or pooled:
            alive.add("t")
        if "image" in reads or "memory" in reads or (pooler is not None and pooler.reads_image):
            alive.add("v")
        plans = _plan(described, frozenset(alive or NAMES))
        self.sublayers = nn.ModuleList()
        for number, plan in enumerate(plans):
            cross = "tv" in described[number].split()
            sizes = {"t": text[cross], "v": image[cross]}
            if plan.shared and self.text_width != self.image_width:
                raise ValueError(
                    f"model.fusion.sublayers[{number}] {described[number]!r}: streams of different widths cannot share "
                    f"weights ({self.text_width}, {self.image_width}); leave shared out, or set image_width to "
                    f"{self.text_width}"
                )
            self.sublayers.append(Sublayer(plan, sizes, stack))  # type: ignore[arg-type]
        pre = stack.norm == "pre"
        self.text_norm = nn.LayerNorm(self.text_width, stack.eps) if pre and "t" in alive else nn.Identity()
        self.image_norm = nn.LayerNorm(self.image_width, stack.eps) if pre and "v" in alive else nn.Identity()
        initialise(self)
        self.pooler = pooler
        self.pooled_width = pooled_width(pooler, config.images)

    def _sizes(self, stack: StackConfig) -> tuple[tuple[_Sizes, _Sizes], tuple[_Sizes, _Sizes]]:
        """Sizes of (text, image), each (within the stream, where the streams read each other)."""
        config, found = self.config, []
        hidden = stack.hidden or 4 * stack.width
        image_hidden = config.image_hidden or (hidden if self.image_width == stack.width else 4 * self.image_width)
        for width, heads, inside in (
            (self.text_width, stack.heads, hidden),
            (self.image_width, config.image_heads or stack.heads, image_hidden),
        ):
            own = _Sizes(width, heads, inside, width)
            found.append((own, _Sizes(width, config.cross_heads or heads, inside, config.cross_width or width)))
        return found[0], found[1]

    @property
    def unread(self) -> tuple[str, ...]:
        """Patterns of the weights that it would have if somebody read both its streams to the end."""
        return tuple(f"sublayers.{n}.{part}" for n, one in enumerate(self.sublayers) for part in one.unread())  # type: ignore[operator]

    def load_pretrained(self) -> None:
        """Fill from ``config.init``, a BERT, where the recipe names one: what reads its own text, layer after layer.

        A layer's feed-forward is the text stream's next one (Lu et al. 2019, ViLBERT, section 3.1).
        """
        if self.config.init is None:
            return
        layers = nn.Module()
        layers.blocks = nn.ModuleList(self._text_layers())
        load_bert(layers, self.config.init, embeddings=False)

    def _text_layers(self) -> list[nn.ModuleDict]:
        """The text stream's self-attention and the feed-forward behind each, under the names of our BERT stack."""
        halves = [sublayer.text for sublayer in self.sublayers]
        found: list[nn.ModuleDict] = []
        for number, description in enumerate(self.config.sublayers):
            if "tt" not in description.split():
                continue
            layer = nn.ModuleDict()
            feed = next((h for h in halves[number + 1 :] if isinstance(h, Half) and h.feed is not None), None)
            for half, part in ((halves[number], "attention"), (feed, "feed")):
                if isinstance(half, Half) and half.norm is not None:
                    layer[part], layer[f"{part}_norm"] = getattr(half, part), half.norm
            found.append(layer)
        return found

    def forward(
        self,
        image: Tokens | None,
        text: Tokens | None,
        image_index: Tensor | None = None,
        attention: AttentionKind = "full",
        prefix: Tensor | None = None,
        layers: bool = False,
    ) -> Fused:
        """Image states [B, N, D] at rows ``image_index`` with text states [M, L, D] -> Fused of M rows.

        A side that is missing is not read, and its sublayers are left out.

        Raises:
            ValueError: ``attention`` is one that leaks here.
        """
        if attention != "full":
            raise ValueError(
                f"model.fusion sublayers cannot read a {attention} text without leaking its future; use single_stream "
                "or dual_stream"
            )
        if self.config.images == "each" and image is not None and text is not None:
            return fuse_each(partial(self._fuse, image, layers=layers), text, image_index, attention, prefix)
        return self._fuse(image, text, image_index, layers=layers)

    def _fuse(
        self,
        image: Tokens | None,
        text: Tokens | None,
        image_index: Tensor | None,
        attention: AttentionKind = "full",
        prefix: Tensor | None = None,
        number: Tensor | None = None,
        layers: bool = False,
    ) -> Fused:
        """As ``forward``, of rows with one image."""
        streams: Streams = {}
        keeps: dict[Stream, Tensor | None] = {}
        if text is not None:
            streams["t"], keeps["t"] = self.text_project(text.states), text.keep
        if image is not None:
            states, keeps["v"] = gather_images(image.states, image.keep, image_index)
            streams["v"] = self.image_project(states)
        masks = {s: attention_mask(keep) for s, keep in keeps.items()}
        every = [streams]
        for sublayer in self.sublayers:
            streams = sublayer(streams, masks)
            every.append(streams)
        sides: dict[Stream, Tokens | None] = {"t": None, "v": None}
        for s, states in streams.items():
            states = (self.text_norm if s == "t" else self.image_norm)(states)
            sides[s] = Tokens(states, keeps[s], states[:, 0], tuple(x[s] for x in every) if layers else None)
        return Fused(sides["v"], sides["t"], self._pool(sides["v"], sides["t"]))

    def _pool(self, image: Tokens | None, text: Tokens | None) -> Tensor:
        """[M, pooled_width]; [M, 0] where nothing is pooled, or a side is missing that would be read."""
        some = text if text is not None else image
        assert some is not None
        if self.pooler is None or (self.pooler.reads_image and (image is None or text is None)):
            return some.states.new_zeros(some.states.shape[0], 0)
        return self.pooler(image.pooled if image else None, text.pooled if text else None)


def _linear(before: int, after: int) -> nn.Module:
    return nn.Identity() if before == after else nn.Linear(before, after)
