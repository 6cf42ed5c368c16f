import pytest
import torch
from helpers import OBJECTIVES, split_batch, tiny_batch, tiny_model

from objectives import ItcConfig
from vlp.train.optim import OptimConfig
from vlp.train.step import NonFiniteError, TrainStep, count_samples, largest_norms, layer_of


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(sizes, steps=4, **config):
    model = tiny_model("dual_stream", ("itc", "mlm")).double()
    step = TrainStep(model, OptimConfig(lr=1e-3, warmup=8, **config), seed=3, total=8 * steps)
    reports = [step(split_batch(tiny_batch(8, first=8 * i, seen=8 * i), sizes)) for i in range(steps)]
    return step, reports


def test_one_batch_and_two_halves_train_the_same_weights():
    whole, _ = train((8,))
    halves, _ = train((4, 4))
    start = tiny_model("dual_stream", ("itc", "mlm")).double()
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(halves.model.state_dict()[name], value, rtol=1e-7, atol=1e-9)
    assert not torch.equal(whole.model.space().text.weight, start.space().text.weight)


def test_report():
    _, reports = train((5, 3))
    assert [(r.started, r.seen) for r in reports] == [(0, 8), (8, 16), (16, 24), (24, 32)]
    # Warmup over the first step, its rate taken at the middle.
    assert reports[0].lr == pytest.approx(0.5e-3)
    assert reports[-1].lr < reports[1].lr
    names = {"loss", "itc/loss", "itc/accuracy", "itc/scale", "mlm/loss", "mlm/accuracy", "grad_norm", "scale"}
    assert reports[0].scalars.keys() == names
    scalars = {name: value.item() for name, value in reports[0].scalars.items()}
    assert scalars["loss"] == pytest.approx(scalars["itc/loss"] + scalars["mlm/loss"])
    assert not any(value.requires_grad for value in reports[0].scalars.values())


def test_gradient_is_clipped_to_the_norm():
    step, reports = train((8,), steps=1, clip_norm=0.01)
    norm = torch.nn.utils.get_total_norm([p.grad for p in step.model.parameters()])
    assert norm.item() == pytest.approx(0.01, rel=1e-3) and reports[0].scalars["grad_norm"] > 0.1


def test_only_named_objectives():
    model = tiny_model("dual_stream", ("itc", "itm", "mlm"))
    report = TrainStep(model, OptimConfig(), seed=0, total=8)([tiny_batch(4)], names=["mlm"])
    assert {name.split("/")[0] for name in report.scalars if "/" in name} == {"mlm"}


def test_scale_never_leaves_its_bounds():
    objectives = {"itc": ItcConfig(min_scale=1.0, max_scale=15.0)}
    step = TrainStep(tiny_model("none", objectives), OptimConfig(lr=10.0, schedule="constant"), seed=0, total=80)
    for i in range(3):
        report = step(split_batch(tiny_batch(8, seen=8 * i), (4, 4)))
        assert 1 - 1e-4 <= report.scalars["scale"].item() <= 15 + 1e-4
        torch.testing.assert_close(step.model.space().logit_scale.exp()[0], report.scalars["scale"])


@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_non_finite_loss_stops_before_the_update(sizes):
    model = tiny_model("dual_stream", ("itc", "itm", "mlm"))
    step = TrainStep(model, OptimConfig(ema=0.9), seed=0, total=80)
    step([tiny_batch(4)])
    with torch.no_grad():
        model.fusion.blocks[1].feed.up.weight[0, 0] = float("nan")
    before, optimizer = (
        weights(model),
        {k: v["exp_avg"].clone() for k, v in step.optimizer.state_dict()["state"].items()},
    )
    average = weights(step.average)
    with pytest.raises(NonFiniteError) as caught:
        step(split_batch(tiny_batch(4, seen=4), sizes))
    message = str(caught.value)
    assert "\n" not in message
    assert "step at 4 samples" in message and "itm (nan)" in message and "mlm (nan)" in message and "itc" not in message
    assert "gradient norms: objectives." in message and "not finite: fusion.blocks.1.feed.up.weight;" in message
    assert [batch.num_images for batch in caught.value.batches] == list(sizes)
    for old, new in ((before, model.state_dict()), (average, step.average.state_dict())):
        assert all(torch.equal(old[name].nan_to_num(7), new[name].nan_to_num(7)) for name in old)
    after = step.optimizer.state_dict()["state"]
    assert all(torch.equal(optimizer[k], after[k]["exp_avg"]) for k in optimizer)


