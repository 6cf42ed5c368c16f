"""BEiT-3's cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from encoders.types import Batch, Images, Texts, Vocabulary
from objectives.base import Embed, Encode, Fuse
from objectives.seq2seq_mlm import VIEW
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.generate import GenerationConfig
from vlp.generate_masked import generate_masked
from vlp.loaded import Loaded

CAPTION = Fuse(text=VIEW)
WORDS = Vocabulary(size=120, pad=1, cls=0, sep=2, mask=118, bos=0, eos=2)
WRITE = GenerationConfig(method="beam", beams=3, length_penalty=0.6, score_length="whole", max_length=7)
"""The authors' limit of 8 counts the end that they put behind."""


def _texts(case: Case, name: str) -> Texts:
    return Texts(case.inputs[name], case.inputs["padding_mask"] == 0)


def _fused_layer(number: int) -> Output:
    def read(ran: Ran) -> Tensor:
        found = ran[Fuse()]
        return torch.cat([found.image.layers[number + 1], found.text.layers[number + 1]], 1)

    return read


def _beside_image(case: Case) -> Tensor:
    """Which tokens of image and text are real."""
    keep = case.inputs["padding_mask"] == 0
    patches = case.outputs["layer.0"].shape[1] - keep.shape[1]
    return torch.cat([keep.new_ones(len(keep), patches), keep], 1)


def _vqa(case: Case) -> Mapping[str, Output]:
    return {
        "logits": lambda ran: ran.head("answer", ran[Fuse()].pooled),
        **{f"layer.{n}": _fused_layer(n) for n in range(case.config["encoder_layers"])},
        "loss": lambda ran: ran.loss("answer"),
    }


def _pair_batch(case: Case, loaded: Loaded) -> Batch:
    texts = _texts(case, "text")
    rows = torch.arange(len(texts.ids))
    return Batch(
        images={"clean": Images(torch.cat([case.inputs["image_a"], case.inputs["image_b"]]))},
        texts={"clean": texts},
        image_of_text=torch.stack([rows, rows + len(rows)], 1),
        targets={"answer_scores": torch.eye(2)[case.inputs["labels"]]},
    )


def _caption_batch(case: Case, loaded: Loaded) -> Batch:
    masked = case.inputs["language_masked_pos"].bool()
    labels = case.inputs["text_ids"].masked_fill(~masked, -100)
    text = replace(_texts(case, "masked_ids"), attention="causal", labels=labels)
    return Batch(images={"clean": Images(case.inputs["image"])}, texts={VIEW: text})


def _masked_logits(ran: Ran) -> Tensor:
    masked = ran.case.inputs["language_masked_pos"].bool()
    return ran.head("seq2seq_mlm", ran[CAPTION].text.states[masked])


def _late_loss(ran: Ran) -> Tensor:
    """The loss when the worst words are left out already."""
    objective = ran.model.objectives["seq2seq_mlm"]
    return objective(ran.results, replace(ran.batch, seen=10**9), None).loss


def _written(ran: Ran) -> Tensor:
    """The authors keep the mask that stands for the word to come before the end, and the end."""
    found = generate_masked(ran.model, ran.batch.images["clean"], WORDS, WRITE).ids.tolist()
    rows = [row[: row.index(WORDS.eos) if WORDS.eos in row[1:] else len(row) - 1] for row in found]
    whole = [[*row, WORDS.mask, WORDS.eos] for row in rows]
    return torch.tensor([row + [WORDS.pad] * (WRITE.max_length + 1 - len(row)) for row in whole])


ADAPTERS: dict[str, Adapter] = {
    "beit3_vqa": Adapter(
        lambda case, loaded: Batch(
            images={"clean": Images(case.inputs["image"])},
            texts={"clean": _texts(case, "question")},
            targets={"answer_scores": case.inputs["labels"]},
        ),
        _vqa,
        passes=lambda case: (Fuse(),),
        keep=lambda case: {name: _beside_image(case) for name in case.outputs if name.startswith("layer.")},
    ),
    "beit3_retrieval": Adapter(
        lambda case, loaded: Batch(
            images={"clean": Images(case.inputs["image"])}, texts={"clean": _texts(case, "text")}
        ),
        lambda case: {
            "vision_cls": lambda ran: ran[Embed("image")],
            "language_cls": lambda ran: ran[Embed("text")],
            "loss": lambda ran: ran.loss("itc"),
        },
        passes=lambda case: (Embed("image"), Embed("text")),
    ),
    "beit3_nlvr2": Adapter(
        _pair_batch,
        lambda case: {
            "logits": lambda ran: ran.head("relate", ran[Fuse()].pooled),
            "loss": lambda ran: ran.loss("relate"),
        },
        passes=lambda case: (Fuse(),),
    ),
    "beit3_imagecls": Adapter(
        lambda case, loaded: Batch(
            images={"clean": Images(case.inputs["image"])}, targets={"class": case.inputs["labels"]}
        ),
        lambda case: {
            "logits": lambda ran: ran.model.objectives["classify"].logits(ran[Encode("image")]),
            "loss": lambda ran: ran.loss("classify"),
        },
        passes=lambda case: (Encode("image"),),
    ),
    "beit3_captioning": Adapter(
        _caption_batch,
        lambda case: {
            "logits_masked": _masked_logits,
            "logits_all": lambda ran: ran.head("seq2seq_mlm", ran[CAPTION].text.states),
            "aux_loss_drop_worst": _late_loss,
            "beam3_ids": _written,
            "loss": lambda ran: ran.loss("seq2seq_mlm"),
        },
        passes=lambda case: (CAPTION,),
        keep=lambda case: {"logits_all": case.inputs["padding_mask"] == 0},
    ),
}
"""Which adapter reads which cases."""
