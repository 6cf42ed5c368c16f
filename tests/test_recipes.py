"""Every pretraining recipe: it restates nothing, and its step runs on every kind of device."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from objectives.base import Draw
from vlp.config import configs_folder, list_recipes, load, restated
from vlp.fit import untrained
from vlp.model import Model, build_model
from vlp.run import RunConfig, settle
from vlp.show import meta_model, synthetic_batches
from vlp.shrink import shrink
from vlp.train.optim import build_optimizer, check_parts, freeze_parts

RECIPES = list_recipes("pretrain")


@cache
def resolved(recipe: str) -> RunConfig:
    return settle(load(RunConfig, recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_line_restates_what_it_would_have_had(recipe):
    assert restated(RunConfig, recipe) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_head_comment_says_what_it_is(recipe):
    head = (configs_folder() / f"{recipe}.yaml").read_text().split("\n\n")[0].partition("\nmodel:")[0]
    assert head.startswith("# ")
    assert (
        f"vlp pretrain {recipe.removeprefix('pretrain/')}" in head or f"vlp {recipe.removeprefix('pretrain/')}" in head
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_learning_rates_name_parts_of_the_model(recipe):
    run = resolved(recipe)
    check_parts(run.train.optim.lr_scale, [name for name, _ in meta_model(run).named_parameters()])


@pytest.mark.parametrize("recipe", RECIPES)
def test_step_on_the_meta_device(recipe):
    """Forward and backward: a tensor made on the wrong device, or a wait for the device, raises here."""
    run = resolved(recipe)
    model = meta_model(run).train()
    freeze_parts(model, run.train.optim)
    trained = set()
    for batch in synthetic_batches(model, run.data, 8, run.data.max_length):
        loss, outputs = model(batch, Draw(0))
        loss.backward()
        assert loss.is_meta
        trained |= set(outputs)
    assert trained == set(run.objectives)
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def move_empty(model: torch.nn.Module, device: str) -> None:
    """As ``to_empty``, which fails on fake tensors where modules are shared; ties stay."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.device != torch.device(device):
                new = torch.empty_like(tensor, device=device)
                new = torch.nn.Parameter(new) if isinstance(tensor, torch.nn.Parameter) else new
                setattr(module, name, moved.setdefault(id(tensor), new))


@pytest.mark.parametrize("recipe", RECIPES)
def test_step_on_a_cuda_device_that_is_not_there(recipe):
    """Forward only: backward would need a real context."""
    run = resolved(recipe)
    model = meta_model(run).train()
    batches = synthetic_batches(model, run.data, 8, run.data.max_length, device="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_empty(model, "cuda:0")
        losses = [model(batch.to("cuda:0"), Draw(0))[0] for batch in batches]
    assert {loss.device for loss in losses} == {torch.device("cuda:0")}


def test_fake_device_finds_what_it_is_there_for():
    """The mistakes that the test above must not let pass: a tensor left on the host, and a wait for the device."""
    outside = torch.ones(4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(4, device="cuda:0")
        with pytest.raises(RuntimeError, match="device"):
            there + outside
        with pytest.raises(DataDependentOutputException):
            there.sum().item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_when_shrunk(recipe):
    run = shrink(resolved(recipe))
    model: Model = build_model(run.model, run.objectives, vocabulary_size=64, pretrained=False).train()
    freeze_parts(model, run.train.optim)  # LiT's towers
    assert not untrained(model)
    optimizer = build_optimizer(model, run.train.optim)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        optimizer.zero_grad()
        for batch in synthetic_batches(model, run.data, 6, 12, device="cpu", seen=6 * step):
            loss, _ = model(batch, Draw(0, step))
            loss.backward()
        wrong = [
            n
            for n, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
        ]
        assert wrong == []
        optimizer.step()
    same = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert same == []
