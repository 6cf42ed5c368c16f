"""Low-rank adaptation: what it trains, what it leaves behind, and that resuming changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from helpers import tiny_batch, tiny_model
from runs import BATCH, checkpoints, losses

import vlp
from objectives import ItcConfig, ItmConfig
from objectives.base import Draw, Embed, Fuse
from vlp.checkpoint.native import read_weights, weights_of
from vlp.cli.dispatch import explain
from vlp.config import load
from vlp.model import build_model
from vlp.pretrain import pretrain, resume
from vlp.run import RunConfig
from vlp.train.lora import LoraConfig, adapt, apart, count_trained, merge, merged

CPU = torch.device("cpu")


def test_a_missing_package_is_named() -> None:
    assert "pip install 'vlp[lora]'" in (explain(ModuleNotFoundError("no peft", name="peft")) or "")


class TestLora:
    @pytest.fixture(autouse=True)
    def peft(self) -> None:
        pytest.importorskip("peft")

    def test_merged_is_adapted(self) -> None:
        model = tiny_model("dual_stream", ("itc", "itm", "mlm"))
        names = set(model.state_dict())
        adapt(model, LoraConfig(rank=2), seed=0)
        batch, passes = tiny_batch(3), {Embed("image"), Embed("text"), Fuse()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        model.eval()
        wanted, plain = model.run(passes, batch), merged(model)
        assert set(plain.state_dict()) == names and apart(model) and not apart(plain)
        found = plain.run(passes, batch)
        for one in (Embed("image"), Embed("text")):
            torch.testing.assert_close(found[one], wanted[one], rtol=1e-4, atol=1e-4)  # added up in another order
        torch.testing.assert_close(found[Fuse()].pooled, wanted[Fuse()].pooled, rtol=1e-4, atol=1e-4)
        merge(model)
        assert set(model.state_dict()) == names

    def test_what_is_trained(self) -> None:
        model = tiny_model("dual_stream", ("itc", "itm", "mlm"))
        before = {name: value.clone() for name, value in weights_of(model).items()}
        adapt(model, LoraConfig(parts=("vision", "fusion")), seed=0)
        assert torch.equal(
            weights_of(merged(model))["vision.vit.blocks.0.attn.qkv.weight"],
            before["vision.vit.blocks.0.attn.qkv.weight"],
        )
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name or not name.startswith(("vision.", "fusion."))), name
        loss, _ = model(tiny_batch(3), Draw(0))
        loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []

    def test_a_layer_in_two_places_has_one_difference(self) -> None:
        plain = tiny_model("dual_stream", ("itm",))
        fusion = plain.config.fusion.model_copy(update={"images": "alternate"})  # its blocks share keys and values
        model = build_model(plain.config.model_copy(update={"fusion": fusion}), plain.objective_configs)
        adapt(model, LoraConfig(rank=2), seed=0)
        first, second = (block.cross for block in model.fusion.blocks)  # type: ignore[union-attr]
        assert first.key is second.key and hasattr(second.key, "lora_A") and first.value is second.value
        parts = apart(model)
        merge(model)
        assert first.key is second.key and type(second.key) is torch.nn.Linear
        assert "fusion.blocks.0.cross.key.base_layer.weight" in parts

    @pytest.mark.parametrize("parts", [("vision", "text", "fusion"), ("fusion",)])
    def test_what_would_be_trained_is_counted(self, parts: tuple[str, ...]) -> None:
        model, config = tiny_model("dual_stream", ("itc", "itm", "mlm")), LoraConfig(rank=2, parts=parts)
        counted = count_trained(model, config)
        adapt(model, config, seed=0)
        assert counted == sum(one.numel() for one in model.parameters() if one.requires_grad)

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match=r"train\.lora\.parts \['visoin'\] have no linear layer"):
            adapt(tiny_model(), LoraConfig(parts=("visoin",)), seed=0)
        taught = tiny_model("dual_stream", {"itc": ItcConfig(queue=4), "itm": ItmConfig()})
        with pytest.raises(ValueError, match=r"train\.lora: a momentum teacher follows whole weights"):
            adapt(taught, LoraConfig(), seed=0)

    def test_run_loads_without_adapters_and_resumes_exactly(self, tmp_path: Path) -> None:
        train: dict[str, Any] = {"lora": {"rank": 2, "dropout": 0.1}, "samples": 6 * BATCH, "save_every": 3 * BATCH}
        run = load(RunConfig, runs.write_recipe(tmp_path / "r.yaml", runs.write_data(tmp_path / "data"), **train))
        pretrain(run, tmp_path / "whole", CPU)
        assert not any("lora" in name for name in read_weights(checkpoints(tmp_path / "whole")[-1]))
        assert not any("lora" in name for name in read_weights(checkpoints(tmp_path / "whole")[-1], average=True))
        assert vlp.load(tmp_path / "whole").report.missing == ()
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        shutil.rmtree(checkpoints(tmp_path / "run")[-1])
        resume(tmp_path / "run", [], CPU)
        assert runs.weights(tmp_path / "run") == runs.weights(tmp_path / "whole")
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")
        shutil.rmtree(checkpoints(tmp_path / "run")[-1])
        with pytest.raises(ValueError, match=r"train\.lora differs from the run that is resumed"):
            resume(tmp_path / "run", ["--train.lora", "none"], CPU)
