"""`bridge`: what it promises as a fusion, the loss with the fused pair, and that nothing waits for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import LENGTH, PIXELS, SIZES, VOCABULARY, tiny_batch, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from encoders import PatchConfig, TextConfig
from encoders.types import Images
from objectives import (
    AnswerConfig,
    FusedItcConfig,
    ItmConfig,
    MlmConfig,
    ObjectiveConfig,
    RankConfig,
    WraConfig,
)
from objectives.base import Draw, Embed, Fuse
from vlp.embed import EmbedConfig
from vlp.fusion import FusionConfig
from vlp.fusion.bridge import BridgeConfig, LinkKind
from vlp.fusion.single import SingleStreamConfig
from vlp.model import Model, ModelConfig, build_model

STACK = {"width": 32, "heads": 4}


def model_of(fusion: FusionConfig, objectives: dict[str, ObjectiveConfig], **vision: Any) -> Model:
    sizes = {"width": 32, "heads": 4, "depth": 3, "image_size": PIXELS, "patch_size": 4}
    layers = 0 if vision.get("depth") == 0 else 3
    config = ModelConfig(
        vision=PatchConfig(**{"model": "vit_tiny_patch16_224", **sizes, **vision}),
        text=TextConfig(**SIZES | {"layers": layers}, vocabulary_size=VOCABULARY, max_length=LENGTH),
        fusion=fusion,
        embed=EmbedConfig(width=16),
    )
    return build_model(config, objectives)


def bridge(**more: Any) -> BridgeConfig:
    return BridgeConfig(**STACK | {"layers": 2, **more})


PRETRAINING: dict[str, ObjectiveConfig] = {
    "fused_itc": FusedItcConfig(),
    "itm": ItmConfig(scheme="replace_image", negatives="random"),
    "mlm": MlmConfig(),
}


@pytest.mark.parametrize("link", ["add", "scaled_add", "interpolate"])
@pytest.mark.parametrize("one_projection", [True, False])
def test_every_weight_is_trained(link: LinkKind, one_projection: bool) -> None:
    model = model_of(bridge(link=link, one_projection=one_projection), PRETRAINING)
    loss, _ = model(tiny_batch(4), Draw(0))
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_words_alone_need_no_last_image_block() -> None:
    model = model_of(bridge(), {"mlm": MlmConfig()})
    assert len(model.fusion.image_blocks) == 1 and model.fusion.pooler is None
    loss, _ = model(tiny_batch(4), Draw(0))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_padding_and_order_change_nothing() -> None:
    model, batch = model_of(bridge(), {}).eval(), tiny_batch(4, ("clean",))
    found = model.run([Fuse()], batch)[Fuse()]
    text = batch.texts["clean"]
    changed = replace(text, ids=torch.where(text.keep, text.ids, 7))
    other = model.run([Fuse()], replace(batch, texts={"clean": changed}))[Fuse()]
    torch.testing.assert_close(other.pooled, found.pooled)
    index = torch.tensor([2, 0, 3, 1])
    moved = replace(batch, images={"clean": Images(batch.images["clean"].pixels[index])}, image_of_text=index.argsort())
    torch.testing.assert_close(model.run([Fuse()], moved)[Fuse()].pooled, found.pooled)


def test_layers_are_those_of_the_streams() -> None:
    model, batch = model_of(bridge(), {}).eval(), tiny_batch(4, ("clean",))
    found = model.run([Fuse()], batch, layers=True)[Fuse()]
    assert len(found.text.layers) == len(found.image.layers) == 3
    assert torch.equal(found.text.layers[-1], found.text.states)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="norms after each branch"):
        model_of(bridge(norm="pre"), {})
    with pytest.raises(ValueError, match="reads the last 4 layers of each tower, but the image tower has 3"):
        model_of(bridge(layers=4), {}).run([Fuse()], tiny_batch(2))
    with pytest.raises(ValueError, match="needs both image and text"):
        model_of(bridge(), {}).run([Fuse(text=None)], tiny_batch(2))
    with pytest.raises(ValueError, match="without leaking its future"):
        model_of(bridge(), {}).run([Fuse(text="causal")], tiny_batch(2))
    with pytest.raises(ValueError, match="fused_itc needs a fusion"):
        tiny_model("none", {"fused_itc": FusedItcConfig()})


def test_loss_with_the_fused_pair() -> None:
    """Three cross-entropies, one direction each; a text's own pairs are those with one of its images."""
    model = model_of(bridge(), {"fused_itc": FusedItcConfig(positives="id")}).eval()
    batch = tiny_batch(4, ids=[5, 6, 5, 7])
    out = model.losses(batch, Draw(0))["fused_itc"]
    results = model.run([Embed("image"), Embed("text"), Fuse()], batch)
    image, text = results[Embed("image")], results[Embed("text")]
    pair = F.normalize(model.objectives["fused_itc"].head(results[Fuse()].pooled), dim=-1)
    scale = model.space().logit_scale.exp()
    true = (batch.image_id[:, None] == batch.image_id[None]).float()
    target = true / true.sum(1, keepdim=True)
    losses = [F.cross_entropy(scale * a @ b.T, target) for a, b in ((text, image), (text, pair), (image, pair))]
    torch.testing.assert_close(out.loss, sum(losses) / 3)


VILT = SingleStreamConfig(**STACK, layers=2, norm="pre")
BARE = {"depth": 0, "position_size": PIXELS}
PARTS: dict[str, tuple[FusionConfig, dict[str, ObjectiveConfig], dict[str, Any]]] = {
    "bridge": (bridge(), PRETRAINING, {}),
    "vilt": (VILT, {"itm": ItmConfig(scheme="replace_image"), "wra": WraConfig(), "mlm": MlmConfig()}, BARE),
    "rank": (VILT, {"rank": RankConfig(negatives=2)}, BARE),
    "each": (
        VILT.model_copy(update={"images": "each"}),
        {"relate": AnswerConfig(answers=("no", "yes"), loss="ce")},
        BARE,
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_nothing_waits_for_the_device(name: str) -> None:
    fusion, objectives, vision = PARTS[name]
    model, batch = model_of(fusion, objectives, **vision).eval(), tiny_batch(4)
    keep = torch.ones(4, (PIXELS // 4) ** 2, dtype=torch.bool)
    if vision:
        batch = replace(batch, images={"clean": Images(batch.images["clean"].pixels, keep)})
    if name == "each":
        index, scores = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]), torch.eye(2)[[0, 1, 1, 0]]
        batch = replace(batch, image_of_text=index, targets={"answer_scores": scores})
    wanted, _ = model(batch, Draw(0))
    assert wanted.isfinite()
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(model)
        loss, _ = model(batch.to("cuda:0"), Draw(0))
    assert loss.device == torch.device("cuda:0")


def move(model: Model) -> None:
    """To a device that is not there; the weights' values are lost."""
    for module in model.modules():
        for key, one in list(module._parameters.items()):
            if one is not None:
                module._parameters[key] = torch.nn.Parameter(torch.empty(one.shape, device="cuda:0"))
        for key, one in list(module._buffers.items()):
            if one is not None:
                module._buffers[key] = torch.empty(one.shape, dtype=one.dtype, device="cuda:0")
