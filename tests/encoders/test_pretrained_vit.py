"""Published ViT weights reach our parts: fewer blocks, the bare patch embedding, a fusion that starts from a ViT."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from encoders import PatchConfig
from encoders.types import Images, Tokens
from vlp.fusion.single import SingleStreamConfig


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small ViT in a folder as timm reads it from a hub."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(std=0.3)
    save_file(vit.state_dict(), folder / "model.safetensors")
    info = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": sizes,
        "pretrained_cfg": {
            "input_size": [3, 16, 16],
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
    }
    (folder / "config.json").write_text(json.dumps(info))
    return f"local-dir:{folder}", vit


def pixels():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("depth", [None, 2, 0])
def test_fewer_blocks_take_the_first_weights(published, depth):
    source, vit = published
    ours = PatchConfig(model=source, pretrained=True, image_size=16, depth=depth).build().eval()
    ours.load_pretrained()
    with torch.no_grad():
        expected = vit._pos_embed(vit.patch_embed(pixels()))
        for block in vit.blocks[:depth]:
            expected = block(expected)
        expected = expected if depth == 0 else vit.norm(expected)
        torch.testing.assert_close(ours(Images(pixels())).states, expected)


def test_more_blocks_than_published_are_refused(published):
    ours = PatchConfig(model=published[0], pretrained=True, image_size=16, depth=4).build()
    with pytest.raises(ValueError, match=r"model\.vision\.depth 4: .* has no blocks\.3\."):
        ours.load_pretrained()


def test_single_stream_from_a_vit_computes_the_vit(published):
    """ViLT: a bare patch embedding and a fusion, both from one ViT, are that ViT where there is no text."""
    source, vit = published
    vision = PatchConfig(model=source, pretrained=True, image_size=16, depth=0).build().eval()
    vision.load_pretrained()
    config = SingleStreamConfig(
        width=32, layers=3, heads=4, norm="pre", eps=1e-6, modality_embedding=False, init=f"timm:{source}"
    )
    fusion = config.build(32, 32, frozenset()).eval()
    fusion.load_pretrained()
    with torch.no_grad():
        tokens: Tokens = vision(Images(pixels()))
        torch.testing.assert_close(
            fusion(tokens, None).image.states, vit.forward_features(pixels()), atol=1e-4, rtol=1e-4
        )
