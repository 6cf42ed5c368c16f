"""BLIP's own checkpoints: recorded cases, cases made by the authors' code at toy sizes, and what a file may lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from standins import GOLDENS, verdict

import vlp
from objectives.base import Encode
from scripts.goldens.base import Case
from vlp.checkpoint.foreign import read_state

RECORDED = ["blip_decoder", "blip_itm", "blip_pretrain"]
BY_BLIP_CODE = sorted(folder.name for folder in (GOLDENS / "by_blip_code").iterdir())
"""Of the authors' models as the package blip-ci 0.0.5 holds them, with the generation of transformers 4.15."""


@pytest.mark.parametrize("name", [*RECORDED, *(f"by_blip_code/{name}" for name in BY_BLIP_CODE)])
def test_case(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()
    assert found.compared > 0.5 * found.recorded


def load(case: str, tmp_path: Path, **changes: Any) -> vlp.Loaded:
    """Load a case's file with weights replaced, or, if None, taken away."""
    state = read_state(GOLDENS / case / "model.pth")
    for name, tensor in changes.items():
        state = {n: t for n, t in state.items() if not n.startswith(name)} if tensor is None else state | {name: tensor}
    torch.save({"model": state}, tmp_path / "model.pth")
    config = Case(GOLDENS / case).config
    return vlp.load(tmp_path / "model.pth", config={"vit": config["vit"], "med_config": config["med"]})


def test_pretraining_shares_all_but_self_attention(tmp_path: Path) -> None:
    loaded = load("blip_pretrain", tmp_path)
    decoder, fusion = loaded.model.decoder, loaded.model.fusion
    assert decoder.embeddings is loaded.model.text.embeddings
    for ours, theirs in zip(decoder.blocks, fusion.blocks, strict=True):
        assert ours.feed is theirs.feed and ours.cross is theirs.cross and ours.attention is not theirs.attention
    assert loaded.config.objectives["itc"].queue == 8 and loaded.config.objectives["itm"].floor == 1e-4
    assert loaded.config.objectives["lm"].label_smoothing == 0.1
    assert loaded.config.model.text.fused_first == 131 and loaded.config.model.text.segments == 0
    copies = [name for name in loaded.report.ignored if "the same as" in name]
    assert any("crossattention" in name for name in copies) and not any(".attention." in name for name in copies)


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    name = "text_decoder.bert.encoder.layer.0.output.dense.weight"
    wrong = read_state(GOLDENS / "blip_pretrain" / "model.pth")[name] + 0.1
    with pytest.raises(ValueError, match="are one weight in this family, but differ"):
        load("blip_pretrain", tmp_path, **{name: wrong})


def test_pretraining_file_without_momentum_and_queue(tmp_path: Path) -> None:
    gone = {f"{name}_m.": None for name in ("visual_encoder", "text_encoder", "vision_proj", "text_proj")}
    gone |= {"image_queue": None, "text_queue": None, "queue_ptr": None}
    loaded = load("blip_pretrain", tmp_path, **gone)
    assert loaded.model.teacher is None and loaded.model.objectives["itc"].queue is None
    assert not loaded.report.missing


def test_matching_file_says_what_it_assumes(tmp_path: Path) -> None:
    loaded = load("blip_itm", tmp_path)
    notes = "; ".join(loaded.report.notes)
    assert "temperature 0.07" in notes and "[CLS]" in notes
    assert loaded.config.model.text.fused_first is None
    assert loaded.model.space().logit_scale.exp().item() == pytest.approx(1 / 0.07)
    with_temperature = load("blip_itm", tmp_path, temp=torch.tensor(0.05))
    assert with_temperature.config.model.text.fused_first == 131
    assert with_temperature.model.space().logit_scale.exp().item() == pytest.approx(20)


def test_heads_are_assumed_without_a_configuration(tmp_path: Path) -> None:
    torch.save({"model": read_state(GOLDENS / "blip_decoder" / "model.pth")}, tmp_path / "model.pth")
    loaded = vlp.load(tmp_path / "model.pth")
    assert any("heads in the vision tower" in note for note in loaded.report.notes)
    assert any("heads in the text layers" in note for note in loaded.report.notes)


def test_positions_are_resized_as_the_authors_do(tmp_path: Path) -> None:
    config = Case(GOLDENS / "blip_decoder").config
    given = {"vit": config["vit"], "med_config": config["med"]}
    larger = {"model": {"vision": {"image_size": 48}}}
    loaded = vlp.load(GOLDENS / "blip_decoder" / "model.pth", config=given, settings=larger)
    assert loaded.report.resized == ("vision.vit.pos_embed",)
    stored = read_state(GOLDENS / "blip_decoder" / "model.pth")["visual_encoder.pos_embed"]
    grid = stored[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(loaded.model.vision.vit.pos_embed[:, 1:], wanted)


def test_published_captioning_file(tmp_path: Path) -> None:
    """Of the published vocabulary: the prompt and the special tokens are known."""
    rows = torch.randn(30_524, 24)
    names = ("text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight")
    biases = ("text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias")
    loaded = load("blip_decoder", tmp_path, **dict.fromkeys(names, rows), **dict.fromkeys(biases, torch.zeros(30_524)))
    assert loaded.config.objectives["lm"].prompt == (1037, 3861, 1997)
    words = loaded.config.data.tokenizer
    assert words.added_tokens == ("[DEC]", "[ENC]") and words.bos_token == "[DEC]" and words.clean == "blip"
    assert Encode("image") in {one.memory for one in loaded.model.needs()}
