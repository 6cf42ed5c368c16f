"""Layer-wise decay of the learning rate: the nearer a parameter is to the pixels and words, the less it moves.

Clark et al. 2020 (ELECTRA) and Bao et al. 2022 (BEiT): with L blocks, the heads learn at the full rate, block i (from
1) at decay ** (L + 1 - i), the embeddings at decay ** (L + 1).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch import nn

PARTS = ("vision", "text", "fusion", "decoder")


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the multiplier of every parameter, by name.

    The fusion's blocks stand above those of the towers, a decoder's above what it reads; what is in no part
    (projections, objectives' heads) is at the top.

    Args:
        model: with parts ``vision``, ``text``, ``fusion`` and ``decoder``, of which some may be missing.
        decay: of one block, 0 < decay <= 1.
    """
    parts = {name: part for name in PARTS if isinstance(part := getattr(model, name, None), nn.Module)}
    levels = {name: levels_of(part) for name, part in parts.items()}
    fusion, decoder = (levels[name][0] if name in levels else 0 for name in ("fusion", "decoder"))
    if getattr(getattr(parts.get("decoder"), "config", None), "memory", "image") == "image":
        above = {"vision": max(fusion, decoder), "text": max(fusion, decoder), "fusion": 0}  # beside each other
    else:
        above = {"vision": fusion + decoder, "text": fusion + decoder, "fusion": decoder}
    found = {name: 1.0 for name, _ in model.named_parameters()}
    for name, (_, own) in levels.items():
        for inner, level in own.items():
            if f"{name}.{inner}" in found:  # a shared one counts where it appears first
                found[f"{name}.{inner}"] = decay ** (level + above.get(name, 0))
    return found


def levels_of(part: nn.Module) -> tuple[int, dict[str, int]]:
    """Return a part's blocks, and how many of them each parameter is away from its output, its own included.

    The blocks are the longest numbered list of modules, and those beside it that are as long or end one earlier (a
    second stream, whose last block nobody may read); what comes before them are embeddings, one below the first block;
    what comes after them is at the output. Where the modules are stages of blocks (Swin), the blocks count.
    """
    names = [name for name, _ in part.named_parameters()]
    prefixes = _staged(names) or [_numbered(name) for name in names]
    lists = Counter(prefix for prefix, _ in {one for one in prefixes if one is not None})
    if not lists:
        return 0, dict.fromkeys(names, 1)
    number = max(lists.values())
    stacks = {stack for stack, length in lists.items() if length == number or 1 <= length == number - 1}
    stacks = {stack for stack in stacks if stack.endswith("blocks")} or stacks  # bridge has lists of links, too
    first = next(index for index, one in enumerate(prefixes) if one is not None and one[0] in stacks)
    found = {}
    for index, (name, one) in enumerate(zip(names, prefixes, strict=True)):
        if one is not None and one[0] in stacks:
            found[name] = number - one[1]
        else:
            found[name] = number + 1 if index < first and not name.startswith("pooler.") else 0
    return number, found


def _staged(names: Sequence[str]) -> list[tuple[str, int] | None] | None:
    """As ``_numbered`` for each parameter, over the blocks of all stages; None where there are no stages of blocks.

    What a stage has beside its blocks goes with the block that follows it there, else with its last one (timm, and
    SimMIM's finetuning of Swin).
    """
    found = [_STAGED.match(name) for name in names]
    if not any(one is not None and one["block"] for one in found):
        return None
    places = [None if one is None else (one["stage"], int(one["number"]), int(one["block"] or -1)) for one in found]
    blocks = sorted({place for place in places if place is not None and place[2] >= 0})
    order = {place: number for number, place in enumerate(blocks)}
    numbers: list[tuple[str, int] | None] = []
    for index, place in enumerate(places):
        if place is not None and place not in order:  # no block: of its own stage, the next one or the last
            near = [other for other in places if other in order and other[:2] == place[:2]]
            later = [other for other in places[index:] if other in near]
            place = later[0] if later else near[-1] if near else None
        numbers.append(None if place is None else (f"{place[0]}.blocks", order[place]))
    return numbers


_STAGED = re.compile(r"(?P<stage>.*?)\.(?P<number>\d+)\.(?:blocks\.(?P<block>\d+)\.)?")


def _numbered(name: str) -> tuple[str, int] | None:
    """The list of modules that a parameter is in, and its number there; None if in none."""
    words = name.split(".")
    at = next((index for index, word in enumerate(words) if word.isdigit()), None)
    return None if at is None else (".".join(words[:at]), int(words[at]))
