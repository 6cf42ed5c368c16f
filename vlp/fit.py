"""Do the parts of a model and its objectives fit each other? What does not is said with the ways out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encoders.types import Modality
from objectives.base import Decode, Embed, Encode, Fuse, Objective, Pass
from vlp.fusion.dual import DualStream
from vlp.passes import close, views

if TYPE_CHECKING:
    from vlp.model import Model, ModelConfig

MODALITIES: tuple[Modality, ...] = ("image", "text")


def misfits(model: Model, config: ModelConfig) -> list[str]:
    """Return every combination that cannot work, a line each; a model without objectives fits."""
    if not model.objectives:
        return []
    needs = close(model.needs())  # a decoder may be the only reader of a fusion
    found = [*_modalities(model, needs), *_fusion(model, config, needs)]
    if model.decoder is not None and not any(isinstance(one, Decode) for one in needs):
        found.append(f"no objective of {_names(model)} uses model.decoder; add lm, or set model.decoder none")
    return [*found, *_unmade_texts(model), *_untied(model, needs), *_fused_passes(model, config)]


def untrained(model: Model) -> list[str]:
    """Return the towers that objectives read and none of them trains, a line each; frozen ones are meant to be so."""
    objectives = dict(model.named_objectives())
    gives = {one for o in objectives.values() for one in o.needs - o.without_gradient if not one.teacher}
    read, trained = views(model.needs()), views(gives)
    found = []
    for modality in MODALITIES:
        part, tower = ("vision", model.vision) if modality == "image" else ("text", model.text)
        if read[modality] and not trained[modality] and any(one.requires_grad for one in tower.parameters()):
            names = [name for name, one in objectives.items() if views(one.needs)[modality]]
            found.append(
                f"objectives {', '.join(names)} read {modality}s without gradient, so that nothing trains model.{part}"
                f"; add itc, or keep the tower as it is with --train.optim.lr-scale.{part} 0"
            )
    return found


def _names(model: Model) -> list[str]:
    return sorted(model.objectives)


def _unmade_texts(model: Model) -> list[str]:
    """Text views whose embeds are compared, but that no objective makes."""
    made = {"clean"}.union(*(one.views for _, one in model.named_objectives()))
    return [
        f"objective {name} reads the text view {view!r}, which no objective makes; add mlm, which makes masked texts, "
        "or read another view"
        for name, one in model.named_objectives()
        for view in sorted(views(each for each in one.needs if isinstance(each, Embed))["text"] - made)
    ]


def _modalities(model: Model, needs: frozenset[Pass]) -> list[str]:
    """Modalities that nobody reads, unless an objective is meant for one alone."""
    if any(one.one_modality for _, one in model.named_objectives()):
        return []
    read = views(needs)
    return [
        f"no objective of {_names(model)} reads {modality}s; add itc, or itm with a fusion"
        for modality in MODALITIES
        if not read[modality]
    ]


def _fusion(model: Model, config: ModelConfig, needs: frozenset[Pass]) -> list[str]:
    """A fusion that nobody uses, or that cannot be the tower that it would have to be."""
    if model.fusion is None:
        return []
    encoded = {one.modality for one in needs if isinstance(one, Encode | Embed)}
    towers = [modality for modality in MODALITIES if modality in encoded and model.is_tower(modality)]
    found = []
    if "image" in towers and isinstance(model.fusion, DualStream):
        found.append(
            "model.vision.depth 0 makes the fusion the image tower, which dual_stream cannot be; use "
            "model.fusion.kind single_stream, or a vision encoder with blocks"
        )
    if not towers and not any(isinstance(one, Fuse) for one in needs) and not config.keep_unread:
        found.append(
            f"no objective of {_names(model)} uses model.fusion.kind {config.fusion.kind}; "
            "add itm or mlm, or set model.fusion.kind none"
        )
    return found


def _untied(model: Model, needs: frozenset[Pass]) -> list[str]:
    """A decoder that reads places of tokens which come straight from an encoder, and so have none."""
    read = {one.memory.modality for one in needs if isinstance(one, Decode) and isinstance(one.memory, Encode)}
    if getattr(model.decoder, "untied", None) is None or all(model.is_tower(modality) for modality in read):
        return []
    return [
        "model.decoder.untied reads the places of what the fusion has read, but an objective lets the decoder read the "
        "image encoder alone; set that objective's memory to fused, or model.decoder.untied none"
    ]


def _fused_passes(model: Model, config: ModelConfig) -> list[str]:
    """Fused passes on pairs that no objective gives, or on texts whose future the fusion would leak."""
    pairing = [one for _, one in model.named_objectives() if type(one).rows is not Objective.rows]
    given = {one.rows for objective in pairing for one in objective.needs if isinstance(one, Fuse)}
    found = []
    for name, objective in model.named_objectives():
        for one in objective.needs:
            if not isinstance(one, Fuse):
                continue
            if one.rows not in {None, *given}:
                found.append(f"objective {name} reads the pairs of objective {one.rows}, which is missing; add it")
            view = objective.views.get(one.text or "")
            if view is not None and model.fusion is not None and view.attention not in model.fusion.attention_kinds:
                found.append(
                    f"objective {name} reads {view.attention} text, which fusion {config.fusion.kind} would "
                    f"leak; it can read {model.fusion.attention_kinds}: use attention cross or single_stream"
                )
    return found
