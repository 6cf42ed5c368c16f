"""CoCa's cases, open_clip's and torchmultimodal's."""

from __future__ import annotations

import torch
from torch import Tensor

from encoders.types import Batch, Images, Texts, Vocabulary
from objectives.base import Decode, Embed, Encode
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.generate import GenerationConfig, generate_text
from vlp.loaded import Loaded

IMAGE, TEXT = Encode("image"), Encode("text")
IMAGE_EMBED, TEXT_EMBED = Embed("image"), Embed("text")
WRITTEN = Decode(IMAGE, "clean")
PAD = 0


def _ids(case: Case) -> Tensor:
    """Texts; those of torchmultimodal end with a place that its token takes."""
    ids = case.inputs["text"]
    return ids[:, :-1] if case.name.startswith("tmm") else ids


def _batch(case: Case, loaded: Loaded) -> Batch:
    ids = _ids(case)
    keep = case.inputs["mask"].bool()[:, : ids.shape[1]] if "mask" in case.inputs else ids != PAD
    labels = None
    if case.name.startswith("tmm"):  # the last word is predicted, though not read
        following = case.inputs["text"][:, 1:]
        labels = torch.where(following == PAD, -100, following)
    return Batch({"clean": Images(case.inputs["image"])}, {"clean": Texts(ids, keep, labels=labels)})


def _pooled(ran: Ran) -> Tensor:
    """All that the queries found."""
    tokens = ran[IMAGE]
    return torch.cat([tokens.pooled[:, None], tokens.states], 1)


def _logits(ran: Ran) -> Tensor:
    """Scores of all words but the first."""
    return ran.head("lm", ran[WRITTEN].states)[:, :-1]


def _layer(encoder: Encode | Decode, number: int, last: int | None = None) -> Output:
    return lambda ran: ran[encoder].layers[number][:, :last]


def _written(ran: Ran) -> Tensor:
    """Texts with the likeliest next words."""
    ids, recorded = ran.case.inputs["text"], ran.case.outputs["generated_top1"]
    first, last = int(ids[0, 0]), int(ids.max())
    words = Vocabulary(int(last) + 1, PAD, cls=first, sep=last, mask=None, bos=first, eos=last)
    config = GenerationConfig(min_length=5, max_length=recorded.shape[1], force_end=True)
    texts, _ = generate_text(ran.model, ran[IMAGE], words, config)
    found = torch.full_like(recorded, PAD)
    for row, text in zip(found, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return found


_OPEN_CLIP: dict[str, Output] = {
    "image_features": lambda ran: ran[IMAGE_EMBED],
    "text_features": lambda ran: ran[TEXT_EMBED],
    "logits": _logits,
    "labels": lambda ran: ran.batch.texts["clean"].ids[:, 1:],
    "logit_scale": lambda ran: ran.losses["itc"].metrics["scale"],
    "loss": lambda ran: ran.loss("itc", "lm"),
    "loss_contrastive": lambda ran: ran.loss("itc"),
    "loss_caption": lambda ran: ran.loss("lm"),
    "hidden.visual.ln_post": _pooled,
    "hidden.text.ln_final": lambda ran: ran[TEXT].pooled,
    "generated_top1": _written,
    **{f"hidden.visual.transformer.resblocks.{n}": _layer(IMAGE, n + 1) for n in range(4)},
    **{f"hidden.text.transformer.resblocks.{n}": _layer(TEXT, n + 1) for n in range(4)},
    **{f"hidden.text_decoder.resblocks.{n}": _layer(WRITTEN, 2 * n + 1, -1) for n in range(4)},
}


def _tmm(case: Case) -> dict[str, Output]:
    wide = case.outputs["image_pooled"].dim() == 3
    return {
        "image_pooled": lambda ran: ran[IMAGE_EMBED][:, None] if wide else ran[IMAGE_EMBED],
        "text_pooled": lambda ran: ran[TEXT_EMBED],
        "multimodal_embeddings": lambda ran: ran.head("lm", ran[WRITTEN].states),
        "loss_contrastive": lambda ran: ran.loss("itc"),
        "loss_captioning": lambda ran: ran.loss("lm"),
    }


def _keep(case: Case) -> dict[str, Tensor]:
    """Real tokens; what is written is scored up to the end."""
    real = _ids(case) != PAD if "mask" not in case.inputs else case.inputs["mask"].bool()[:, : _ids(case).shape[1]]
    found = {"logits": real[:, 1:], "multimodal_embeddings": real}
    for name in case.outputs:
        if name.startswith("hidden.text.transformer"):
            found[name] = torch.cat([real, torch.ones_like(real[:, :1])], 1)
        elif name.startswith("hidden.text_decoder"):
            found[name] = real[:, :-1]
    return found


ADAPTERS: dict[str, Adapter] = {
    "openclip_coca.*": Adapter(
        _batch, lambda case: _OPEN_CLIP, passes=lambda case: (IMAGE_EMBED, TEXT_EMBED, WRITTEN), keep=_keep
    ),
    "tmm_coca.*": Adapter(
        _batch,
        _tmm,
        passes=lambda case: (IMAGE_EMBED, TEXT_EMBED, WRITTEN),
        keep=_keep,
        objectives=lambda case: None if "loss_contrastive" in case.outputs else (),
    ),
}