def test_non_finite_gradient_of_a_finite_loss_stops_too():
    model = tiny_model("none", ("itc", "mlm"))
    model.space().text.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(model)
    with pytest.raises(NonFiniteError, match=r"gradient is not finite; gradient norms: embed.main.text (inf|nan)"):
        TrainStep(model, OptimConfig(), seed=0, total=80)([tiny_batch(4)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_state_goes_on_exactly():
    whole, _ = train((4, 4), ema=0.9)
    half = TrainStep(tiny_model("dual_stream", ("itc", "mlm")).double(), whole.config, seed=3, total=32)
    for i in range(2):
        half(split_batch(tiny_batch(8, first=8 * i, seen=8 * i), (4, 4)))
    resumed = TrainStep(tiny_model("dual_stream", ("itc", "mlm"), seed=9).double(), whole.config, seed=3, total=32)
    resumed.model.load_state_dict(weights(half.model))
    resumed.load_state_dict(half.state_dict())
    for i in range(2, 4):
        resumed(split_batch(tiny_batch(8, first=8 * i, seen=8 * i), (4, 4)))
    for old, new in ((whole.model, resumed.model), (whole.average, resumed.average)):
        assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
    assert not torch.equal(whole.average.module.space().text.weight, whole.model.space().text.weight)
    without = TrainStep(tiny_model(), OptimConfig(), seed=3, total=32)
    with pytest.raises(ValueError, match="ema None differs"):
        without.load_state_dict(whole.state_dict())


def test_changed_settings_of_the_optimizer_are_those_of_the_resumed_run():
    before = TrainStep(tiny_model(), OptimConfig(weight_decay=0.02), seed=3, total=32)
    before([tiny_batch(4)])
    config = OptimConfig(weight_decay=0.5, betas=(0.8, 0.9), lr_scale={"fusion": 5.0})  # other groups, another order
    after = TrainStep(tiny_model(), config, seed=3, total=32)
    after.load_state_dict(before.state_dict())
    groups = after.optimizer.param_groups
    assert {(group["weight_decay"], group["betas"], group["lr_scale"]) for group in groups} == {
        (decay, (0.8, 0.9), scale) for decay in (0.0, 0.5) for scale in (1.0, 5.0)
    }
    old, new = (dict(step.model.named_parameters()) for step in (before, after))
    for name, parameter in new.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(after.optimizer.state[parameter][key], before.optimizer.state[old[name]][key]), name


def test_warmup_that_does_not_fit_fails_at_once():
    with pytest.raises(ValueError, match="warmup 50 is longer than the run of 20"):
        TrainStep(tiny_model(), OptimConfig(warmup=50), seed=0, total=20)


def test_bf16_trains():
    step = TrainStep(
        tiny_model(objectives=OBJECTIVES.keys() - {"answer"}), OptimConfig(), seed=0, total=8, precision="bf16"
    )
    report = step(split_batch(tiny_batch(8), (4, 4)))
    assert all(value.isfinite() for value in report.scalars.values())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in step.model.parameters())


def test_samples_of_a_step():
    assert count_samples([tiny_batch(3), tiny_batch(2)]) == 5
    assert count_samples([tiny_batch(3, counts=((3, 3), (2, 2))), tiny_batch(2, counts=((2, 2), (1, 1)))]) == 8


def test_largest_norms_start_where_backward_met_the_first_bad_gradient():
    values = {
        "text.blocks.0.w": float("nan"),
        "fusion.blocks.0.w": float("inf"),
        "fusion.blocks.1.w": 3.0,
        "head.w": 9.0,
    }
    found = largest_norms({name: torch.tensor([value]) for name, value in values.items()})
    assert [name for name, _ in found] == ["fusion.blocks.0", "text.blocks.0", "head"]


def test_layers_are_named_by_their_number():
    names = ["fusion.blocks.1.feed.up.weight", "embed.main.text.bias", "objectives.itm.head.weight"]
    assert [layer_of(name) for name in names] == ["fusion.blocks.1", "embed.main.text", "objectives.itm.head"]


@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_nothing_before_the_check_waits_for_the_device(sizes):
    """On the meta device every read of a value on the host raises."""
    model = tiny_model("dual_stream", ("itc", "itm", "mlm", "lm"))
    step = TrainStep(model.to("meta"), OptimConfig(), seed=0, total=80)
    batches = [batch.to("meta") for batch in split_batch(tiny_batch(4), sizes)]
    scalars = step._backward(batches, 0, None)
    assert scalars["loss"].is_meta and all(p.grad is not None for p in model.parameters())
