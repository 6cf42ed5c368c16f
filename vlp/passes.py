"""Passes: what a step computes, each thing once, in a fixed order.

Encodes and embeds first; then the objectives name the pairs that only this step can know; then all fuse rows of all
objectives go through the fusion stacked into as few calls as possible; decodes last.
Shapes: B images, T texts, M fused rows, N image tokens, L text length, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from encoders.types import AttentionKind, Batch, Images, Modality, Texts, Tokens
from objectives.base import MAIN, WHOLE, Decode, Embed, Encode, Fuse, Fused, Objective, Pass, Results, Rows
from objectives.collectives import world_size
from vlp.fusion.rows import beside, concatenate, gather_tokens, pad_to, split, take
from vlp.multimodal import Multimodal

if TYPE_CHECKING:
    from vlp.model import Model
    from vlp.teacher import Teacher

GiveRows = Callable[[Results], Mapping[str, Rows]]


def close(passes: Iterable[Pass]) -> frozenset[Pass]:
    """Return the passes with all that they read: an embed its encode, a decode its memory."""
    found: set[Pass] = set()
    for wanted in passes:
        found.add(wanted)
        if isinstance(wanted, Embed):
            found.add(Encode(wanted.modality, wanted.view, wanted.branch, wanted.teacher))
        elif isinstance(wanted, Decode):
            found.add(replace(wanted.memory, teacher=wanted.teacher))
    return frozenset(found)


def _without_teacher(one: Pass) -> Pass:
    """The pass's name within the teacher."""
    if isinstance(one, Decode):
        return replace(one, memory=replace(one.memory, teacher=False), teacher=False)
    return replace(one, teacher=False)


def row_givers(objectives: Mapping[str, Objective], name: str) -> list[str]:
    """Return the other objectives that draw the pairs which an objective reads (WRA those of ITM)."""
    wanted = {one.rows for one in objectives[name].needs if isinstance(one, Fuse) and one.rows}
    return [
        other
        for other, objective in objectives.items()
        if other != name
        and type(objective).rows is not Objective.rows
        and wanted & {one.rows for one in objective.needs if isinstance(one, Fuse)}
    ]


def views(passes: Iterable[Pass]) -> dict[Modality, set[str]]:
    """Return the views of each modality that the passes read."""
    found: dict[Modality, set[str]] = {"image": set(), "text": set()}
    for wanted in close(passes):
        if isinstance(wanted, Encode | Embed):
            found[wanted.modality].add(wanted.view)
        elif isinstance(wanted, Fuse):
            found["image"] |= {wanted.image} - {None}  # type: ignore[arg-type]
            found["text"] |= {wanted.text} - {None}  # type: ignore[arg-type]
        else:
            found["text"].add(wanted.text)
    if WHOLE in found["image"]:  # made of the clean images
        found["image"] = found["image"] - {WHOLE} | {"clean"}
    return found


