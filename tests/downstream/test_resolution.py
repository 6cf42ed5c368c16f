"""Finetuning at a higher resolution: the position embeddings of the checkpoint are resized to the larger grid."""

from __future__ import annotations

import torch
from helpers import PIXELS, tiny_model

from downstream.transfer import take_weights
from encoders.positions import resize_positions
from objectives import AnswerConfig
from vlp.model import build_model


def test_positions_are_resized_and_all_else_is_taken() -> None:
    source = tiny_model("dual_stream", ("itc", "itm", "mlm"))
    with torch.no_grad():
        source.vision.vit.pos_embed.normal_()
    vision = source.config.vision.model_copy(update={"image_size": 2 * PIXELS})
    config = source.config.model_copy(update={"vision": vision})
    model = build_model(config, {"answer": AnswerConfig(answers=("no", "yes"))}, seed=1, pretrained=False)
    report = take_weights(model, source)
    assert report.resized == ("vision.vit.pos_embed",)
    assert [name for name in report.missing if not name.startswith("objectives.answer.")] == []
    stored, found = source.vision.vit.pos_embed, model.vision.vit.pos_embed
    assert found.shape[1] - 1 == 4 * (stored.shape[1] - 1)
    method = model.vision.config.position_resize
    torch.testing.assert_close(found, resize_positions(stored, model.vision.grid, method=method))
    assert torch.equal(found[:, :1], stored[:, :1]), "the class token's stays"
