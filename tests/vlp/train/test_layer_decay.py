"""Layer-wise decay of the learning rate: the rate of each block, counted from the heads."""

from __future__ import annotations

import pytest
from helpers import SIZES, tiny_model

from vlp.model import build_model
from vlp.train.layer_decay import layer_scales, levels_of
from vlp.train.optim import OptimConfig, build_optimizer


def scales(model, decay=0.5):
    return layer_scales(model, decay)


def test_blocks_count_from_the_heads():
    found = scales(tiny_model("dual_stream", ("itc", "itm", "mlm")))  # two blocks a part
    assert found["fusion.blocks.1.feed.up.weight"] == 0.5
    assert found["fusion.blocks.0.feed.up.weight"] == 0.25
    assert found["text.blocks.1.feed.up.weight"] == 0.125
    assert found["text.blocks.0.feed.up.weight"] == 0.0625
    assert found["text.embeddings.word.weight"] == found["vision.vit.patch_embed.proj.weight"] == 0.5**5
    assert found["vision.vit.cls_token"] == found["vision.vit.pos_embed"] == 0.5**5
    assert found["vision.vit.blocks.0.mlp.fc1.weight"] == 0.0625
    assert found["vision.vit.norm.weight"] == 0.25, "after the last block: as near as the fusion's first"
    heads = [name for name in found if name.startswith(("objectives.", "embed."))]
    assert heads and all(found[name] == 1.0 for name in heads)


@pytest.mark.parametrize("pooler", ["concat", "cls"])  # of which the second reads no image, and needs one block less
def test_both_streams_count_alike(pooler):
    config = tiny_model("dual_stream", ("itm",)).config
    fusion = config.fusion.model_copy(update={"attention": "co", "pooler": pooler, "layers": 3})
    model = build_model(
        config.model_copy(update={"fusion": fusion}), tiny_model("dual_stream", ("itm",)).objective_configs
    )
    found = scales(model)
    images = len(model.fusion.image_blocks)
    assert images == (3 if pooler == "concat" else 2)
    for number in range(images):
        name = f"{number}.feed.up.weight"
        assert found[f"fusion.image_blocks.{name}"] == found[f"fusion.blocks.{name}"] == 0.5 ** (3 - number)
    assert all(found[name] == 1.0 for name in found if name.startswith("fusion.pooler."))


def test_fusion_that_is_the_tower():
    config = tiny_model("single_stream", ("itm",)).config
    vision = config.vision.model_copy(update={"depth": 0})
    text = config.text.model_copy(update={"layers": 0})
    config = config.model_copy(update={"vision": vision, "text": text})
    found = scales(build_model(config, {"itm": tiny_model("single_stream", ("itm",)).objective_configs["itm"]}))
    assert found["fusion.blocks.0.feed.up.weight"] == 0.25
    assert found["vision.vit.patch_embed.proj.weight"] == found["text.embeddings.word.weight"] == 0.125


def test_decoder_beside_the_fusion_lowers_no_tower_twice():
    found = scales(tiny_model("dual_stream", ("itm", "lm")))
    assert found["decoder.blocks.1.feed.up.weight"] == found["fusion.blocks.1.feed.up.weight"] == 0.5
    assert found["text.blocks.1.feed.up.weight"] == 0.125


def test_groups_of_the_optimizer():
    model = tiny_model("none", ("itc",))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, layer_decay=0.5, lr_scale={"text": 0.1}))
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == dict(model.named_parameters()).keys()
    assert rates["vision.vit.blocks.1.mlp.fc1.weight"] == pytest.approx(5e-4)
    assert rates["vision.vit.blocks.0.norm1.bias"] == pytest.approx(2.5e-4)
    assert rates["text.blocks.0.feed.up.weight"] == pytest.approx(2.5e-5)
    assert rates["embed.main.image.weight"] == pytest.approx(1e-3)
    assert len({group["lr"] for group in build_optimizer(model, OptimConfig(lr=1e-3)).param_groups}) == 1


def test_blocks_of_stages_count_as_timm_counts_them():
    """A Swin's and a ConvNeXt's: every group of timm's own layer decay has one level here, in the same order."""
    import timm
    from timm.models import group_parameters

    for name, sizes in (
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "depths": (1, 2, 3, 1), "embed_dim": 12}),
        ("convnext_atto", {"depths": (1, 2, 3, 1), "dims": (4, 8, 16, 32)}),
    ):
        model = timm.create_model(name, num_classes=0, **sizes)
        number, levels = levels_of(model)
        assert number == 7
        groups = group_parameters(model, model.group_matcher())
        for group, members in groups.items():
            names = [one for one in members if not one.startswith("norm")]
            assert {levels[one] for one in names} <= {8 - group}, (name, group)
        assert {levels[one] for one in levels if one.startswith("norm")} <= {0}


def test_a_part_without_blocks():
    from torch import nn

    assert levels_of(nn.Sequential()) == (0, {})
    assert levels_of(nn.Linear(2, SIZES["width"])) == (0, {"weight": 1, "bias": 1})
