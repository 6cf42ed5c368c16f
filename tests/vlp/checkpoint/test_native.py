"""Checkpoints: what comes back is what was written, or one line says why not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import outputs, save
from helpers import SIZES, tiny_batch, tiny_model
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from encoders import PatchConfig
from objectives import ItcConfig, ItmConfig, LmConfig
from vlp.checkpoint import folder as folder_module
from vlp.checkpoint.folder import manifest_files
from vlp.checkpoint.native import (
    LoadReport,
    aliases,
    checkpoint_folder,
    find_checkpoint,
    load_weights,
    read_weights,
    weights_of,
    write_tensors,
)
from vlp.decoder import DecoderConfig
from vlp.model import Model, ModelConfig, build_model


def blip() -> Model:
    """A decoder that shares all but self-attention with the fusion, words shared by all heads."""
    config = tiny_model("dual_stream", ["itc", "itm"]).config
    decoder = DecoderConfig(**SIZES, share="all_but_self_attention")
    return build_model(config.model_copy(update={"decoder": decoder}), {"itm": ItmConfig(), "lm": LmConfig()}, seed=4)


@pytest.mark.parametrize(
    ("fusion", "objectives"),
    [
        ("none", ("itc",)),
        ("single_stream", ("itc", "itm", "mlm")),
        ("dual_stream", ("itc", "itm", "mlm", "lm", "answer")),
        ("co", ("itm", "mlm")),
    ],
)
def test_every_fusion_comes_back_to_the_last_bit(tmp_path: Path, fusion: str, objectives: tuple[str, ...]) -> None:
    model, fresh = tiny_model(fusion, objectives, seed=3), tiny_model(fusion, objectives, seed=0)
    before, batch = outputs(fresh, tiny_batch(3)), tiny_batch(3)
    report = load_weights(fresh, read_weights(save(tmp_path / "one", model)))
    assert set(report.loaded) == set(weights_of(model)) and not report.missing and not report.unexpected
    for ours, theirs, initial in zip(outputs(fresh, batch), outputs(model, batch), before, strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(ours, initial)


@pytest.mark.parametrize("make", [blip, lambda: tiny_model("dual_stream", ["itc", "mlm", "lm"], seed=4)])
def test_shared_weights_are_stored_once_and_come_back_shared(tmp_path: Path, make: Callable[[], Model]) -> None:
    model = make()
    shared = [names for names in aliases(model).values() if len(names) > 1]
    assert any("text.embeddings.word.weight" in names for names in shared)
    stored = load_file(save(tmp_path / "one", model) / "model.safetensors")
    assert sum(len(names) - 1 for names in shared) == len(model.state_dict()) - len(stored)
    fresh = make()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    load_weights(fresh, stored)
    ours = fresh.state_dict(keep_vars=True)
    for names in shared:
        assert all(ours[name] is ours[names[0]] for name in names)
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())
    # Any one of the names will do, and two that disagree will not.
    first, second, *_ = shared[0]
    load_weights(fresh, {second if name == first else name: tensor for name, tensor in stored.items()})
    with pytest.raises(ValueError, match=f"{first} and {second} differ, but the model shares them"):
        load_weights(fresh, {**stored, second: stored[first] + 1})


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    model = tiny_model()
    weights = weights_of(model)
    write_tensors(tmp_path / "a", weights)
    write_tensors(tmp_path / "b", dict(reversed(weights.items())))
    save(tmp_path / "c", model)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()


def test_extra_files_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "one", tiny_model(), {"state.bin": b"abc", "ema.safetensors": {"x": torch.arange(3)}})
    assert (path / "state.bin").read_bytes() == b"abc"
    assert torch.equal(load_file(path / "ema.safetensors")["x"], torch.arange(3))
    (path / "state.bin").write_bytes(b"abd")
    with pytest.raises(ValueError, match=r"torn: state\.bin is not what was written"):
        read_weights(path)
    (path / "state.bin").unlink()  # as one does before a model is published
    assert read_weights(path) and "state.bin" not in manifest_files(path)


def truncate(path: Path) -> str:
    file = path / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, 123)
    return f"model.safetensors has 123 of {size} bytes"


def remove(name: str) -> Callable[[Path], str]:
    def damage(path: Path) -> str:
        (path / name).unlink()
        return f"{name} is missing"

    return damage


def flip_a_bit(path: Path) -> str:
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "model.safetensors is not what was written (its SHA-256 differs)"


def break_manifest(path: Path) -> str:
    (path / "manifest.json").write_text('{"files": {"model.sa')
    return "manifest.json cannot be read"


DAMAGES = [
    truncate,
    remove("config.yaml"),
    remove("model.safetensors"),
    remove("manifest.json"),
    flip_a_bit,
    break_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_refused_in_one_line_that_names_a_whole_one(
    tmp_path: Path, damage: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    first = save(checkpoint_folder(tmp_path, 900), tiny_model())
    second, third = checkpoint_folder(tmp_path, 1000), checkpoint_folder(tmp_path, 1100)
    for folder in (second, third):
        shutil.copytree(first, folder)
    assert find_checkpoint(tmp_path) == third
    faults = [damage(folder) for folder in (second, third)]
    with pytest.raises(ValueError) as error:
        read_weights(third)
    message = str(error.value)
    assert f"{third} is torn: {faults[1]}" in message and message.endswith(f"use an older checkpoint: {first}")
    assert "\n" not in message
    assert find_checkpoint(tmp_path) == first
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    damage(first)
    with pytest.raises(ValueError, match="none of its 3 checkpoints is whole"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint beside it is whole"):
        read_weights(third)


def test_large_files_are_hashed_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "one", tiny_model())
    flip_a_bit(path)
    monkeypatch.setattr(folder_module, "CHEAP", 1000)
    assert read_weights(path)
    with pytest.raises(ValueError, match="SHA-256"):
        read_weights(path, verify=True)


def test_the_model_card_may_be_edited(tmp_path: Path) -> None:
    path = save(tmp_path / "one", tiny_model())
    (path / "README.md").write_text("mine")
    assert read_weights(path)
    assert "README.md" not in json.loads((path / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_while_writing_leaves_a_whole_checkpoint(tmp_path: Path, renames: int) -> None:
    """Killed before the first rename of a replacement, and between its two: the old weights are found."""
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    path = save(tmp_path / "one", old)
    child = os.fork()
    if child == 0:
        rename, done = os.rename, []

        def die(source: Path, target: Path) -> None:
            if len(done) == renames:
                os._exit(9)
            done.append(rename(source, target))

        os.rename = die  # type: ignore[assignment]
        save(path, new)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    found = find_checkpoint(path)
    assert torch.equal(read_weights(found)["embed.main.logit_scale"], old.state_dict()["embed.main.logit_scale"])
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in read_weights(found).items())
    save(path, new)
    assert find_checkpoint(path) == path
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in read_weights(path).items())
    assert [each.name for each in tmp_path.iterdir()] == ["one"]


def test_a_killed_replacement_is_found_in_its_run(tmp_path: Path) -> None:
    path = save(checkpoint_folder(tmp_path, 50), tiny_model())
    hidden = path.rename(path.with_name(f".{path.name}.replaced"))
    assert find_checkpoint(tmp_path) == hidden


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "one", tiny_model(seed=1))
    before = (path / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(folder_module, "_sync", full)
    with pytest.raises(OSError, match="no space"):
        save(path, tiny_model(seed=2))
    assert (path / "model.safetensors").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["one"]


def test_what_does_not_fit_is_named_in_one_line() -> None:
    small, large = (
        tiny_model("dual_stream", ["itc", "itm"]),
        tiny_model("dual_stream", ["itc", "itm", "answer"], seed=1),
    )
    initial = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(large, weights_of(small))
    assert str(error.value) == (
        "the weights do not fit the model: missing objectives.answer.head.0.weight, objectives.answer.head.0.bias, "
        "objectives.answer.head.1.weight and 3 more (allow_missing='objectives.answer.head.*' "
        "keeps their initial values)"
    )
    assert all(torch.equal(tensor, initial[name]) for name, tensor in large.state_dict().items())
    report = load_weights(large, weights_of(small), allow_missing=["objectives.answer.*"])
    assert len(report.missing) == 6 and torch.equal(
        large.state_dict()["embed.main.logit_scale"], small.state_dict()["embed.main.logit_scale"]
    )
    with pytest.raises(
        ValueError, match=r"unexpected objectives\.answer\.head\.0\.bias, .* and 3 more \(the model has no"
    ):
        load_weights(small, dict(sorted(weights_of(large).items())))
    report = load_weights(small, weights_of(large), ignore=["objectives.answer.*"])
    assert len(report.ignored) == 6 and not report.unexpected
    report = load_weights(small, {**weights_of(large), "stray": torch.zeros(1)}, strict=False)
    assert len(report.unexpected) == 7
    assert report.summary().splitlines()[1].startswith("unexpected: objectives.answer.head.0.weight")


def test_a_wrong_shape_is_never_loaded() -> None:
    model = tiny_model("none", ["itc"])
    weights = {**weights_of(model), "embed.main.image.bias": torch.zeros(7), "embed.main.logit_scale": torch.zeros(2)}
    with pytest.raises(ValueError) as error:
        load_weights(model, weights, strict=False)
    assert sorted(str(error.value).removeprefix("the weights do not fit the model: ").split("; ")) == [
        "embed.main.image.bias is (7,), the model's is (16,)",
        "embed.main.logit_scale is (2,), the model's is (1,)",
    ]


def test_positions_follow_another_image_size() -> None:
    def sized(side: int) -> Model:
        config = tiny_model("none", ["itc"]).config
        assert isinstance(config.vision, PatchConfig)
        vision = config.vision.model_copy(update={"image_size": side})
        return build_model(ModelConfig(**{**dict(config), "vision": vision}), {"itc": ItcConfig()}, seed=side)

    small, large = sized(16), sized(32)
    report = load_weights(large, weights_of(small))
    assert report.resized == ("vision.vit.pos_embed",) and "1 resized" in report.summary()
    given, found = small.state_dict()["vision.vit.pos_embed"], large.state_dict()["vision.vit.pos_embed"]
    torch.testing.assert_close(found, resample_abs_pos_embed(given, [8, 8], num_prefix_tokens=1))
    assert torch.equal(found[:, 0], given[:, 0])


def test_stored_half_precision_becomes_the_models_dtype() -> None:
    model = tiny_model("none", ["itc"])
    report = load_weights(model, {name: tensor.half() for name, tensor in weights_of(model).items()})
    assert set(report.converted) == set(weights_of(model)) and not report.loaded
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_report_counts_what_it_lists() -> None:
    report = LoadReport(
        loaded=("a", "b"), missing=("c", "d", "e", "f"), notes=("sizes are the family's published ones",)
    )
    assert report.summary() == "2 loaded, 4 missing\nmissing: c, d, e and 1 more\nsizes are the family's published ones"


def test_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; give a checkpoint or a run folder"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
