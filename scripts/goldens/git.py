"""transformers' GIT."""

from __future__ import annotations

import torch
from torch import Tensor

from encoders.types import Batch, Images, Texts, Vocabulary
from objectives.base import Encode, Fuse
from scripts.goldens.base import Adapter, Case, Output, Ran
from vlp.generate import GenerationConfig, generate_text
from vlp.loaded import Loaded

IMAGE, WRITTEN = Encode("image"), Fuse(text="causal")


def _batch(case: Case, loaded: Loaded) -> Batch:
    """The reference moves its labels by itself."""
    given = case.inputs
    keep = given["attention_mask"].bool()
    labels = torch.cat([given["labels"][:, 1:], torch.full_like(given["labels"][:, :1], -100)], 1)
    texts = {"causal": Texts(given["input_ids"], keep, "causal", labels=labels)}
    return Batch({"clean": Images(given["pixel_values"])}, texts)


def _joint(ran: Ran, number: int | None = None) -> Tensor:
    """States of image and text, after all layers or one."""
    parts = ran[WRITTEN].image, ran[WRITTEN].text
    return torch.cat([part.states if number is None else part.layers[number] for part in parts], 1)


def _prompt(case: Case) -> Tensor:
    """What all written texts begin with: the ids that were given, or the first one of a text."""
    written, given = case.outputs["greedy_ids"], case.inputs["input_ids"]
    length = min(written.shape[1], given.shape[1])
    same = (written[:, :length] == given[:, :length]).all(0).long()
    return written[:, : max(1, int(same.cumprod(0).sum()))]


def _written(ran: Ran) -> Tensor:
    recorded, said = ran.case.outputs["greedy_ids"], ran.case.config
    pad_id, eos = said.get("pad_token_id", 0), said.get("eos_token_id", 102)
    first = int(recorded[0, 0])
    words = Vocabulary(said["vocab_size"], pad_id, cls=first, sep=eos, mask=None, bos=first, eos=eos)
    config = GenerationConfig(max_length=recorded.shape[1])
    texts, _ = generate_text(ran.model, ran[IMAGE], words, config, _prompt(ran.case))
    found = torch.full_like(recorded, pad_id)
    for row, text in zip(found, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return found


def _hidden(number: int) -> Output:
    return lambda ran: _joint(ran, number)


_OUTPUTS: dict[str, Output] = {
    "loss": lambda ran: ran.loss("lm"),
    "logits": lambda ran: ran.head("lm", _joint(ran)),
    "vision_last_hidden_state": lambda ran: ran[IMAGE].states,
    "greedy_ids": _written,
    **{f"hidden_states.{number}": _hidden(number) for number in range(8)},
}


def _keep(case: Case) -> dict[str, Tensor]:
    real = case.inputs["attention_mask"].bool()
    shown = torch.ones(len(real), case.outputs["logits"].shape[1] - real.shape[1], dtype=torch.bool)
    keep = torch.cat([shown, real], 1)
    return {name: keep for name in case.outputs if name == "logits" or name.startswith("hidden_states")}


ADAPTERS: dict[str, Adapter] = {
    "hf_git.*": Adapter(_batch, lambda case: _OUTPUTS, passes=lambda case: (IMAGE, WRITTEN), keep=_keep),
}
