"""A model's parts, by the first level of their parameters' names: their initial weights and their sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from objectives.base import Objective


@contextmanager
def part_seed(seed: int, part: str) -> Iterator[None]:
    """Draw a part's initial weights from (seed, part) alone, leaving the global generator as it was."""
    digest = hashlib.blake2b(f"{seed}/{part}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest, "little") % 2**63)
        yield


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Count parameters by part, shared ones once, where they appear first."""
    seen: set[int] = set()
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2]) if name.startswith("objectives.") else name.split(".")[0]
        if id(parameter) not in seen:
            found[part] = found.get(part, 0) + parameter.numel()
            seen.add(id(parameter))
    return found


def share_head(built: Mapping[str, Objective], name: str, other: str) -> None:
    """Give an objective the head of another one.

    Raises:
        ValueError: there is no such objective, or its head is another kind's.
    """
    if type(built.get(other)) is not type(built[name]) or other == name:
        raise ValueError(
            f"objectives.{name}.head_of {other!r} is no other objective of its kind; the objectives are {list(built)}"
        )
    if not isinstance(head := getattr(built[other], "head", None), nn.Module):
        raise ValueError(f"objectives.{name}.head_of {other!r}: objectives of this kind have no head; leave it out")
    built[name].head = head
