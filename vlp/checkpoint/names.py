"""Name maps that go both ways: one table says what a family's weights are called there and here.

Loading reads the table from left to right, exporting from right to left; both are pure and differentiable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

import torch
from torch import Tensor

from vlp.checkpoint.foreign import Renamed

State: TypeAlias = Mapping[str, Tensor]
Convert: TypeAlias = Callable[[Tensor], Tensor]
Names: TypeAlias = str | tuple[str, ...]

_PLACES = {"n": r"\d+", "p": "weight|bias", "rest": ".+"}


def same(tensor: Tensor) -> Tensor:
    """Return the tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Pair:
    """Weights there and here that hold the same values; several of either side lie behind each other along axis 0.

    In the names ``{n}`` stands for a layer's number, ``{p}`` for ``weight`` or ``bias``, ``{rest}`` for anything.
    """

    theirs: Names
    """Names there."""
    ours: Names
    """Names here."""
    to_ours: Convert = same
    """Applied to each tensor of theirs."""
    to_theirs: Convert = same
    """Applied to each tensor on the way back: the inverse."""
    cut: tuple[int, ...] = ()
    """Relative lengths of ours, where they are not equal."""


class Conversions(TypedDict):
    """Arguments of a :class:`Pair`."""

    to_ours: Convert
    to_theirs: Convert


def shaped(theirs: tuple[int, ...], ours: tuple[int, ...]) -> Conversions:
    """Return the conversions of a :class:`Pair` between two shapes of the same values (-1 = what is left)."""
    return {"to_ours": lambda tensor: tensor.reshape(ours), "to_theirs": lambda tensor: tensor.reshape(theirs)}


def added_axes(number: int) -> Conversions:
    """Return the conversions of a :class:`Pair` where ours has that many axes of one more in front."""

    def add(tensor: Tensor) -> Tensor:
        return tensor[(None,) * number]

    def remove(tensor: Tensor) -> Tensor:
        return tensor[(0,) * number]

    return {"to_ours": add, "to_theirs": remove}


def transposed() -> Conversions:
    """Return the conversions of a :class:`Pair` between ``x @ W`` and a linear layer."""
    return {"to_ours": lambda tensor: tensor.T, "to_theirs": lambda tensor: tensor.T}


def blocks(theirs: str, ours: str, layers: Mapping[Names, Names]) -> tuple[Pair, ...]:
    """Return the pairs of a stack's layers: names of linear layers and norms within a block there -> here.

    Args:
        theirs: what stands before the layer's name there, with ``{n}``.
        ours: the same here.
        layers: each name there -> here, without ``.weight`` and ``.bias`` (or with ``{p}``, where it is written else).
    """

    def full(prefix: str, names: Names) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else names
        return tuple(prefix + (name if "{p}" in name else name + ".{p}") for name in names)

    return tuple(Pair(full(theirs, there), full(ours, here)) for there, here in layers.items())


def rename_pairs(table: Sequence[Pair], state: State, ignored: Mapping[str, str] | None = None) -> Renamed:
    """Rename a state dict of theirs to ours.

    Args:
        table: what is known.
        state: by their names.
        ignored: pattern of names that are left out on purpose -> reason.
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for pair in table:
        for theirs, ours in _expand(pair.theirs, pair.ours, state, used):
            parts = [pair.to_ours(state[name]) for name in theirs]
            found |= dict(zip(ours, _cut(parts, len(ours), pair.cut), strict=True))
            used |= set(theirs)
    left = [name for name in state if name not in used]
    reasons = {
        name: reason for pattern, reason in (ignored or {}).items() for name in left if re.fullmatch(pattern, name)
    }
    return Renamed(found, reasons, tuple(name for name in left if name not in reasons))


def restore_pairs(table: Sequence[Pair], state: State) -> dict[str, Tensor]:
    """Rename a state dict of ours to theirs.

    Raises:
        ValueError: the table does not know one of its weights.
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for pair in table:
        for ours, theirs in _expand(pair.ours, pair.theirs, state, used):
            parts = [pair.to_theirs(tensor) for tensor in _cut([state[name] for name in ours], len(theirs), ())]
            found |= dict(zip(theirs, parts, strict=True))
            used |= set(ours)
    if left := [name for name in state if name not in used]:
        raise ValueError(f"their format has no place for {left[0]}" + (f" and {len(left) - 1} more" * (len(left) > 1)))
    return found


def _cut(parts: Sequence[Tensor], number: int, shares: tuple[int, ...]) -> Sequence[Tensor]:
    """Lay tensors behind each other and cut them into ``number`` parts."""
    if number == len(parts):
        return parts
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    shares = shares or (1,) * number
    unit = len(whole) // sum(shares)
    return whole.split([unit * share for share in shares])


def _expand(
    left: Names, right: Names, state: State, used: Collection[str]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every number and kind of parameter for which all names on the left are there -> (left names, right names).

    Names that an earlier pair took are not there any more.
    """
    left, right = ((names,) if isinstance(names, str) else names for names in (left, right))
    for values in _matches(left[0], state):
        found, wanted = (tuple(name.format(**values) for name in names) for names in (left, right))
        if all(name in state and name not in used for name in found):
            yield found, wanted


def _matches(template: str, names: Iterable[str]) -> Iterator[dict[str, str]]:
    if "{" not in template:
        yield {}
        return
    pattern = re.escape(template)
    for name, values in _PLACES.items():
        pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{values})")
    for name in names:
        if match := re.fullmatch(pattern, name):
            yield match.groupdict()
