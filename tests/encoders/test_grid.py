"""`grid`: feature maps of EfficientNets with and without the convolution of their classifier."""

import pytest
import torch

from encoders import GridConfig
from encoders.types import Images

PIXELS = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_without_the_head_convolution_the_last_stage_is_read():
    with_head, without = (
        GridConfig(model="tf_efficientnet_lite0", head_conv=on).build().eval() for on in (True, False)
    )
    assert (with_head.width, without.width) == (1280, 320)
    assert not any("conv_head" in name or name.split(".")[1] == "bn2" for name, _ in without.named_parameters())
    without.body.load_state_dict({name: with_head.body.state_dict()[name] for name in without.body.state_dict()})
    found, stage = without(Images(PIXELS)), with_head(Images(PIXELS), layers=True).layers[-1]
    torch.testing.assert_close(found.states, stage)
    torch.testing.assert_close(found.pooled, stage.mean(1))


def test_what_has_no_head_convolution_is_refused():
    with pytest.raises(ValueError, match="head_conv"):
        GridConfig(model="resnet18", head_conv=False).build()
