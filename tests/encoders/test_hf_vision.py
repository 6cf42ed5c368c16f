"""`hf_vision`: vision models of transformers as they are, by their sizes or from a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from encoders import HfVisionConfig
from encoders.types import Images

ALIGN = {"image_size": 32, "in_channels": [32, 16], "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2],
         "num_block_repeats": [1, 1], "expand_ratios": [1, 6], "hidden_dim": 64, "width_coefficient": 1.0,
         "depth_coefficient": 1.0}  # fmt: skip
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
MODELS: dict[str, Any] = {
    "clip": transformers.CLIPVisionConfig(**SIZES, patch_size=8),
    "dinov2": transformers.Dinov2Config(**SIZES | {"patch_size": 8, "mlp_ratio": 2}),
    "align": transformers.AlignVisionConfig(**ALIGN),
}
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoder_of(name: str, **more: Any) -> Any:
    width = {"width": 24} if name == "align" else {}
    return HfVisionConfig(architecture=MODELS[name].to_dict(), image_size=32, **width, **more).build()


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_models_own(name: str) -> None:
    encoder = encoder_of(name, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).eval()
    pixels = (PIXELS.float() / 255 - encoder.mean) / encoder.std
    wanted = encoder.model(pixel_values=pixels, output_hidden_states=True)
    for images in (Images(PIXELS), Images(pixels)):
        found = encoder(images, layers=True)
        assert found.states.shape == (2, 64 if name == "align" else 17, encoder.width)
        states = wanted.last_hidden_state
        states = states.flatten(2).mT if states.dim() == 4 else states
        torch.testing.assert_close(found.states, states)
        torch.testing.assert_close(found.pooled, wanted.pooler_output.flatten(1))
        assert len(found.layers) == len(wanted.hidden_states)
    assert found.keep is None and encoder(Images(PIXELS)).layers is None
    (found.states.sum() + found.pooled.square().sum()).backward()
    assert all(torch.isfinite(one.grad).all() for one in encoder.parameters() if one.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_its_own_config_builds_it_again(name: str) -> None:
    encoder = encoder_of(name)
    again = encoder.config.build()
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again.eval()(Images(PIXELS)).states, encoder.eval()(Images(PIXELS)).states)


def test_from_a_folder(tmp_path: Path) -> None:
    model = transformers.CLIPVisionModel(MODELS["clip"])
    model.save_pretrained(tmp_path)
    encoder = HfVisionConfig(model=str(tmp_path), image_size=32).build()
    encoder.load_pretrained()
    for name, one in model.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], one)


def test_statistics_of_batch_norms_stay() -> None:
    frozen, free = encoder_of("align").train(), encoder_of("align", freeze_norm=False).train()
    before = [{k: v.clone() for k, v in one.state_dict().items() if "running" in k} for one in (frozen, free)]
    for one in (frozen, free):
        one(Images(PIXELS))
    assert all(torch.equal(frozen.state_dict()[k], v) for k, v in before[0].items())
    assert any(not torch.equal(free.state_dict()[k], v) for k, v in before[1].items())


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for config, message in (
        (HfVisionConfig(model=str(tmp_path / "none")), "model.vision.model: no transformers config at"),
        (HfVisionConfig(architecture={"model_type": "nothing"}), "cannot build a config of 'nothing'"),
        (HfVisionConfig(architecture=MODELS["align"].to_dict()), "model.vision.width: .* names no hidden size"),
        (HfVisionConfig(architecture={"hidden_size": 3}), "transformers cannot build a config of None"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            config.build()
        assert "\n" not in str(error.value)


def test_a_config_chooses_no_code() -> None:
    """Kernels of attention may be named by a repository on the hub, and so may a config's own classes."""
    evil = {"attn_implementation": "nobody/kernels", "_attn_implementation": "nobody/kernels",
            "auto_map": {"AutoModel": "nobody/model--code.Model"}}  # fmt: skip
    encoder = HfVisionConfig(architecture=MODELS["clip"].to_dict() | evil, image_size=32).build()
    assert "nobody" not in str(encoder.config.architecture)
    assert encoder.model.config._attn_implementation in ("sdpa", "eager")


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        for name in MODELS:
            encoder = encoder_of(name)
            found = encoder(Images(torch.empty(2, 3, 32, 32, dtype=torch.uint8)))
            assert found.states.device.type == "meta" and found.pooled.shape == (2, encoder.width)
