import math

import pytest
import torch
from helpers import tiny_model

from vlp.train.optim import OptimConfig, build_average, build_optimizer, learning_rate, set_learning_rate


def test_schedule_values():
    config = OptimConfig(lr=2.0, min_lr=0.5, warmup=100, schedule="cosine")
    rates = [learning_rate(config, seen, 1100) for seen in (0, 25, 100, 350, 600, 1100, 5000)]
    quarter = 0.25 + 0.75 * (1 + math.cos(math.pi / 4)) / 2
    assert rates == pytest.approx([0, 0.25, 1, quarter, 0.625, 0.25, 0.25])
    linear = config.model_copy(update={"schedule": "linear"})
    assert [learning_rate(linear, seen, 1100) for seen in (100, 350, 1100)] == pytest.approx([1, 0.8125, 0.25])
    constant = config.model_copy(update={"schedule": "constant"})
    assert [learning_rate(constant, seen, 1100) for seen in (50, 100, 1100)] == [0.5, 1, 1]


def test_schedule_mistakes_name_field_and_value():
    with pytest.raises(ValueError, match="warmup 200 is longer than the run of 100"):
        learning_rate(OptimConfig(warmup=200), 0, 100)
    with pytest.raises(ValueError, match=r"min_lr 0.1 is above lr 0.01"):
        OptimConfig(lr=0.01, min_lr=0.1)
    with pytest.raises(ValueError, match=r"lr_scale .*-1.* is negative"):
        OptimConfig(lr_scale={"fusion": -1.0})


def test_groups_hold_each_trainable_parameter_once():
    model = tiny_model(objectives=("itc", "itm", "mlm", "lm"))
    model.vision.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    # The tied word embedding is in the text encoder and in two heads, and is decayed once.
    assert decay[id(model.text.word_embedding)] == 0.1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            norm_or_bias = name.endswith("bias") or "norm" in name or name == "embed.main.logit_scale"
            assert decay[id(parameter)] == (0.0 if norm_or_bias else 0.1), name


def test_longest_part_wins():
    model = tiny_model()
    scales = {"fusion": 5.0, "fusion.blocks.1": 2.0, "objectives": 4.0}
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, lr_scale=scales))
    set_learning_rate(optimizer, 0.01)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    expected = {
        "fusion.blocks.0.attention.query.weight": 0.05,
        "fusion.blocks.1.attention.query.weight": 0.02,
        "objectives.itm.head.bias": 0.04,
        "embed.main.image.weight": 0.01,
    }
    assert {name: rate[id(names[name])] for name in expected} == pytest.approx(expected)


def test_unknown_part_is_named_with_the_parts_there_are():
    with pytest.raises(
        ValueError, match=r"lr_scale \['fuse', 'tex'\] matches no parameter.*'fusion'.*'text'"
    ) as caught:
        build_optimizer(tiny_model(), OptimConfig(lr_scale={"fuse": 5.0, "tex": 2.0, "fusion": 1.0}))
    assert "\n" not in str(caught.value)


def test_nothing_trainable():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(tiny_model().requires_grad_(False), OptimConfig())


def test_moving_average():
    model = torch.nn.Linear(2, 1)
    average = build_average(model, OptimConfig(ema=0.9))
    assert average is not None
    average.update_parameters(model)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update_parameters(model)
    torch.testing.assert_close(average.module.weight, before + 0.1)
    assert not average.module.weight.requires_grad
    assert build_average(model, OptimConfig()) is None