class Step:
    """The passes of one step, computed on demand and kept."""

    def __init__(self, model: Model | Teacher, batch: Batch, layers: bool = False) -> None:
        self.model, self.batch, self.layers = model, batch, layers
        self.results = model.new_results()
        self._read: dict[tuple[Modality, str, int | None], Tokens] = {}
        self._gathered: dict[tuple[Modality, str, int | None], Tokens] = {}
        self._teacher: Step | None = None
        self._whole = False

    def run(self, passes: Iterable[Pass], give_rows: GiveRows | None = None) -> Results:
        """Compute ``passes`` and all they read, each once; ``give_rows`` names the pairs once the embeds are known.

        The teacher's embeds come before the rows, as objectives may draw from them.
        """
        every = sorted(close(passes) - self.results.keys(), key=repr)
        self._whole |= any(WHOLE in (getattr(one, "view", None), getattr(one, "image", None)) for one in every)
        wanted, teachers = [one for one in every if not one.teacher], [one for one in every if one.teacher]
        for one in wanted:
            if isinstance(one, Encode):
                self.results[one] = self._encode(one)
        for one in wanted:
            if isinstance(one, Embed):
                self.results[one] = self._embed(one)
        self._teach([one for one in teachers if isinstance(one, Encode | Embed)])
        if give_rows is not None:
            self.results.rows = give_rows(self.results)
        self._teach([one for one in teachers if isinstance(one, Fuse | Decode)])
        self._fuse([one for one in wanted if isinstance(one, Fuse)])
        for one in wanted:
            if isinstance(one, Decode):
                self.results[one] = self._decode(one)
        return self.results

    @torch.no_grad()
    def _teach(self, wanted: list[Pass]) -> None:
        """Run passes by the momentum teacher, which has the model's parts under the model's names."""
        if not wanted:
            return
        if self.model.teacher is None:
            raise ValueError("this model has no momentum teacher; set objectives.itc.queue or an objective's distill")
        if self._teacher is None:
            self._teacher = Step(self.model.teacher, self.model.teacher.seen(self.batch), self.layers)
            self.results.teacher_heads = self.model.teacher.heads
        rows = self.results.rows
        found = self._teacher.run([_without_teacher(one) for one in wanted], lambda _: rows)
        for one in wanted:
            self.results[one] = found[_without_teacher(one)]

    def _tower(self, modality: Modality, view: str, first: int | None = None) -> Tokens:
        """What the fusion reads: the encoder's output, which is bare embeddings where the fusion is the tower.

        ``first`` takes the place of a text's first id.
        """
        key = (modality, view, first)
        if modality == "image" and key not in self._read:
            self._read_regions(view)
        if key not in self._read:
            encoder = self.model.vision if modality == "image" else self.model.text
            given = self.batch.images if modality == "image" else self.batch.texts
            if encoder is None or view not in given:
                raise ValueError(f"the batch has no {modality} view {view!r}; it has {sorted(given)}")
            read = given[view]
            if first is not None:
                assert isinstance(read, Texts)
                ids = torch.cat([torch.full_like(read.ids[:, :1], first), read.ids[:, 1:]], 1)
                read = replace(read, ids=ids)
            fusion = self.model.fusion
            self._read[key] = encoder(read, layers=self.layers or reads_inner(fusion))
        return self._read[key]

    def _read_regions(self, view: str) -> None:
        """Read pictures and their regions in one go, where the clean images are regions and both are wanted."""
        clean = self.batch.images.get("clean")
        if view not in ("clean", WHOLE) or not isinstance(clean, Images) or self.model.vision is None:
            return
        if clean.owner is None:
            if view == WHOLE:
                self._read["image", WHOLE, None] = self._tower("image", "clean")
        elif self._whole:
            regions, whole = self.model.vision.regions(clean)  # type: ignore[operator]
            self._read["image", "clean", None], self._read["image", WHOLE, None] = regions, whole

    def _fused_tower(self, modality: Modality, view: str, first: int | None = None) -> Tokens:
        """What the fusion reads of a tower: its states, before their last norm where it wants them so.

        Where it reads the tower's last layers, their states side by side, [B, N, layers * D].
        """
        tokens = self._tower(modality, view, first)
        if number := getattr(self.model.fusion, "reads_layers", 0):
            return self._last_layers(tokens, modality, number)
        if not getattr(self.model.fusion, "before_norm", False):
            return tokens
        assert tokens.layers is not None
        return replace(tokens, states=tokens.layers[-1])

    def _last_layers(self, tokens: Tokens, modality: Modality, number: int) -> Tokens:
        """States of a tower's last layers, each after the tower's last norm, side by side."""
        encoder = self.model.vision if modality == "image" else self.model.text
        found = len(tokens.layers or ()) - 1
        if found < number or not hasattr(encoder, "finish"):
            had = f"has {max(found, 0)}" if hasattr(encoder, "finish") else "of this kind does not show them"
            raise ValueError(
                f"model.fusion reads the last {number} layers of each tower, but the {modality} tower {had}; lower "
                f"model.fusion.layers, or give model.{'vision' if modality == 'image' else 'text'} as many"
            )
        assert encoder is not None and tokens.layers is not None
        inner = [encoder.finish(states) for states in tokens.layers[-number:-1]]  # type: ignore[operator]
        return replace(tokens, states=torch.cat([*inner, tokens.states], -1))

    def _encode(self, name: Encode) -> Tokens:
        tokens = self._tower(name.modality, name.view)
        if not self.model.is_tower(name.modality):
            return tokens
        assert self.model.fusion is not None
        image, text = (tokens, None) if name.modality == "image" else (None, tokens)
        kind, prefix = self._attention(name.view if name.modality == "text" else None)
        branch = {} if name.branch == MAIN else {"branch": name.branch}
        if branch and name.branch not in getattr(self.model.fusion, "branches", ()):
            raise ValueError(f"model.fusion has no branch {name.branch!r}; use kind multiway, whose branch is vl")
        fused = self.model.fusion(image, text, attention=kind, prefix=prefix, layers=self.layers, **branch)
        side = fused.image if name.modality == "image" else fused.text
        assert side is not None
        return side

    def _embed(self, name: Embed) -> Tensor:
        space = self.model.space(name.branch)
        if space is None:
            raise ValueError("this model has no contrastive embedding; pretrain it with objective itc")
        tokens: Tokens = self.results[Encode(name.modality, name.view, name.branch, name.teacher)]
        if name.tokens:
            return space(name.modality, tokens.states)
        pooled = tokens.pooled if space.reads == "pooled" else tokens.states[:, 0]
        return space(name.modality, pooled) if name.unit else space.project(name.modality, pooled)

    def _attention(self, view: str | None) -> tuple[AttentionKind, Tensor | None]:
        text = None if view is None else self.batch.texts.get(view)
        return ("full", None) if text is None else (text.attention, text.prefix)

    def _decode(self, name: Decode) -> Tokens:
        if self.model.decoder is None:
            raise ValueError("this model has no decoder; set model.decoder.kind causal and train objective lm")
        memory = memory_of(self.results[replace(name.memory, teacher=False)], self.model.decoder.config.memory)
        text = self.batch.texts[name.text]
        index = self._images_of(name.text) if isinstance(name.memory, Encode) else text.owner
        # The text encoder may be its lower half, whose pass then serves both.
        lower = {"lower": self._tower("text", name.text)} if isinstance(self.model.decoder, Multimodal) else {}
        return self.model.decoder(text, memory, index, layers=self.layers, **lower)

    def _images_of(self, view: str) -> Tensor | None:
        """The image of each text of a view, [T]; None: text i is of image i."""
        index, owner = self.batch.image_of_text, getattr(self.batch.texts.get(view), "owner", None)
        if owner is None or index is None:
            return index if owner is None else owner
        return index.index_select(0, owner)

    def _fuse(self, wanted: list[Fuse]) -> None:
        """Run all fuse passes, stacked where attention kind and sides agree."""
        if wanted and self.model.fusion is None:
            raise ValueError("this model has no fusion (model.fusion.kind none); use single_stream or dual_stream")
        groups: dict[tuple, list[Fuse]] = {}
        for one in wanted:
            kind, _ = self._attention(one.text)
            pair = self._rows(one).dim if one.image and one.text else 0
            groups.setdefault((one.image is None, one.text is None, kind, pair), []).append(one)
        for (_, _, kind, _), group in groups.items():
            for one, fused in zip(group, self._fuse_group(group, kind), strict=True):
                self.results[one] = fused

    def _rows(self, name: Fuse) -> _RowIndex:
        if name.text is None:
            return _RowIndex(None, None)  # one row an image
        if name.rows is not None:
            rows = self.results.rows[name.rows]
            return _RowIndex(rows.image_index, rows.text_index, rows.everywhere)
        return _RowIndex(self._images_of(name.text), None)

    def _fuse_group(self, group: list[Fuse], kind: AttentionKind) -> list[Fused]:
        assert self.model.fusion is not None
        image, first = self._stack_images([(o.image, self._rows(o).everywhere) for o in group if o.image is not None])
        parts: list[Tokens] = []
        prefixes: list[Tensor] = []
        indices: list[Tensor | None] = []
        sizes: list[int] = []
        for one in group:
            rows = self._rows(one)
            if one.text is not None:
                first_id = getattr(self.model.text, "fused_first", None) if one.image is not None else None
                text = self._candidates("text", one.text, rows.everywhere, first_id)
                parts.append(text if rows.text is None else take(text, rows.text))
                sizes.append(parts[-1].states.shape[0])
                prefix = self.batch.texts[one.text].prefix
                if kind == "prefix" and prefix is not None:
                    prefixes.append(prefix if rows.text is None else prefix[rows.text])
            if one.image is not None:
                own = self._fused_tower("image", one.image).states
                if one.text is None:
                    sizes.append(own.shape[0])
                index = rows.image
                if index is None and len(group) > 1:
                    index = torch.arange(sizes[-1], device=own.device)
                indices.append(None if index is None else index + first[one.image, rows.everywhere])
        text_rows = concatenate(parts)
        index = None if not indices or indices[0] is None else torch.cat([i for i in indices if i is not None])
        fused = self.model.fusion(
            image, text_rows, index, kind, torch.cat(prefixes) if prefixes else None, layers=self.layers
        )
        return split(fused, sizes, [part.states.shape[1] for part in parts] or [None] * len(sizes))

    def _stack_images(self, names: list[tuple[str, bool]]) -> tuple[Tokens | None, dict[tuple[str, bool], int]]:
        """Lay the images of all views, own or of all ranks, behind each other; return them and each one's first row."""
        first: dict[tuple[str, bool], int] = {}
        parts: list[Tokens] = []
        for name in names:
            if name not in first:
                first[name] = sum(part.states.shape[0] for part in parts)
                parts.append(self._candidates("image", *name))
        return concatenate(parts), first

    def _candidates(self, modality: Modality, view: str, everywhere: bool, first: int | None = None) -> Tokens:
        """What the fusion reads of this rank's, or of all ranks', images or texts."""
        tokens = self._fused_tower(modality, view, first)
        if not everywhere or world_size() == 1:
            return tokens
        key = (modality, view, first)
        if key not in self._gathered:
            if modality == "text":  # every rank's to one length that all know
                tokens = pad_to(tokens, getattr(self.model.text.config, "max_length", None))
            counts = self.batch.counts
            sizes = None if counts is None else [texts if modality == "text" else images for images, texts in counts]
            self._gathered[key] = gather_tokens(tokens, sizes)
        return self._gathered[key]


@dataclass(frozen=True)
class _RowIndex:
    image: Tensor | None
    text: Tensor | None
    everywhere: bool = False

    @property
    def dim(self) -> int:
        """Images per row: 1, or I for an index [M, I]."""
        return 1 if self.image is None or self.image.dim() == 1 else self.image.shape[1]


def reads_inner(fusion: object) -> bool:
    """Whether a fusion reads what encoders give before their final norm, or the states of several of their layers."""
    return getattr(fusion, "before_norm", False) or getattr(fusion, "reads_layers", 0) > 0


def memory_of(source: Tokens | Fused, side: str) -> Tokens:
    """Return the tokens that a decoder reads from an encode or a fuse."""
    if isinstance(source, Tokens):
        return source
    if side == "both" and source.image is not None and source.text is not None:
        return beside(source.image, source.text)
    lone = side == "both" and source.image is None  # a text alone
    tokens = source.text if side == "text" or lone else source.image
    if tokens is None:
        raise ValueError(f"model.decoder.memory {side}: the fusion gives no {side} states; use the other side")
    return tokens
