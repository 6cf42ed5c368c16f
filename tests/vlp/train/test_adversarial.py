"""Noise that raises the loss: its size and direction, the gradient of a step, and what it refuses."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers import SIZES, VOCABULARY, split_batch, tiny_batch, tiny_model
from torch import Tensor

from encoders import RegionConfig, TextConfig
from encoders.types import Batch
from objectives import ItmConfig, MlmConfig, MrmConfig
from objectives.base import Draw
from objectives.mrm import RegionTargetConfig
from vlp.fusion.single import SingleStreamConfig
from vlp.model import Model, ModelConfig, build_model
from vlp.show import synthetic_batch
from vlp.train.adversarial import AdversarialConfig, Adversary, _Noise, divergence
from vlp.train.optim import OptimConfig
from vlp.train.step import TrainStep

TARGETS = {
    "classes": RegionTargetConfig(outputs=7),
    "features": RegionTargetConfig(outputs=12, losses=("mse",)),
}


def region_model() -> tuple[Model, Batch]:
    config = ModelConfig(
        vision=RegionConfig(features=12, width=32, number=9, segments="text"),
        text=TextConfig(**SIZES | {"layers": 0}, vocabulary_size=VOCABULARY, max_length=16),
        fusion=SingleStreamConfig(**SIZES, modality_embedding=False),
    )
    names = {"mlm": MlmConfig(), "mrm": MrmConfig(targets=TARGETS), "itm": ItmConfig(scheme="replace_image")}
    model = build_model(config, names)
    return model, synthetic_batch(model, 4, 12, device="cpu")


def gradients(adversarial: AdversarialConfig | None, sizes: tuple[int, ...] = (8,)) -> dict[str, Tensor]:
    model = tiny_model("single_stream", ("mlm",)).double().train()
    config = OptimConfig(lr=1e-3, clip_norm=None)
    step = TrainStep(model, config, seed=3, total=8, adversarial=adversarial)
    step(split_batch(tiny_batch(8), sizes))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("sizes", [(8,), (5, 3)])
def test_noise_of_no_size_changes_nothing(steps: int, sizes: tuple[int, ...]) -> None:
    found, wanted = gradients(AdversarialConfig(modality="text", steps=steps, lr=1e-12), sizes), gradients(None)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_noise_and_divergence_change_the_gradient() -> None:
    plain, noisy, near = (gradients(AdversarialConfig(modality="text", lr=0.5, kl=kl)) for kl in (0.0, 0.0, 10.0))
    clean = gradients(None)
    name = "text.embeddings.word.weight"
    assert torch.equal(plain[name], noisy[name]) and not torch.allclose(plain[name], clean[name], rtol=1e-2)
    assert not torch.allclose(near[name], noisy[name], rtol=1e-2)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_the_loss_rises_from_run_to_run(modality: str) -> None:
    model, batch = region_model()
    losses: list[float] = []

    def forward():
        loss, outputs = model(batch, Draw(0))
        losses.append(loss.item())
        return loss, outputs

    config = AdversarialConfig(modality=modality, steps=4, lr=0.1, kl=0.0)  # type: ignore[arg-type]
    first = Adversary(model, config, 0).backward(forward, list(first_names(model)), 0, 1.0, lambda last: nullcontext())
    assert losses == sorted(losses) and losses[-1] > losses[0] + 1e-4
    weighted = sum(model.weights[name] * out.loss.item() for name, out in first.items())
    assert weighted == pytest.approx(losses[0], rel=1e-5), "the outputs are those without noise"
    assert not model.text.embeddings.word._forward_hooks and not model.vision._forward_pre_hooks


def first_names(model: Model) -> list[str]:
    return list(model.objectives)


def test_each_sample_moves_by_the_rate() -> None:
    noise, clean = _Noise(), torch.randn(5, 3, 4)
    weight = torch.randn(5, 3, 4)
    assert torch.equal(noise.add(clean), clean)
    (noise.deltas[0] * weight).sum().backward()
    noise.ascend(0.25)
    moved = noise.add(clean) - clean
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((5,), 0.25))
    direction = torch.nn.functional.cosine_similarity(moved.flatten(1), weight.flatten(1))
    torch.testing.assert_close(direction, torch.ones(5))


def test_divergence_is_that_of_torch_both_ways() -> None:
    left, right = torch.randn(6, 5), torch.randn(6, 5)
    one = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (left, right)))
    two = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (right, left)))
    torch.testing.assert_close(divergence(left, right), (one + two).mean())
    assert divergence(left, left).item() == 0


def test_the_modality_is_drawn_for_each_step_alone() -> None:
    model, batch = region_model()
    seen: list[str] = []
    adversary = Adversary(model, AdversarialConfig(steps=1), 0)
    original = adversary._noisy
    adversary._noisy = lambda modality, noise: (seen.append(modality), original(modality, noise))[1]  # type: ignore[assignment]
    for step in [*range(0, 160, 8), *range(0, 160, 8)]:
        adversary.backward(lambda: model(batch, Draw(0)), ["mlm"], step, 1.0, lambda last: nullcontext())
    assert seen[:20] == seen[20:] and set(seen) == {"text", "image"}


def test_pixels_get_no_noise() -> None:
    with pytest.raises(ValueError, match=r"model\.vision\.kind is patch; use modality text"):
        Adversary(tiny_model("single_stream", ("mlm",)), AdversarialConfig(), 0)
