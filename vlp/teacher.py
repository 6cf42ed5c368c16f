"""The momentum teacher: a moving average of what the plan's teacher passes use (He et al. 2020, MoCo, eq. 2).

It has the model's parts under the model's names, so that the same passes run on it, without gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from encoders.types import Batch, Modality
from objectives.base import MAIN, Decode, Embed, Encode, Fuse, Pass, Results
from vlp.embed import EmbedSpace

if TYPE_CHECKING:
    from vlp.model import Model

PARTS = ("vision", "text", "fusion", "decoder", "embed")


class Teacher(nn.Module):
    """Copies of the model's parts and heads that teacher passes use; they receive no gradient.

    Args:
        model: whose parts are copied, with their weights.
        passes: the teacher passes of the plan.
        heads: names of the objectives whose heads are copied too.
    """

    def __init__(self, model: Model, passes: Iterable[Pass], heads: Iterable[str] = ()) -> None:
        super().__init__()
        used = _parts_of(model, passes)
        # One copy, so that what the model's parts share the teacher's share too.
        whole = {"parts": {name: getattr(model, name) for name in PARTS if name in used}}
        whole["heads"] = {name: model.objectives[name] for name in heads}
        copied = copy.deepcopy(whole)
        parts = copied["parts"]
        self.vision: Any = parts.get("vision")
        self.text: Any = parts.get("text")
        self.fusion: Any = parts.get("fusion")
        self.decoder: Any = parts.get("decoder")
        self.embed: Any = parts.get("embed")
        self.heads = nn.ModuleDict(copied["heads"])
        for space in [] if self.embed is None else self.embed.values():
            space.logit_scale = space.logit_bias = None  # the temperature is the student's business
        self.teacher = None
        self._bare = {"image": model.is_tower("image"), "text": model.is_tower("text")}
        self.view = model.config.teacher_view
        self.requires_grad_(False)

    def seen(self, batch: Batch) -> Batch:
        """Return the batch as the teacher sees it, whose clean images may be others than the student's.

        Raises:
            ValueError: the batch has no such images.
        """
        if self.view == "clean" or not batch.images:
            return batch
        if self.view not in batch.images:
            raise ValueError(
                f"model.teacher_view {self.view}: the batch has no such images; it has {sorted(batch.images)}"
            )
        return replace(batch, images={**batch.images, "clean": batch.images[self.view]})

    def is_tower(self, modality: Modality) -> bool:
        """Whether the fusion is this modality's tower."""
        return self._bare[modality]

    def space(self, branch: str = MAIN) -> EmbedSpace | None:
        """Return a contrastive space; None if there is no such."""
        found = dict(self.embed.items()).get(branch) if self.embed is not None else None
        assert found is None or isinstance(found, EmbedSpace)
        return found

    def new_results(self) -> Results:
        """Return empty results, without a temperature."""
        return Results()

    @torch.no_grad()
    def update(self, model: Model, momentum: float) -> None:
        """Move every weight towards the student's: m * teacher + (1 - m) * student; a dictionary's entries are its."""
        mine, student = self._beside(model)
        get_ema_multi_avg_fn(momentum)(mine, student, 0)
        self._take_entries(model)

    @torch.no_grad()
    def copy_from(self, model: Model, names: Iterable[str] | None = None) -> None:
        """Take the student's weights; only those of the teacher's parameters ``names``, if they are given."""
        wanted = None if names is None else set(names)
        mine, student = self._beside(model, wanted)
        for weight, source in zip(mine, student, strict=True):
            weight.copy_(source)
        self._take_entries(model)

    def _take_entries(self, model: Model) -> None:
        """Read cells by the student's dictionary, which follows their mean over steps already."""
        theirs = dict(model.named_buffers())
        for name, own in self.named_buffers():
            if name.startswith("vision.dictionary."):
                own.copy_(theirs[name])

    def _beside(self, model: Model, wanted: set[str] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's weights (of these names) and the student's that they follow."""
        theirs = dict(model.named_parameters(remove_duplicate=False))
        mine: list[Tensor] = []
        student: list[Tensor] = []
        for name, weight in self.named_parameters():
            if wanted is None or name in wanted:
                source = f"objectives.{name.removeprefix('heads.')}" if name.startswith("heads.") else name
                mine.append(weight)
                student.append(theirs[source].detach())
        return mine, student


def _parts_of(model: Model, passes: Iterable[Pass]) -> set[str]:
    """Names of the parts that passes run through."""
    found: set[str] = set()
    for one in passes:
        if isinstance(one, Encode | Embed):
            found.add("vision" if one.modality == "image" else "text")
            if model.is_tower(one.modality):
                found.add("fusion")
            if isinstance(one, Embed):
                found |= {"embed"}
        elif isinstance(one, Fuse):
            found |= {"fusion"} | ({"vision"} if one.image else set()) | ({"text"} if one.text else set())
        elif isinstance(one, Decode):
            found |= {"decoder", "text"} | _parts_of(model, [one.memory])
    return found
