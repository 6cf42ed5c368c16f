"""A CNN's first stages alone."""

from __future__ import annotations

import pytest
import torch

from encoders import GridConfig
from encoders.types import Images


@pytest.mark.parametrize(("model", "side", "width"), [("resnet18", 4, 256), ("convnext_atto", 4, 160)])
def test_the_first_stages_give_what_the_whole_model_has_there(model: str, side: int, width: int) -> None:
    torch.manual_seed(0)
    whole = GridConfig(model=model, image_size=64).build().eval()
    part = GridConfig(model=model, image_size=64, reduction=16).build().eval()
    names = part.state_dict().keys()
    assert names < whole.state_dict().keys()
    part.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in names})
    images = Images(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    with torch.no_grad():
        found, every = part(images), whole(images, layers=True).layers
    assert found.states.shape == (2, side**2, width) and part.width == width and part.whole_grid == (side, side)
    torch.testing.assert_close(found.states, every[-2])
    torch.testing.assert_close(found.pooled, found.states.mean(1))


def test_a_stage_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.vision.reduction 7: resnet18 has no such stage to end with"):
        GridConfig(model="resnet18", reduction=7).build()
    assert GridConfig(model="resnet18", image_size=100).build().whole_grid == (4, 4)
    assert GridConfig(model="resnet18", image_size=100, max_pool=True).build().whole_grid == (2, 2)
    assert GridConfig(model="resnet18", sample=3).build().whole_grid is None
