"""`patch` on ViTs of several kinds: hidden states on request, masks only where there are any."""

import pytest
import torch

from encoders import PatchConfig
from encoders.types import Images

PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SMALL = {"model": "vit_tiny_patch16_224", "image_size": 32, "width": 32, "heads": 4}


@pytest.mark.parametrize("settings", [{}, {"class_token": False}])
def test_layers_end_in_the_states(settings):
    encoder = PatchConfig(**SMALL, depth=2, **settings).build().eval()
    found = encoder(Images(PIXELS), layers=True)
    assert [layer.shape for layer in found.layers] == [found.states.shape] * 2
    assert torch.equal(found.states, encoder(Images(PIXELS)).states)
    torch.testing.assert_close(encoder.vit.norm(found.layers[-1]), found.states)


def test_bare_embeddings_have_no_layers():
    encoder = PatchConfig(**SMALL, depth=0).build().eval()
    found = encoder(Images(PIXELS), layers=True)
    assert found.layers == () and torch.equal(found.states, encoder(Images(PIXELS)).states)


def test_a_vit_that_takes_no_mask():
    encoder = PatchConfig(model="beit_base_patch16_224", image_size=32, width=32, depth=1, heads=4).build().eval()
    assert encoder(Images(PIXELS)).states.shape == (2, 5, 32)
