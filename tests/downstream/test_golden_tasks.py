"""Recorded outputs of published downstream models come out of the tasks that a user runs, with no further training."""

from __future__ import annotations

import re
from pathlib import Path

import golden_tasks
import pytest
import torch
from safetensors.torch import save_file
from standins import stand_in, verdict
from torch.nn import functional as F

from scripts.goldens.base import Case


@pytest.mark.parametrize("name", golden_tasks.names())
def test_case(name: str, tmp_path: Path) -> None:
    assert golden_tasks.check(Case(golden_tasks.FOLDER / name), tmp_path)


def test_two_equal_images_are_one(tmp_path: Path) -> None:
    """BLIP's NLVR2 from a case of one image: equal cross-attentions over the same image twice give its states."""
    one = Case(golden_tasks.FOLDER / "blip_itm")
    weights = {}
    for key, tensor in torch.load(one.weights, weights_only=True)["model"].items():
        if key.startswith(("itm_head", "vision_proj", "text_proj")):
            continue
        for number in ("0", "1"):
            twin = re.sub(r"(crossattention\.(self|output\.dense))\.", rf"\g<1>{number}.", key)
            weights[twin] = tensor
    words = weights["text_encoder.embeddings.word_embeddings.weight"].clone()
    words[131] = words[101]  # NLVR2 begins its texts with [ENC], matching with [CLS]
    weights["text_encoder.embeddings.word_embeddings.weight"] = words
    generator = torch.Generator().manual_seed(0)
    for key, shape in (("0.weight", (24, 24)), ("0.bias", (24,)), ("2.weight", (2, 24)), ("2.bias", (2,))):
        weights[f"cls_head.{key}"] = torch.randn(shape, generator=generator)
    hidden, image, targets = one.outputs["fused"], one.inputs["image"], torch.tensor([0, 1, 1])
    inner = F.linear(hidden[:, 0], weights["cls_head.0.weight"], weights["cls_head.0.bias"]).relu()
    prediction = F.linear(inner, weights["cls_head.2.weight"], weights["cls_head.2.bias"])
    given = {**one.inputs, "image": torch.cat([image, image]), "targets": targets}
    outputs = {"prediction": prediction, "hidden": hidden}
    case = stand_in(
        tmp_path / "blip_nlvr", weights, given, lambda _: outputs, one.config, file="model.pth", key="model"
    )
    loss = F.cross_entropy(prediction, targets)
    save_file({**outputs, "loss": loss}, tmp_path / "blip_nlvr" / "outputs.safetensors")
    found = verdict(Case(case.folder))
    assert found.passed, found.line()
