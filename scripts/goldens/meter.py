"""METER's cases."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from encoders.types import Modality
from objectives.base import Encode
from scripts.goldens.base import Adapter, Case, Output, Ran
from scripts.goldens.vilt import (
    CLEAN,
    HEADS,
    LOSSES,
    authors_batch,
    authors_draws,
    authors_objectives,
    authors_passes,
    authors_settings,
    text_keep,
)

IMAGE = Encode("image")


def _config(case: Case) -> Mapping[str, Any]:
    """The authors' own, with the heads of the two towers, which they build by name."""
    towers = [value for value in case.config.values() if isinstance(value, Mapping)]
    heads = [one["num_attention_heads"] for one in towers if "num_attention_heads" in one]
    vision = [one["heads"] for one in towers if "heads" in one]
    own = case.config["num_heads"]
    return case.config | {"vision_heads": vision[0] if vision else own, "text_heads": heads[0] if heads else own}


def _layer(ran: Ran, side: str, number: int) -> Tensor:
    return getattr(ran[CLEAN], side).layers[number]


_OUTPUTS: dict[str, Output] = {
    "vit": lambda ran: ran[IMAGE].states,
    "cls_feats": lambda ran: ran[CLEAN].pooled,
    "text_feats": lambda ran: ran[CLEAN].text.states,
    "image_feats": lambda ran: ran[CLEAN].image.states,
    **{f"cross_{side}_{n}": partial(_layer, side=side, number=n + 1) for side in ("text", "image") for n in range(6)},
    **HEADS,
    **LOSSES,
}


def _transformed(ran: Ran, side: Modality) -> Tensor:
    """What the first layer of the fusion reads, without the modality's vector."""
    fusion = ran.model.fusion
    return getattr(fusion, f"{side}_project")(ran[Encode(side)].states)


_OUTPUTS |= {"text_transformed": partial(_transformed, side="text")}
_OUTPUTS |= {"image_transformed": partial(_transformed, side="image")}


def _keep(case: Case) -> dict[str, Tensor]:
    names = ("text_transformed", "text_feats", "mlm_logits", *(f"cross_text_{n}" for n in range(6)))
    return {name: text_keep(case) for name in names if name in case.outputs}


ADAPTERS = {
    r"meter_(?!posembed).*": Adapter(
        batch=authors_batch,
        outputs=lambda case: _OUTPUTS,
        passes=lambda case: [*authors_passes(case), *([IMAGE, Encode("text")] if "vit" in case.outputs else [])],
        keep=_keep,
        draws=authors_draws,
        config=_config,
        settings=authors_settings,
        objectives=authors_objectives,
    ),
}
