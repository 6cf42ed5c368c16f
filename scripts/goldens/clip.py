"""The cases of CLIP's kind: open_clip's, transformers' and torchmultimodal's towers that meet in a contrastive loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from encoders.types import Batch, Images, Texts
from objectives.base import Embed, Encode
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.data.transforms import pad_images
from vlp.embed import EmbedSpace
from vlp.loaded import Loaded

IMAGE, TEXT = Encode("image"), Encode("text")
IMAGE_EMBED, TEXT_EMBED = Embed("image"), Embed("text")
MASKED, MASKED_EMBED = Encode("text", "masked"), Embed("text", "masked")


def batch(case: Case, loaded: Loaded) -> Batch:
    """Pixels and ids; all is attended where the reference gets no mask."""
    given = case.inputs
    ids = given["input_ids"] if "input_ids" in given else given["text"]
    every = torch.ones_like(ids, dtype=torch.bool)
    keep = given["attention_mask"].bool() if "attention_mask" in given else every
    texts = {"clean": Texts(ids, keep)}
    if any(name.startswith("masked_") for name in case.outputs):
        texts = {"clean": Texts(ids, every), "masked": Texts(ids, keep)}
    return Batch({"clean": _images(given)}, texts)


def _images(given: Mapping[str, Tensor]) -> Images:
    if "spatial_shapes" in given:
        return pad_images(naflex_images(given), naflex_side(given))
    return Images(given["pixel_values"] if "pixel_values" in given else given["image"])


def naflex_side(given: Mapping[str, Tensor]) -> int:
    """Side of a patch whose pixels lie behind each other."""
    return math.isqrt(given["pixel_values"].shape[2] // 3)


def naflex_images(given: Mapping[str, Tensor]) -> list[Tensor]:
    """Each image [3, h, w] of its patches, which were cut into rows, columns and channels."""
    side, found = naflex_side(given), []
    for patches, (rows, columns) in zip(given["pixel_values"], given["spatial_shapes"].tolist(), strict=True):
        cells = patches[: rows * columns].reshape(rows, columns, side, side, 3)
        found.append(cells.permute(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side))
    return found


def naflex_order(given: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """States of images padded to one grid [B, P, D] -> behind each other as the reference has them."""
    shapes = given["spatial_shapes"].tolist()
    columns = max(width for _, width in shapes)
    found = states.new_zeros(len(states), given["pixel_values"].shape[1], states.shape[2])
    for row, (height, width) in enumerate(shapes):
        at = [y * columns + x for y in range(height) for x in range(width)]
        found[row, : len(at)] = states[row, at]
    return found


def keep(case: Case) -> dict[str, Tensor]:
    """Real tokens, and real patches of images of unlike sizes."""
    found = {}
    if "attention_mask" in case.inputs:
        real = case.inputs["attention_mask"].bool()
        masked = any(name.startswith("masked_") for name in case.outputs)
        names = [name for name in case.outputs if name.startswith("masked_text_last" if masked else "text_")]
        found = {name: real for name in names if case.outputs[name].dim() == 3}
    if "pixel_attention_mask" in case.inputs:
        real = case.inputs["pixel_attention_mask"].bool()
        found |= {name: real for name, one in case.outputs.items() if name.startswith("vision_") and one.dim() == 3}
    return found


def passes(case: Case) -> list[Encode | Embed]:
    """Towers and embeds, and those of the masked view where it was recorded."""
    masked = any(name.startswith("masked_") for name in case.outputs)
    return [IMAGE, TEXT, IMAGE_EMBED, TEXT_EMBED, *((MASKED, MASKED_EMBED) if masked else ())]


def space(ran: Ran) -> EmbedSpace:
    """The model's contrastive space."""
    found = ran.model.space()
    assert found is not None
    return found


def logits(ran: Ran, text: Embed = TEXT_EMBED) -> Tensor:
    """Logits of all pairs, images in rows."""
    return space(ran).logits(ran[IMAGE_EMBED], ran[text])


