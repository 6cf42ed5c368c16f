"""What train.compile compiles."""

from __future__ import annotations

from helpers import PIXELS, SIZES, tiny_model
from torch import nn

from encoders import PatchConfig
from objectives import ItmConfig, MimConfig
from vlp.fusion.single import SingleStreamConfig
from vlp.train.loop import compile_parts

VIT = PatchConfig(model="vit_tiny_patch16_224", image_size=PIXELS, patch_size=4, width=32, depth=2, heads=4)


def compiled(monkeypatch, model) -> set[str]:
    """Names of the parts that are compiled."""
    found: list[nn.Module] = []
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "compile", lambda self: found.append(self))
        compile_parts(model)
    return {name for name, part in model.named_children() if any(part is one for one in found)}


def test_encoders_and_fusion_are_compiled(monkeypatch):
    assert compiled(monkeypatch, tiny_model()) == {"vision", "text", "fusion"}
    assert compiled(monkeypatch, tiny_model("none", ("itc",))) == {"vision", "text"}


def test_a_vit_that_works_by_hooks_is_not(monkeypatch, caplog):
    """Compiled code has no guard on hooks: patches that are to be hidden would be shown, and the loss be another."""
    masked = VIT.model_copy(update={"mask_token": True})
    model = tiny_model("single_stream", {"mim": MimConfig(target="pixels")}, vision=masked)
    assert compiled(monkeypatch, model) == {"text", "fusion"}
    inner = SingleStreamConfig(**SIZES, before_norm=True)
    with caplog.at_level("INFO", "vlp"):
        assert compiled(monkeypatch, tiny_model(inner, {"itm": ItmConfig()}, vision=VIT)) == {"text", "fusion"}
    assert "train.compile leaves model.vision as it is" in caplog.text
