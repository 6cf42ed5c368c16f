"""`images: each`: one pass of the pair model per image, laid side by side."""

import pytest
import torch
from torch import nn

from encoders.types import Tokens
from vlp.fusion.dual import DualStreamConfig
from vlp.fusion.single import SingleStreamConfig

SIZES = {"width": 32, "layers": 2, "heads": 4, "modality_embedding": True}
FUSIONS = {
    "single_stream": SingleStreamConfig(**SIZES, norm="pre"),
    "co": DualStreamConfig(**SIZES, attention="co", pooler="concat", project=True),
    "cross": DualStreamConfig(**SIZES, pooler="tanh"),
}
INDEX = torch.tensor([[0, 1], [2, 0], [3, 3]])


def tokens(rows: int, length: int, padding: int) -> Tokens:
    keep = torch.arange(length)[None] < (length - padding * torch.arange(rows) % length)[:, None]
    states = torch.randn(rows, length, 32)
    return Tokens(states, keep, states[:, 0])


@pytest.mark.parametrize("name", FUSIONS)
def test_each_image_is_a_pass_of_its_own(name):
    torch.manual_seed(0)
    config = FUSIONS[name]
    fusion = config.model_copy(update={"images": "each"}).build(32, 32, frozenset({"pooled", "image", "text"})).eval()
    one = config.build(32, 32, frozenset({"pooled", "image", "text"})).eval()
    image, text = tokens(4, 6, 1), tokens(3, 8, 2)
    found = fusion(image, text, INDEX, layers=True)
    assert found.pooled.shape == (3, fusion.pooled_width) and fusion.pooled_width == 2 * one.pooled_width
    state = fusion.state_dict()
    assert state["modality.weight"].shape == (3, 32)
    for number, row in enumerate((0, 2)):  # the first image's vector is row 0, the second's row 2
        own = state | {"modality.weight": state["modality.weight"][[row, 1]]}
        one.load_state_dict(own)
        wanted = one(image, text, INDEX[:, number])
        width = one.pooled_width
        torch.testing.assert_close(found.pooled[:, number * width : (number + 1) * width], wanted.pooled)
        part = slice(8 * number, 8 * number + 8)
        keep = text.keep[..., None]
        torch.testing.assert_close(found.text.states[:, part] * keep, wanted.text.states * keep)
        torch.testing.assert_close(found.text.layers[-1][:, part].shape, wanted.text.states.shape)
        if wanted.image is not None:
            keep = wanted.image.keep[..., None]
            part = slice(6 * number, 6 * number + 6)
            torch.testing.assert_close(found.image.states[:, part] * keep, wanted.image.states * keep)
            assert torch.equal(found.image.keep[:, part], wanted.image.keep)
    found.pooled.square().sum().backward()
    assert isinstance(fusion.modality, nn.Embedding) and fusion.modality.weight.grad.abs().sum(1).gt(0).all()


@pytest.mark.parametrize("name", FUSIONS)
def test_another_number_of_images_is_refused(name):
    fusion = FUSIONS[name].model_copy(update={"images": "each"}).build(32, 32, frozenset({"pooled"}))
    for index, number in ((None, 1), (torch.tensor([0, 1, 2]), 1), (torch.tensor([[0, 1, 2]] * 3), 3)):
        with pytest.raises(ValueError, match=f"fuses a text with 2 images, here it has {number}; set it to one"):
            fusion(tokens(3, 6, 1), tokens(3, 8, 2), index)
