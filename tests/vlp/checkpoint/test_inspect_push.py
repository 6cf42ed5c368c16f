"""`vlp inspect` and `vlp push`, and foreign checkpoints at addresses and on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

import vlp
from objectives.base import Embed
from vlp.checkpoint.inspect import inspect
from vlp.checkpoint.push import push
from vlp.cli import main
from vlp.recipes import dump_yaml

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers CLIP of random weights, as save_pretrained writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    text = {**SMALL, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def test_inspect_tells_without_building(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("inspect built the model")

    monkeypatch.setattr("vlp.model.Model.__init__", never)
    found = inspect(clip)
    stored = CLIPModel.from_pretrained(clip).state_dict()
    assert found.family == "hf_clip" and found.abilities == ("embed_images",) and found.words is None
    assert found.parameters == sum(tensor.numel() for name, tensor in stored.items() if "position_ids" not in name)
    assert found.config.model.fusion.kind == "none" and found.config.model.embed.width == 8


def test_inspect_on_the_command_line(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(clip)]) == 0
    said = capsys.readouterr().out
    assert "family" in said and "embed_images" in said and "fusion:\n    kind: none" in said
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "strange.pth")
    assert main(["inspect", str(tmp_path / "strange.pth")]) == 2
    error = capsys.readouterr().err
    assert "of no family that vlp reads" in error and error.count("\n") == 1


def test_a_foreign_checkpoint_at_an_address_and_on_the_hub(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(clip), "/bucket/clip", recursive=True)
    hub = tmp_path / "hub"

    def snapshot(repo_id: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        hub.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in clip.glob(pattern):
                shutil.copy(path, hub)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    whole = vlp.load(clip)
    for source in ("memory://bucket/clip", "memory://bucket/clip/model.safetensors", "someone/clip"):
        found = vlp.load(source)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(found.model.state_dict()[name], tensor), (source, name)
    assert whole.model.needs() >= {Embed("image"), Embed("text")}


def test_push_uploads_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Path(__file__).parent / "format_1"
    asked: list[tuple[str, Any]] = []

    class FakeHub:
        def create_repo(self, name: str, **settings: Any) -> None:
            asked.append((name, settings))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
            asked.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))
            return SimpleNamespace(repo_url=SimpleNamespace(url=f"hub/{repo_id}"))

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    assert push(checkpoint, "someone/model", private=True) == "hub/someone/model"
    assert asked[0] == ("someone/model", {"repo_type": "model", "private": True, "exist_ok": True})
    assert {"model.safetensors", "config.yaml", "README.md", "manifest.json"} <= asked[1][1]
    assert main(["push", str(checkpoint), "somebody/else", "--message", "first"]) == 0  # "name" is the command's own
    assert [name for name, _ in asked[2:]] == ["somebody/else"] * 2
    del asked[2:]
    with pytest.raises(ValueError, match="write owner/name"):
        push(checkpoint, "model")
    torn = tmp_path / "torn"
    shutil.copytree(checkpoint, torn)
    manifest = json.loads((torn / "manifest.json").read_text())
    assert manifest
    with (torn / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"torn|bytes"):
        push(torn, "someone/model")
    assert len(asked) == 2


def test_pretraining_begins_with_a_foreign_checkpoint(clip: Path, tmp_path: Path) -> None:
    """`--init` takes what vlp.load takes, tokenizer included."""
    shutil.copytree(clip, tmp_path / "clip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", *(f"##{chr(97 + n)}" for n in range(26))]
    (tmp_path / "clip" / "vocab.txt").write_text("\n".join(words))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "red.png,a cat\nred.png,a dog\n" * 4)
    found = inspect(tmp_path / "clip").config
    recipe = {
        "model": found.model.model_dump(),
        "objectives": {name: one.model_dump() for name, one in found.objectives.items()},
        "data": {"train": str(tmp_path / "pairs.csv"), "workers": 0, "max_length": 8},
        "train": {"samples": 8, "global_batch": 8, "micro_batch": 8, "optim": {"lr": 1e-12, "weight_decay": 0}},
    }
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe))
    said = ["pretrain", str(tmp_path / "mine.yaml"), "--device", "cpu", "--out"]
    assert main([*said, str(tmp_path / "run"), "--init", str(tmp_path / "clip")]) == 0
    run, before = vlp.load(tmp_path / "run"), vlp.load(clip)
    for name, tensor in before.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], tensor, atol=1e-6, rtol=0)
    assert run.tokenizer.vocabulary.size == len(words)
    assert main([*said, str(tmp_path / "other"), "--init", str(tmp_path / "gone")]) == 2
