"""Files from strangers: one clear line, nothing executed, nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import vlp
from scripts.fuzz_checkpoints import Hostile, bomb

FORMAT_1 = Path(__file__).parents[1] / "vlp" / "checkpoint" / "format_1"
CLIP = Path(__file__).parents[1] / "goldens" / "hf_clip"


def refuse(source: Path, message: str) -> None:
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(ValueError, match=message) as error:
        vlp.load(source)
    assert "\n" not in str(error.value)
    assert sorted(source.parent.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("name", ["model.pth", "model.ckpt", "pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_wants_to_run_code(tmp_path: Path, name: str, zipped: bool) -> None:
    sign = tmp_path / "ran"
    content = {"model": {"weight": Hostile(sign)}}
    if zipped:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content))
            archive.writestr("archive/version", "3\n")
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    refuse(tmp_path / name, "nothing of it was executed")
    assert not sign.exists()
    pickle.loads(pickle.dumps(content))  # the trap works
    assert sign.exists()


def test_archives_that_expand_and_headers_that_promise_too_much(tmp_path: Path) -> None:
    said = set()
    for number in range(4):
        bomb(tmp_path / "model.pth", random.Random(number), tmp_path)
        shutil.copy(tmp_path / "model.pth", tmp_path / "model.safetensors")
        for path in (tmp_path / "model.pth", tmp_path / "model.safetensors"):
            with pytest.raises(ValueError, match=r"^cannot load") as error:
                vlp.load(path)
            said.add("would expand to" in str(error.value))
    assert said == {True, False}


def test_truncated_and_misshapen_weights(tmp_path: Path) -> None:
    shutil.copytree(CLIP, tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    weights.chmod(0o644)
    state = {key: tensor.clone() for key, tensor in load_file(weights).items()}  # else mapped from the file
    os.truncate(weights, weights.stat().st_size // 2)
    refuse(tmp_path / "clip", "cannot load .*write or copy it again")
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    save_file({**state, name: state[name][:, :-1].contiguous()}, weights)
    refuse(tmp_path / "clip", "cannot load|do not fit")
    save_file({key: tensor for key, tensor in state.items() if key != name}, weights)
    refuse(tmp_path / "clip", "missing")


def test_a_config_that_names_a_path_outside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path in a stored config is opened: the weights and the tokenizer are those of the folder."""
    secret = tmp_path / "secret"
    secret.mkdir()
    shutil.copytree(FORMAT_1, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["model"]["text"]["init"] = str(secret)
    tree["data"]["train"] = str(secret / "shards.tar")
    tree["data"].setdefault("tokenizer", {})["source"] = str(secret)
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"torn|config\.yaml"):
        vlp.load(tmp_path / "run")  # the manifest shows that the config is not the one that was written
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"]["config.yaml"] = {"size": path.stat().st_size, "sha256": digest}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    opened = []
    with monkeypatch.context() as patch:
        patch.setattr("encoders.text.load_bert", lambda *_, **__: opened.append("bert"))
        loaded = vlp.load(tmp_path / "run")
    assert loaded.embed_texts(["a dog"]).isfinite().all() and opened == [] and list(secret.iterdir()) == []


def test_a_manifest_that_names_a_path_outside_its_folder(tmp_path: Path) -> None:
    shutil.copytree(FORMAT_1, tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    path.write_text(path.read_text().replace("model.safetensors", "../../model.safetensors"))
    with pytest.raises(ValueError) as error:
        vlp.load(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_weights_of_other_things(tmp_path: Path) -> None:
    torch.save([1, 2, 3], tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", "it holds no named tensors")
    torch.save({"model": {1: torch.zeros(1)}}, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", "it holds no named tensors")
