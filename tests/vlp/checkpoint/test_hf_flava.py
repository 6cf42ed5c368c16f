"""transformers' FLAVA: the recorded cases, and models built here at random sizes, of pairs, images and texts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from standins import GOLDENS, verdict
from torch import Tensor
from two_towers import WORDS, randomise, texts, write_case

import vlp
from scripts.goldens.base import Case

CODES = 40
SIZES: list[dict[str, Any]] = [
    {},
    {"image": {"hidden_act": "relu", "patch_size": 16}, "text": {"layer_norm_eps": 1e-3, "hidden_act": "quick_gelu"}},
    {"image": {"hidden_size": 32}, "text": {"hidden_size": 40}, "multimodal": {"num_hidden_layers": 1}},
    {"image": {"image_size": 48}, "multimodal": {"intermediate_size": 56, "layer_norm_eps": 1e-4}},
]


def config(sizes: dict[str, Any]) -> transformers.FlavaConfig:
    stack = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": WORDS, "max_position_embeddings": 16}
    image = {"image_size": 32, "patch_size": 8, "vocab_size": CODES}
    return transformers.FlavaConfig(
        image_config=stack | image | sizes.get("image", {}),
        text_config=stack | text | sizes.get("text", {}),
        multimodal_config=stack | sizes.get("multimodal", {}),
        image_codebook_config={"hidden_size": 8, "num_blocks_per_group": 2, "vocab_size": CODES},
        projection_dim=16,
        hidden_size=24,
    )


def inputs(of: transformers.FlavaConfig, seed: int) -> dict[str, Tensor]:
    """Four pairs, of which some are false."""
    generator = torch.Generator().manual_seed(seed)
    ids, keep = texts(4, 10, pad=0, end=98, seed=seed)
    chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & keep.bool()
    chosen[:, 1] = True
    side = of.image_config.image_size
    grid = side // of.image_config.patch_size
    hidden = torch.rand(4, grid, grid, generator=generator) < 0.4
    hidden[:, 0] = True
    return {
        "input_ids": ids,
        "input_ids_masked": torch.where(chosen, 4, ids),
        "attention_mask": keep,
        "mlm_labels": torch.where(chosen, ids, -100),
        "pixel_values": torch.randn(4, 3, side, side, generator=generator),
        "codebook_pixel_values": torch.rand(4, 3, 8 * grid, 8 * grid, generator=generator),
        "bool_masked_pos": hidden,
        "itm_labels": torch.tensor([1, 0, 1, 1]) if seed % 2 else torch.tensor([1, 1, 0, 0]),
    }


def run(model: Any, given: dict[str, Tensor], folder: Path) -> Case:
    """What a pretraining model says, as a case."""
    model.save_pretrained(folder)
    found = model(**{name: one.clone() for name, one in given.items()}, return_loss=True)
    names = ("itm", "mim", "mlm", "mmm_image", "mmm_text", "global_contrastive")
    losses = {f"loss_{name}": getattr(found.loss_info, name) for name in names}
    states = ("image", "text", "image_masked", "text_masked", "multimodal_masked")
    outputs = {f"{name}_embeddings": getattr(found, f"{name}_embeddings") for name in states}
    outputs |= {f"{name}_logits": getattr(found, f"{name}_logits") for name in names[:-1]}
    outputs |= {name: getattr(found, name) for name in ("contrastive_logits_per_image", "contrastive_logits_per_text")}
    outputs |= losses | {"loss": found.loss}
    if "codebook_pixel_values" in given:
        outputs["codebook_indices"] = model.image_codebook.get_codebook_indices(given["codebook_pixel_values"])
    return write_case(folder, given, {n: x for n, x in outputs.items() if x is not None}, found.loss, model)


@pytest.mark.parametrize("name", ["hf_flava", "hf_flava_pretrain"])
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()


@pytest.mark.parametrize("seed", range(len(SIZES)))
@pytest.mark.parametrize("what", ["pairs", "image_only", "text_only"])
def test_pretraining(what: str, seed: int, tmp_path: Path) -> None:
    # Its heads take the width of the fused states, so that the towers must share it.
    sizes = {name: {k: v for k, v in part.items() if k != "hidden_size"} for name, part in SIZES[seed].items()}
    of = config(sizes)
    model = randomise(transformers.FlavaForPreTraining(of), seed)
    given = inputs(of, seed)
    images = ("pixel_values", "codebook_pixel_values", "bool_masked_pos")
    if what != "pairs":
        given = {n: x for n, x in given.items() if (n in images) == (what == "image_only") and n != "itm_labels"}
    case = run(model, given, tmp_path / f"hf_flava_pretrain_{what}")
    found = verdict(case)
    assert found.passed, found.line()
    assert found.gradients > 20


def test_all_pairs_count_where_none_is_true(tmp_path: Path) -> None:
    of = config({})
    given = inputs(of, 0)
    folder = tmp_path / "hf_flava_pretrain_false"
    model = randomise(transformers.FlavaForPreTraining(of), 0)
    model.save_pretrained(folder)
    given["itm_labels"] = torch.zeros(4, dtype=torch.long)
    found = model(**given, return_loss=True)
    names = ("itm", "mmm_image", "mmm_text", "global_contrastive")
    outputs = {f"loss_{name}": getattr(found.loss_info, name) for name in names}
    result = verdict(write_case(folder, given, outputs | {"loss": found.loss}, found.loss, model))
    assert result.passed, result.line()


@pytest.mark.parametrize("seed", range(len(SIZES)))
def test_model(seed: int, tmp_path: Path) -> None:
    of = config(SIZES[seed])
    model = randomise(transformers.FlavaModel(of), seed)
    folder = tmp_path / "hf_flava"
    model.save_pretrained(folder)
    given = {n: inputs(of, seed)[n] for n in ("input_ids", "attention_mask", "pixel_values")}
    found = model(**given)
    outputs = {f"{name}_embeddings": getattr(found, f"{name}_embeddings") for name in ("image", "text", "multimodal")}
    outputs |= {f"{name}_pooler": getattr(found, f"{name}_output")[1] for name in ("image", "text", "multimodal")}
    case = write_case(folder, given, outputs, sum(x.sum() for x in outputs.values()), model)
    (folder / "grad_norms.json").unlink()  # of no loss
    result = verdict(case)
    assert result.passed, result.line()


def test_files_of_transformers_4(tmp_path: Path) -> None:
    """They store both names of a head's bias, and counted positions."""
    model = randomise(transformers.FlavaForPreTraining(config({})), 0)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for head in ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head"):
        state[f"{head}.bias"] = state[f"{head}.decoder.bias"]
    state["flava.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = vlp.load(tmp_path)
    assert not loaded.report.missing and not loaded.report.unexpected
    assert sum("the same as" in one for one in loaded.report.ignored) == 4


def test_without_a_config(tmp_path: Path) -> None:
    model = randomise(transformers.FlavaForPreTraining(config({})), 0)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "flava.safetensors")
    loaded = vlp.load(tmp_path / "flava.safetensors")
    assert any("heads of width 64" in one for one in loaded.report.notes)
    assert not any(one.requires_grad for one in loaded.model.codebook.parameters())
