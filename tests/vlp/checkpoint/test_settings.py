"""The authors' settings: a mapping or a file, laid over the file's own; what nobody reads is said."""

from __future__ import annotations

import collections
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from standins import GOLDENS
from transformers import CLIPConfig, CLIPModel

import vlp
from scripts.goldens.base import Case
from scripts.goldens.cases import ADAPTERS
from vlp.checkpoint.asked import Asked, laid_over
from vlp.checkpoint.foreign import WEIGHT_FILES, read_settings, read_state, shapes_of
from vlp.checkpoint.inspect import inspect
from vlp.checkpoint.load import recognise
from vlp.checkpoint.native import load_weights, weights_of

WEIGHTS = GOLDENS / "albef_retrieval" / "model.pth"
HEADS = {"bert_config": {"num_attention_heads": 4}, "vit": {"num_heads": 4}}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A transformers CLIP of random weights, as save_pretrained writes it."""
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 99, "max_position_embeddings": 8, "eos_token_id": 98}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def edit(folder: Path, **changes: Any) -> Path:
    """Change a folder's config.json; None takes a key out."""
    file = folder / "config.json"
    found = {k: v for k, v in {**json.loads(file.read_text()), **changes}.items() if v is not None}
    file.write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("form", ["json", "yaml", "path"])
def test_config_may_be_a_file(tmp_path: Path, form: str) -> None:
    file = tmp_path / ("authors.yaml" if form == "yaml" else "authors.json")
    file.write_text(yaml.safe_dump(HEADS) if form == "yaml" else json.dumps(HEADS))
    loaded = vlp.load(WEIGHTS, config=file if form == "path" else str(file))
    assert loaded.model.config.vision.heads == 4 and loaded.model.config.text.heads == 4
    assert not any("heads" in note for note in loaded.report.notes)
    assert inspect(WEIGHTS, str(file)).config.model.vision.heads == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("gone.json", "config gone.json: .*No such file.*give a JSON or YAML file"),
        ("gone.yaml", "gone.yaml: cannot be read"),
        ("list.json", "list.json: a mapping was expected, not list"),
        ("broken.json", "broken.json: .*give a JSON or YAML file"),
        (7, "config=7 should be a mapping of the authors' own keys, or a JSON or YAML file"),
    ],
)
def test_what_is_no_config_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, message: str
) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    for read in (vlp.load, inspect):
        with pytest.raises(ValueError, match=message) as error:
            read(WEIGHTS, config=config)
        assert "\n" not in str(error.value)


def test_keys_that_nobody_reads_are_named_with_the_nearest_that_is_read() -> None:
    wrong = {"bert_config": {"num_attention_head": 4}, "vits": {"num_heads": 4}, "alpha": 0.3}
    wrong |= {f"train_file_{n}": "x" for n in range(7)}  # as the authors' own files have them
    for notes in (vlp.load(WEIGHTS, config=wrong).report.notes, inspect(WEIGHTS, wrong).assumed):
        said = [note for note in notes if note.startswith("config= ")]
        assert said == [
            "config= bert_config.num_attention_head is not read; perhaps you meant num_attention_heads",
            "config= vits is not read; perhaps you meant vit",
            "config= not read: train_file_0, train_file_1, train_file_2, train_file_3, train_file_4 and 2 more",
        ]
    assert "config= vits" in vlp.load(WEIGHTS, config=wrong).report.summary()


def test_config_is_laid_over_the_files_own_part_by_part(clip: Path) -> None:
    before = json.loads((clip / "config.json").read_text())["text_config"]["hidden_act"]
    loaded = vlp.load(clip, config={"text_config": {"layer_norm_eps": 0.25}})
    text = loaded.model.config.text
    assert text.eps == 0.25 and text.heads == 2 and text.activation == before
    assert not any(note.startswith("config=") for note in loaded.report.notes)
    asked = Asked(laid_over({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}))
    assert dict(asked["a"]) == {"b": 4, "c": 2} and asked["d"] == 3 and asked.unread({"a": {"b": 4}}) == ()


def test_a_config_that_lacks_a_part_is_not_called_missing(clip: Path) -> None:
    notes = vlp.load(edit(clip, text_config=None)).report.notes
    assert any(note.startswith("assumed: config.json has no text_config: heads of width 64") for note in notes)
    (clip / "config.json").unlink()
    file = (clip / "model.safetensors").rename(clip / "clip.safetensors")  # the other name is our own's
    assert any(note.startswith("assumed: no config.json: heads") for note in vlp.load(file).report.notes)


def test_weights_of_which_none_fits_are_refused_in_one_short_line() -> None:
    """Every weight misfits: the first few are named, the others counted."""
    other = vlp.load(WEIGHTS, config=HEADS)
    halves = {name: tensor.flatten()[: tensor.numel() // 2] for name, tensor in weights_of(other.model).items()}
    with pytest.raises(ValueError, match=r"the weights do not fit the model: .*; and \d+ more$") as error:
        load_weights(other.model, halves)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_patches_that_do_not_divide_the_image_are_said(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    vlp.load(clip, settings={"model": {"vision": {"image_size": 21}}})
    assert "image_size 21 is no multiple of its patches' side 8: the last 5 rows and columns of pixels" in caplog.text
    caplog.clear()
    vlp.load(clip, settings={"model": {"vision": {"image_size": 24}}})
    assert "multiple" not in caplog.text


def recorded() -> Iterator[tuple[Case, Mapping[str, Any]]]:
    """Every recorded checkpoint, with its authors' settings."""
    for path in sorted(GOLDENS.glob("*/case.json")):
        case = Case(path.parent)
        adapter = next((one for pattern, one in ADAPTERS.items() if re.fullmatch(pattern, case.name)), None)
        if adapter is not None and any((case.folder / name).is_file() for name in WEIGHT_FILES):
            yield case, {**read_settings(case.weights), **adapter.config(case)}


def test_names_that_are_unexpected_are_those_of_the_file() -> None:
    """Whatever a family calls a weight on its way."""
    seen = set()
    for case, config in recorded():
        state = dict(read_state(case.weights))
        family = recognise(shapes_of(state), config, case.weights)
        seen.add(family.name)
        assert family.rename(state).unexpected == (), case.name
        places = collections.Counter(name.partition(".")[0] for name in state).most_common(2)
        for place in ("", "text_decoder.bert", *(place for place, _ in places)):
            stranger = f"{place}.stranger.weight".lstrip(".")
            found = family.rename(state | {stranger: torch.ones(2)})
            handed_on = any("stranger" in name for name in found.state)  # to a library's own tower
            assert found.unexpected == (() if handed_on else (stranger,)), (case.name, stranger)
    assert len(seen) > 15


def test_sizes_that_no_image_has_are_one_line(tmp_path: Path) -> None:
    """Patches of no pixels: the image's side would be 0."""
    shutil.copytree(GOLDENS / "hf_blip_itm", tmp_path / "blip")
    file = tmp_path / "blip" / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in read_state(file).items()}
    name = "vision_model.embeddings.patch_embedding.weight"
    save_file(state | {name: state[name][:, :, :0].contiguous()}, file)
    with pytest.raises(ValueError, match="looks like a hf_blip checkpoint but is not whole") as error:
        vlp.load(tmp_path / "blip")
    assert "\n" not in str(error.value)