def transformers_outputs(case: Case) -> dict[str, Output]:
    """Of transformers' models."""
    siglip = "head.probe" in " ".join(case.gradients)
    found: dict[str, Output] = {
        "loss": lambda ran: ran.loss(*ran.losses),
        "logits_per_image": logits,
        "logits_per_text": lambda ran: logits(ran).T,
        "image_embeds": lambda ran: ran[IMAGE_EMBED],
        "text_embeds": lambda ran: ran[TEXT_EMBED],
        "text_last_hidden_state": lambda ran: ran[TEXT].states,
        "text_pooler_output": lambda ran: space(ran).project("text", ran[TEXT].pooled) if siglip else ran[TEXT].pooled,
        "vision_pooler_output": lambda ran: ran[IMAGE].pooled,
        "vision_last_hidden_state": lambda ran: vision_states(ran, case.outputs["vision_last_hidden_state"]),
        "masked_logits_per_text": lambda ran: logits(ran, MASKED_EMBED).T,
        "masked_text_embeds": lambda ran: ran[MASKED_EMBED],
        "masked_text_last_hidden_state": lambda ran: ran[MASKED].states,
    }
    for name in case.outputs:
        kind, _, number = name.partition("_hidden_states.")
        if number and kind in ("text", "vision"):
            found[name] = lambda ran, kind=kind, n=int(number): ran[TEXT if kind == "text" else IMAGE].layers[n]
    if "spatial_shapes" in case.inputs:
        for name in [name for name, one in case.outputs.items() if name.startswith("vision_") and one.dim() == 3]:
            found[name] = lambda ran, read=found[name]: naflex_order(case.inputs, read(ran))
    return found


def vision_states(ran: Ran, recorded: Tensor) -> Tensor:
    """Last states: of CLIP before the final norm, of SigLIP after it; of a CNN as its map [B, D, h, w]."""
    tokens = ran[IMAGE]
    if recorded.dim() == 4:
        return tokens.states.transpose(1, 2).reshape(recorded.shape)
    return tokens.layers[-1] if ran.model.config.embed.logit_bias is None else tokens.states


def open_clip_outputs(case: Case) -> dict[str, Output]:
    """Of open_clip's and torchmultimodal's models; ``hidden.`` names a module there."""
    found: dict[str, Output] = {
        "image_features": lambda ran: ran[IMAGE_EMBED],
        "text_features": lambda ran: ran[TEXT_EMBED],
        "embeddings_a": lambda ran: ran[IMAGE_EMBED],
        "embeddings_b": lambda ran: ran[TEXT_EMBED],
        "logit_scale": lambda ran: next(iter(ran.losses.values())).metrics["scale"],
        "logit_bias": lambda ran: next(iter(ran.losses.values())).metrics["bias"],
        "logits_per_image": logits,
        **dict.fromkeys(("loss", "loss_contrastive", "loss_siglip"), lambda ran: ran.loss(*ran.losses)),
        "hidden.visual.ln_post": lambda ran: ran[IMAGE].states,
    }
    for name in case.outputs:
        if name.endswith(".ln_final"):
            found[name] = lambda ran: ran[TEXT].states
        elif "blocks." in name:
            of, number = IMAGE if name.startswith("hidden.visual.") else TEXT, int(name.rpartition(".")[2])
            found[name] = lambda ran, of=of, n=number: ran[of].layers[n + 1]
    return found


def trunk_heads(case: Case) -> dict[str, object]:
    """Heads of the tower that the case registered in timm under a name of its own; its notes tell them."""
    known = case.config.get("model_cfg", {}).get("vision_cfg", {}).get("timm_model_name") != "vit_oracle_siglip"
    return {} if known else {"model": {"vision": {"heads": 4}}}


_COMMON = {"batch": batch, "passes": passes, "keep": keep}
ADAPTERS = {
    r"hf_(clip|siglip|altclip|chinese_clip|align).*": Adapter(outputs=transformers_outputs, **_COMMON),  # type: ignore[arg-type]
    r"openclip_(vit|siglip).*|tmm_clip": Adapter(outputs=open_clip_outputs, settings=trunk_heads, **_COMMON),  # type: ignore[arg-type]
}
